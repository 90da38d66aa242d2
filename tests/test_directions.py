"""Imports go one way through the packages, and nothing lies about unused."""

import ast

from conftest import REPOSITORY

# What comes later may import what comes earlier.
ORDER = ["errors", "files", "processes", "recipe", "data", "model", "scoring", "training", "evaluation", "rl"]
ORDER += ["exporting", "overoptimization", "tools", "cli"]
STARTS = {"rm_recipe.__init__", "rm_recipe.__main__", "rm_recipe.cli"}


def name_of(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


MODULES = {name_of(path): path for path in (REPOSITORY / "rm_recipe").rglob("*.py")}


def imported_by(name):
    """The modules that one imports, anywhere in it; a package counts as its `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def part_of(name):
    return name.split(".")[1]


def test_imports_go_one_way():
    parts = [(part_of(name), part_of(other)) for name in MODULES for other in imported_by(name)]
    allowed = {(later, earlier) for i, later in enumerate(ORDER) for earlier in ORDER[: i + 1]}
    allowed -= {("evaluation", "training"), ("training", "evaluation")}
    assert {pair for pair in parts if "__" not in pair[0]} <= allowed
    assert {part_of(name) for name in MODULES} <= {*ORDER, "__init__", "__main__"}


def test_every_module_is_reached():
    """By an import, or by its name in a module that runs it as a process of its own."""
    texts = {name: path.read_text() for name, path in MODULES.items()}
    reached, todo = set(), list(STARTS)
    while todo:
        name = todo.pop()
        reached.add(name)
        names = {other: {f'"{other}"', f'"{other.split(".")[-1]}.py"'} for other in MODULES}
        run = {other for other in MODULES if any(each in texts[name] for each in names[other])}
        todo += (imported_by(name) | run) - reached
    assert {name for name in MODULES if not name.endswith("__init__")} <= reached


def test_a_package_holds_at_most_nine_modules():
    for folder in {path.parent for path in MODULES.values()} - {REPOSITORY / "rm_recipe"}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= 9, folder
