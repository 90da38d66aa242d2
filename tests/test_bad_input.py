"""Whatever is wrong with the input: exit code 2, one message that names it, and nothing left behind."""

import gzip
import json
import random
import re
import shutil
import signal
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import invoke

from rm_recipe.data.formats import parse_row
from rm_recipe.data.splits import load_split
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.schema import DataArguments


@pytest.fixture(autouse=True)
def in_two_minutes():
    """What hangs fails, from within."""

    def late(*_):
        raise TimeoutError("more than two minutes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every path below a folder, with a file's content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """A function: runs a verb, which has to refuse with a message that has this part."""

    def run(*arguments: str, part: str) -> None:
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        code, _, err = invoke(monkeypatch, capsys, *arguments)
        said = " ".join(err.replace("│", " ").split())
        assert code == 2, said
        assert part in said
        assert "Traceback" not in err
        assert err.count("rm-recipe: ") == 1 or "Usage: rm-recipe" in err
        assert tree(tmp_path) == before

    return run


# --- recipes and arguments -----------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n"
for before, name in zip("abcdefg", "bcdefgh", strict=True):
    BOMB += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
FILES = {
    b"": "is empty; a recipe is a mapping",
    b"- a\n- b\n": "holds a list",
    b"seed: [1,\n": "not valid YAML",
    b"seed: !!python/object/apply:os.system [exit]\n": "not valid YAML",
    b"seed: 1\nseed: 2\n": "line 2: key 'seed' is given twice",
    "output_dir: Übung\n".encode("latin-1"): "not valid YAML: 'utf-8' codec can't decode byte 0xdc",
    b"{a: 1}: 2\n": "line 1: not valid YAML",
    BOMB.encode(): "unknown key 'a'",
    b"[" * 5000: "not valid YAML",
    b"seed: 2026-13-01\n": "not valid YAML",
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_a_recipes_file(tmp_path, refused, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    refused("check", "bad.yaml", part=FILES[content])


ARGUMENTS = """
check {r} --learning_rate fast                   -> 'learning_rate: fast' should be a valid number
check {r} --lerning_rate 1                       -> unknown key 'lerning_rate'. Did you mean 'learning_rate'?
check {r} --lora_target_modules [                -> 'lora_target_modules: ['
check {r} --attn_implementation flash_attention_2 -> cannot be loaded as a classifier: FlashAttention2
check {r} --seed                                 -> --seed has no value
check {r} seed 1                                 -> 'seed' is not of the form --key value
check {r} --seed 1 --seed 2                      -> --seed is given twice
check {r} --gpu-memory lots                      -> '--gpu-memory lots' is not a size such as 8GB
check                                            -> Missing argument 'RECIPE'
check folder.yaml                                -> folder.yaml: cannot be read
train gone.yaml                                  -> gone.yaml: no such recipe
train {r} --resume --overwrite                   -> exclude each other
train {r} --resume                               -> run holds no run to resume
train {r} --dataset_name gone.jsonl              -> 'dataset_name: gone.jsonl' does not exist
train {r} --dataset_name no/hub                  -> 'no/hub' cannot be loaded from the Hub
train {r} --model_name_or_path ./gone            -> 'model_name_or_path: ./gone' does not exist
train {r} --model_name_or_path no/hub            -> _path: no/hub' cannot be loaded
run {r} --seed one                               -> 'seed: one' should be a valid integer
evaluate gone                                    -> gone
evaluate {model} --dataset gone.jsonl            -> gone.jsonl
export gone                                      -> gone is not a run folder
export {data}                                    -> is not a run folder: it has no recipe.yaml of a run
export gone --dtype int3                         -> 'int3' is not one of
push {model} --repo-id a                         -> give USER/NAME
score {model}                                    -> give --input and --output, or --prompt and --response
score {model} --prompt a --response b --input c  -> --prompt and --response
score ./gone --prompt a --response b             -> ./gone does not exist
score {model} --input gone.jsonl --output o      -> 'gone.jsonl' cannot be read: No such file
overoptimization a --gold b --samples c --n 3    -> leave out n
trian {r}                                        -> No such command 'trian'
"""


@pytest.mark.parametrize("row", ARGUMENTS.strip().splitlines())
def test_a_verbs_arguments(write_recipe, refused, tiny_llama, tiny_data, tmp_path, row):
    (tmp_path / "folder.yaml").mkdir()
    names = {"r": str(write_recipe()), "model": str(tiny_llama), "data": str(tiny_data)}
    arguments, part = row.split("-> ")
    refused(*(word.format(**names) for word in arguments.split()), part=part)


# --- data, models, folders -----------------------------------------------------------------------

GOOD = json.dumps(make_rows(1, seed=5)[0]).encode()
DATA = {
    ("train.jsonl", b""): "train",
    ("train.jsonl", GOOD + b'\n{"prompt": "\xff"}\n'): "line 2",
    ("train.jsonl", b'{"text": "a", "label": 1}\n'): "text, label",
    ("train.jsonl", b'{"prompt": "a", "chosen": "", "rejected": ""}\n'): ", first in row 1",
    ("train.json", b"[1, 2]"): "train.json",
    ("train.parquet", b"PAR1 is not enough"): "train.parquet",
    ("train.jsonl.gz", gzip.compress(GOOD * 50)[:-20]): "train.jsonl.gz",
}


@pytest.mark.parametrize("file", DATA, ids=range(len(DATA)))
def test_a_data_file(write_recipe, refused, tmp_path, file):
    write_jsonl(tmp_path / "data" / "test.jsonl", make_rows(4, seed=2))
    (tmp_path / "data" / file[0]).write_bytes(file[1])
    refused("train", str(write_recipe(dataset_name=str(tmp_path / "data"))), part=DATA[file])


@pytest.mark.parametrize("content", [b"{", b'{"prompt": "a"}\n', b"[]\n", b"\xff"])
def test_a_file_of_responses(refused, tmp_path, tiny_llama, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    refused("score", str(tiny_llama), "--input", "in.jsonl", "--output", "out.jsonl", part=", line 1")


MODELS = {
    ("config.json", b"{}"): "cannot be loaded",
    ("config.json", b'{"model_type": "nothing"}'): "cannot be loaded",
    ("model.safetensors", None): "cannot be loaded",
    ("model.safetensors", b"cut off"): "cannot be loaded",
    ("tokenizer.json", b"{"): "tokenizer",
    ("chat_template.jinja", b"{% if %}"): "template",
}


@pytest.mark.parametrize("damage", MODELS, ids=str)
def test_a_base(write_recipe, refused, tmp_path, tiny_llama, damage):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / damage[0]).unlink()
    if damage[1] is not None:
        (base / damage[0]).write_bytes(damage[1])
    refused("train", str(write_recipe(model_name_or_path=str(base))), part=MODELS[damage])


# --- whatever comes ------------------------------------------------------------------------------


def mutated(text: str, rng: random.Random) -> str:
    """A recipe with some of its lines cut, doubled, swapped, or with another value."""
    lines = text.splitlines()
    values = ["", "null", "-1", "1e999", ".nan", "[[]]", "{a: b}", "'", "*x", "!!int x", "\x85", "9" * 400]
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(lines))
        key = lines[place].partition(":")[0]
        noise = "".join(rng.choice(string.printable) for _ in range(rng.randrange(12)))
        cut_off = lines[place][: rng.randrange(len(lines[place]) + 1)]
        others = [cut_off, f"{key}: {rng.choice(values)}", f"{key}: {noise}", noise, rng.choice(lines)]
        lines[place] = rng.choice([*others, "  " + lines[place]])
    return "\n".join(lines)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_recipe_is_read_or_refused(tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    text = "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nlora_r: 4\nmax_length: 128\nseed: 0\n"
    path = folder / "mutated.yaml"
    text += "bf16: false\nuse_cpu: true\nlearning_rate: 1.0e-4\noptim: adamw_torch\nfsdp: ''\n"
    path.write_text(mutated(text, random.Random(seed)))
    try:
        read_recipe(path, check_inputs=False)
    except RecipeError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("piece", ["\n\nHuman:", " \n\n"])
def test_a_long_transcript_takes_no_longer_than_its_length(piece):
    asked = "a" + piece * (300_000 // len(piece))
    text = f"\n\nHuman: {asked}\n\nAssistant: b"
    found = parse_row({"chosen": text, "rejected": text + "c"})
    assert found.responses == ["b", "bc"]
    assert [message["content"] for message in found.prompt] == [asked.rstrip()]


@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_white_space_before_a_text_takes_no_longer_than_its_length(field):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert parse_row({**row, field: " " * 300_000 + row[field]}).responses[1] == "c"


# --- nothing vanishes: the files of test_shapes, in the shapes that people have -------------------------

HUNT = Path(__file__).parent / "data" / "hunt"
NO_TEXT = {"label", "ranks", "scores", "subset"}  # of a row: numbers, which may be written as text
NO_CONTENT = ("role", "type", "name", "model", "Rating")  # of a message


def texts_of(value: Any, key: str = "") -> Iterator[str]:
    """The texts in a row, of JSON text and transcripts those in it, without roles and types."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from texts_of(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part, key)
    elif isinstance(value, str) and key not in NO_CONTENT:
        if value.startswith("["):
            yield from texts_of(json.loads(value))
        else:
            yield from (said.strip() for said in re.split(r"(?:^|\n+)(?:Human|Assistant):", value))


def test_every_text_of_a_row_is_in_its_comparison_or_its_column_is_named():
    looked_at = 0
    for path in sorted(HUNT.glob("*.jsonl")):
        try:
            split = load_split(DataArguments(dataset_name=str(path)), None)
        except DataError:
            continue
        if not split.shapes[0].startswith(("TRL", "whole")):  # the others hold names, too
            continue
        rows = path.read_text(encoding="utf-8-sig").split("\n")
        for number in range(len(split.comparisons)):
            comparison = split[number]
            read = json.dumps([comparison.prompt, comparison.responses], ensure_ascii=False)
            row = json.loads(rows[split.comparisons[number]["row"] - 1])
            for key in row.keys() - {*split.unread} - NO_TEXT:
                for text in texts_of(row[key], key):
                    assert json.dumps(text, ensure_ascii=False)[1:-1] in read, path
                    looked_at += 1
    assert looked_at > 300
