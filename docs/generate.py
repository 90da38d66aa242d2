"""Write the parts of docs/ that follow from the code; `--check` names the pages that are stale.

    python docs/generate.py [--check]

Such a part stands between `<!-- generated: NAME -->` and `<!-- end -->`; `PARTS` has the functions by name.
"""

import ast
import dataclasses
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; `head` has its columns with `|` between them."""
    lines = [f"| {head} |", "|---" * len(head.split("|")) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(text: str) -> str:
    """A text that stands in a table as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: object) -> str:
    return f"`{cell(str(text))}`" if str(text) else ""


# --- recipes -------------------------------------------------------------------------------------


def recipes() -> str:
    """The shipped recipes and what their headers say."""
    rows = []
    for path in sorted((REPOSITORY / "recipes").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        head = " ".join(line.strip("# ") for line in lines if line.startswith("#"))
        said = re.search(r"Purpose: (.*?) Needs: (.*?) Launch:", head)
        assert said, path
        rows.append([f"[`{path.stem}`](../recipes/{path.name})", cell(said[1]), cell(said[2])])
    return table("recipe | purpose | needs", rows)


# --- keys ----------------------------------------------------------------------------------------


def type_in_words(hint: Any) -> str:
    """A key's type as people write it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        of = typing.get_args(hint)[0]
        return {str: "list of texts", int: "list of whole numbers"}.get(of, "list of mappings")
    if typing.get_origin(hint) is dict:
        return "mapping"
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    names = {
        "str": "text",
        "bool": "true or false",
        "int": "whole number",
        "float": "number",
        "dict": "mapping",
    }
    if not kinds:
        return names.get(hint.__name__, hint.__name__)
    words = dict.fromkeys(type_in_words(kind) for kind in kinds)
    return " or ".join(words)


def comments(of: type) -> dict[str, str]:
    """What stands above each field of a dataclass, as a comment."""
    source = Path(str(sys.modules[of.__module__].__file__)).read_text(encoding="utf-8")
    found, said = {}, []
    body = re.search(rf"^class {of.__name__}:.*?(?=^\S|\Z)", source, re.DOTALL | re.MULTILINE)
    assert body
    for line in map(str.strip, body[0].splitlines()[1:]):
        if line.startswith("#"):
            said.append(line.lstrip("# "))
        elif match := re.match(r"(\w+):", line):
            found[match[1]], said = " ".join(said), []
    previous = ""
    for name, text in found.items():  # a comment above two of a kind is of both
        found[name] = previous = text or previous
    return found


# What a recipe that says nothing gets, where that is not TRL's default.
SETTLED_LATER = {
    "dtype": "by the device",
    "gradient_checkpointing": "by the plan",
    "activation_checkpointing": "by the plan",
    "lora_dropout": "`0`, or `0.05` with `disable_dropout: false`",
}


def rows_of(part: type, said: Callable[[Any], str]) -> list[list[str]]:
    from rm_recipe.recipe import schema

    fields, rows = schema.recipe_keys().model_fields, []
    for item in dataclasses.fields(part):
        if item.init and item.name in fields and item.name not in schema.FIXED_KEYS:
            field = fields[item.name]
            limit = schema.LIMITS.get(item.name, (None, ""))[1]
            default = "" if field.default in (None, []) else code(schema.shown(field.default))
            default = SETTLED_LATER.get(item.name, default)
            what = " ".join(filter(None, [cell(said(item)), f"({cell(limit)})" if limit else ""]))
            rows.append([code(item.name), cell(type_in_words(field.annotation)), default, what])
    return rows


def help_of(item: Any) -> str:
    """The first sentence of what TRL says of a key."""
    text = " ".join(str(item.metadata.get("help", "")).split())
    return re.split(r"(?<=[.!])\s", text)[0].replace("`", "")


def own_keys() -> str:
    """The keys that TRL has no name for."""
    from rm_recipe.recipe.schema import DataArguments, HubArguments

    rows = []
    for part in (DataArguments, HubArguments):
        above = comments(part)
        rows += rows_of(part, lambda item, above=above: above[item.name])
    return table("key | value | default | meaning", rows)


def model_keys() -> str:
    """TRL's `ModelConfig`."""
    from trl import ModelConfig

    return table("key | value | default | meaning (TRL's words)", rows_of(ModelConfig, help_of))


def reward_keys() -> str:
    """What TRL's `RewardConfig` adds to, or sets otherwise than, transformers."""
    from transformers import TrainingArguments
    from trl import RewardConfig

    usual = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    own = {i.name for i in dataclasses.fields(RewardConfig) if usual.get(i.name, own_keys) != i.default}
    rows = [row for row in rows_of(RewardConfig, help_of) if row[0].strip("`") in own]
    return table("key | value | default | meaning (TRL's words)", rows)


def training_keys() -> str:
    """The rest: transformers' `TrainingArguments`, as TRL has them."""
    from trl import RewardConfig

    there = set(
        re.findall(r"^\| `(\w+)`", "\n".join([own_keys(), model_keys(), reward_keys()]), re.MULTILINE)
    )
    rows = [row[:3] for row in rows_of(RewardConfig, lambda _: "") if row[0].strip("`") not in there]
    return table("key | value | default", rows)


def refused_keys() -> str:
    """Keys of TRL that a recipe may not have, and those that take their default alone."""
    from rm_recipe.recipe.schema import FIXED_KEYS, REFUSED_KEYS

    rows = [[code(key), "refused", cell(why)] for key, why in REFUSED_KEYS.items()]
    rows += [[code(key), "its default alone", cell(why)] for key, why in FIXED_KEYS.items()]
    return table("key | | why", rows)


def foreign_keys() -> str:
    """Names of other tools."""
    from rm_recipe.recipe.schema import FOREIGN_KEYS

    return table(
        "elsewhere | here", ([code(key), cell(here.replace("'", "`"))] for key, here in FOREIGN_KEYS.items())
    )


def together() -> str:
    """Keys that exclude each other, and why."""
    from rm_recipe.recipe.relations import EXCLUSIVE, IDLE, NEEDS

    rows = []
    for line in EXCLUSIVE.strip().splitlines():
        keys, why = line.split(": ", 1)
        first, *others = (code(term.replace("=", ": ").replace("|", " or ")) for term in keys.split())
        rows.append([first, f"not with {', '.join(others)}", cell(why)])
    for first, needed in NEEDS.items():
        keys = ", ".join(code(key) for key in first.replace("=", ": ").split())
        rows.append([keys, f"only with {code(needed)}", ""])
    for first, terms in IDLE.items():
        said = " or ".join(code(term.replace("=", ": ").replace("|", " or ")) for term in terms.split())
        rows.append([code(first), f"does nothing without {said}", ""])
    return table("key | | why", rows)


# --- data, code, rows ----------------------------------------------------------------------------


def shapes() -> str:
    """The shapes of rows that are known by their columns."""
    from rm_recipe.data.formats import EQUAL, SHAPES

    rows = []
    for name, group in itertools.groupby(SHAPES, lambda shape: shape.name):
        alike = list(group)
        prompt, responses, verdict, others = (
            " or ".join(dict.fromkeys(", ".join(map(code, getattr(s, part).split())) for s in alike))
            for part in ("prompt", "responses", "verdict", "known")
        )
        better = cell(alike[0].better.replace(EQUAL, "a tie"))
        rows.append([cell(name), prompt, responses, f"{verdict}: {better}" if verdict else "", others])
    return table(
        "shape | prompt | responses, the best first | verdict: which is better | known by others", rows
    )


def modules() -> str:
    """The modules of each package, each with the first sentence of its docstring."""
    rows, folder = [], None
    paths = (REPOSITORY / "rm_recipe").rglob("*.py")
    for path in sorted(paths, key=lambda path: (len(path.parent.parts), path.parent, path.name)):
        if path.stem.startswith("__"):
            continue
        if path.parent != folder:
            folder = path.parent
            rows.append([f"**{folder.relative_to(REPOSITORY)}/**", ""])
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"\.(?=\s|$)", " ".join(said.split("\n\n")[0].split()))[0].rstrip(": ")
        rows.append([f"[{path.name}](../{path.relative_to(REPOSITORY)})", cell(sentence)])
    return table("module | is", rows)


def verbs() -> str:
    """The command line's verbs and their options, as `--help` has them."""
    import typer

    from rm_recipe.cli import app

    rows = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = [
            code(o.opts[-1]) for o in command.params if o.param_type_name == "option" and o.name != "help"
        ]
        rows.append(
            [code(f"rm-recipe {name}"), cell(command.help or "").replace("[", "\\["), ", ".join(options)]
        )
    return table("verb | does | options", rows)


def mask() -> str:
    """Who sees whom in a row of one comparison, asked of the code that makes the masks."""
    from rm_recipe.data.comparison import Encoded
    from rm_recipe.model.row_attention import row_mask
    from rm_recipe.model.shared_prefix import shared_rows

    names = ["p1", "p2", "p3", "c1", "c2", "r1", "r2", "r3"]
    rows = shared_rows([Encoded([11, 12, 13], [[21, 22], [31, 32, 33]])], 0, one_row=True)
    seen, positions = row_mask(rows["attention_mask"])[0, 0], rows["position_ids"][0].tolist()
    lines = [
        "token          " + "  ".join(names),
        "position id    " + "  ".join(f"{p:<2}" for p in positions),
        "",
    ]
    for name, own in zip(names, seen.tolist(), strict=True):
        lines.append(f"{name} sees        " + "  ".join("x " if there else ". " for there in own).rstrip())
    ends = rows["last_token_positions"][:, 1].tolist()
    lines += ["", f"rewards are read at {' and '.join(names[end] for end in ends)}"]
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


PARTS = {
    part.__name__: part
    for part in (
        *(recipes, own_keys, model_keys, reward_keys, training_keys, refused_keys, foreign_keys, together),
        *(shapes, modules, verbs, mask),
    )
}


def up_to_date(text: str) -> str:
    """A page with its generated parts as they should be."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n{found[3]}", text)


def stale(write: bool = False) -> list[str]:
    """The pages whose generated parts are not what the code says now; `write` mends them."""
    found = []
    for path in sorted((REPOSITORY / "docs").glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = up_to_date(before)
        if after != before:
            found.append(path.name)
            if write:
                path.write_text(after, encoding="utf-8")
    return found


if __name__ == "__main__":
    check = "--check" in sys.argv
    pages = stale(write=not check)
    print("\n".join(pages) if pages else "docs/ is up to date")
    sys.exit(1 if check and pages else 0)
