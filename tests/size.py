"""How large and how entangled the code is: `python tests/size.py [FOLDER OF A CHECKOUT]`.

Code lines are those that hold more than comments and docstrings. What is reached from a module is what it
imports, and what that imports in turn, wherever in a module; imports for type checkers alone do not count.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

from transformers import Trainer

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
LONG_FUNCTION, WIDE_LINE = 50, 110
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
SILENT |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


TEXTS = {name_of(path): path.read_text() for path in sorted((ROOT / "rm_recipe").rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
MODULES = {name for name in TREES if not name.endswith("__init__")}


def code_lines(name):
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imports(node):
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def reached_from(*verbs):
    """From the modules of these verbs, in their packages or, before there were any, beside each other."""
    found, todo = set(), {name for name in MODULES if name.split(".")[-1] in verbs}
    while todo:
        found |= todo
        todo = {name for module in todo for name in imports(TREES[module])} & MODULES - found
    return f"{len(found)} modules, {sum(map(code_lines, found))} code lines"


def overridden():
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Trainer") for b in node.bases):
                yield from (item.name for item in node.body if isinstance(item, FUNCTIONS))


def main():
    functions = [(name, n) for name in TREES for n in ast.walk(TREES[name]) if isinstance(n, FUNCTIONS)]
    lengths = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name, node in functions}
    long = [f"{name} ({n})" for name, n in sorted(lengths.items(), key=lambda x: -x[1]) if n > LONG_FUNCTION]
    packages = Counter(name.split(".")[1] for name in MODULES if name.count(".") > 1)
    methods = sorted(set(overridden()) & set(dir(Trainer)))
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    lines = [line for text in (*TEXTS.values(), *tests) for line in text.splitlines()]
    for what, size in {
        "code lines": sum(map(code_lines, TREES)),
        "modules": len(MODULES),
        "packages": f"{len(packages)}: {', '.join(f'{name} {n}' for name, n in sorted(packages.items()))}",
        "functions": len(functions),
        f"over {LONG_FUNCTION} lines": f"{len(long)}: {', '.join(long)}",
        "train reaches": reached_from("train"),
        "all reach": f"{reached_from('train', 'evaluate', 'export')} (train, evaluate, export)",
        "Trainer's methods": f"{len(methods)} overridden: {', '.join(methods)}",
        "test lines": sum(len(text.splitlines()) for text in tests),
        f"over {WIDE_LINE} wide": sum(len(line) > WIDE_LINE for line in lines),
        "fmt: skip": sum(line.endswith("# fmt: skip") for line in lines),
        "README lines": len((ROOT / "README.md").read_text().splitlines()),
    }.items():
        print(f"{what:18} {size}")


if __name__ == "__main__":
    main()
