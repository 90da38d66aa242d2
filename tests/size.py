"""How large and how entangled the code is: `make size`.

Code lines are those that hold more than comments and docstrings. What is reached from a module is what it
imports, and what that imports in turn, wherever in a module.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONG_FUNCTION, WIDE_LINE = 50, 110
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
SILENT |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TEXTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "rm_recipe").rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def code_lines(name):
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported_by(name):
    """The modules that one imports, anywhere in it; a package counts as its `__init__`."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & TREES.keys()


def reached_from(*verbs):
    found, todo = set(), {name for name in TREES if name.split(".")[-1] in verbs}
    while todo:
        found |= todo
        todo = {other for name in todo for other in imported_by(name)} - found
    return f"{len(found)} modules, {sum(map(code_lines, found))} code lines"


def overridden():
    from transformers import Trainer

    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    trainers = [node for node in classes if any(ast.unparse(base).endswith("Trainer") for base in node.bases)]
    own = {item.name for node in trainers for item in node.body if isinstance(item, FUNCTIONS)}
    return sorted(own & set(dir(Trainer)))


def main():
    functions = [(name, n) for name in TREES for n in ast.walk(TREES[name]) if isinstance(n, FUNCTIONS)]
    lengths = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name, node in functions}
    long = [f"{name} ({n})" for name, n in sorted(lengths.items(), key=lambda x: -x[1]) if n > LONG_FUNCTION]
    modules = [name for name in TREES if not name.endswith("__init__")]
    packages = Counter(name.split(".")[1] for name in modules if name.count(".") > 1)
    methods = overridden()
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    lines = [line for text in (*TEXTS.values(), *tests) for line in text.splitlines()]
    for what, size in {
        "code lines": sum(map(code_lines, TREES)),
        "modules": len(modules),
        "packages": f"{len(packages)}: {', '.join(f'{name} {n}' for name, n in sorted(packages.items()))}",
        "functions": len(functions),
        f"over {LONG_FUNCTION} lines": f"{len(long)}: {', '.join(long)}",
        "train reaches": reached_from("train"),
        "all reach": f"{reached_from('train', 'evaluate', 'export')} (train, evaluate, export)",
        "Trainer's methods": f"{len(methods)} overridden: {', '.join(methods)}",
        "test lines": sum(len(text.splitlines()) for text in tests),
        f"over {WIDE_LINE} wide": sum(len(line) > WIDE_LINE for line in lines),
        "fmt: skip": sum(line.endswith("# fmt: skip") for line in lines),
    }.items():
        print(f"{what:18} {size}")


if __name__ == "__main__":
    main()
