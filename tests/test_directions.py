"""Imports go one way through the packages, and nothing lies about unused."""

from collections import Counter

from size import TEXTS, imported_by

# What comes later may import what comes earlier.
ORDER = ["errors", "files", "processes", "recipe", "data", "model", "scoring", "training", "evaluation", "rl"]
ORDER += ["exporting", "overoptimization", "tools", "cli"]
MODULES = {name for name in TEXTS if not name.endswith("__init__")}


def part_of(name):
    return name.split(".")[1]


def test_imports_go_one_way():
    parts = [(part_of(name), part_of(other)) for name in TEXTS for other in imported_by(name)]
    allowed = {(later, earlier) for i, later in enumerate(ORDER) for earlier in ORDER[: i + 1]}
    allowed -= {("evaluation", "training"), ("training", "evaluation")}
    assert {pair for pair in parts if "__" not in pair[0]} <= allowed
    assert {part_of(name) for name in TEXTS} <= {*ORDER, "__init__", "__main__"}


def test_every_module_is_reached():
    """By an import, or by its name in a module that runs it as a process of its own."""
    reached, todo = set(), ["rm_recipe.__init__", "rm_recipe.__main__", "rm_recipe.cli"]
    while todo:
        name = todo.pop()
        reached.add(name)
        names = {other: {f'"{other}"', f'"{other.split(".")[-1]}.py"'} for other in TEXTS}
        run = {other for other in TEXTS if any(each in TEXTS[name] for each in names[other])}
        todo += (imported_by(name) | run) - reached
    assert reached >= MODULES


def test_a_package_holds_at_most_nine_modules():
    sizes = Counter(name.rpartition(".")[0] for name in MODULES)
    assert {package for package, n in sizes.items() if n > 9} == set()
