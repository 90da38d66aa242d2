"""Files are whole or not there, and pass on no token, password or name of the user's home."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_recipe
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe import RewardModel, cli
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.files import (
    expanded,
    hide_secrets,
    locked,
    read_json,
    read_json_lines,
    redact,
    redacted,
    whole_folder,
    with_tilde,
    write_json,
)
from rm_recipe.recipe.reader import read_recipe, read_run_recipe, saved_values
from rm_recipe.training.run_folder import changed_keys
from rm_recipe.training.train import train

TOKEN = "hf_" + "aB3" * 11 + "x"


def test_a_folder_takes_the_old_ones_place_when_it_is_finished_and_else_leaves_it(tmp_path):
    target = tmp_path / "export"
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / text).write_text(text)
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "third").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"loss": 0.5})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"{", "is not JSON"), (b"[1]", "holds no JSON object"), (b'{"a": "\xff"}', "cannot be read")],
)
def test_a_file_or_line_that_is_no_json_object_is_named(tmp_path, content, fault):
    (tmp_path / "one.json").write_bytes(content)
    (tmp_path / "lines.jsonl").write_bytes(b"{}\n\n" + content + b"\n")
    with pytest.raises(RecipeError, match=f"one.json {fault}"):
        read_json(tmp_path / "one.json")
    place = "lines.jsonl" if "cannot" in fault else "lines.jsonl, line 3"
    with pytest.raises(RecipeError, match=f"{place} {fault}"):
        read_json_lines(tmp_path / "lines.jsonl")


def test_what_was_written_is_read_back_whatever_it_holds(tmp_path):
    write_json(tmp_path / "a.json", {"text": "\u2028 \x85 ü", "n": None})
    assert read_json(tmp_path / "a.json") == {"text": "\u2028 \x85 ü", "n": None}
    (tmp_path / "b.jsonl").write_text('{"text": "\u2028"}\n{"n": 1}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "b.jsonl") == [{"text": "\u2028"}, {"n": 1}]


HOLDS = """
import sys
from pathlib import Path
from rm_recipe.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_for_other_processes_until_the_holder_ends_or_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="another process is at work in"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


# --- redaction ---------------------------------------------------------------------------------


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    """A home folder, and a token in the environment that no pattern knows."""
    home = tmp_path / "home" / "ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "not-of-any-known-form")
    return home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in /home/ann, '/home/ann' and (/home/ann/x).", "in ~, '~' and (~/x)."),
        ("a=/home/ann/x:/home/ann/y file:///home/ann/z", "a=~/x:~/y file://~/z"),
        ("/home/annfs /home/ann2/x /home/ann-x /home/ann.old /home/ann_x", None),
        ("https://example.org/home/ann/x", None),
    ],
)
def test_the_home_folder_is_a_tilde_where_it_is_whole_components_of_a_path(monkeypatch, text, expected):
    for home in ("/home/ann", "/home/ann/"):
        monkeypatch.setenv("HOME", home)
        assert redact(text) == (expected or text)


@pytest.mark.parametrize("home", [None, "/", "relative"])
def test_without_a_home_of_its_own_nothing_is_replaced(monkeypatch, home):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    text = "/home/ann/a /etc/x relative/y . ./z"
    assert redact(text) == text
    assert with_tilde([text, "/", "/a", "relative"]) == [text, "/", "/a", "relative"]


def test_a_home_that_is_a_link_is_replaced_by_both_names(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert redact(f"{tmp_path}/link/a {tmp_path}/real/b") == "~/a ~/b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://user:{TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://user:pass%20word@host:8080/a?b=c@d", "https://***@host:8080/a?b=c@d"),
        ("ghp_" + "a1" * 18, "***"),
        ("sk-" + "aB3" * 16 + " x", "*** x"),
        ("sk-ant-api03-" + "Zx9" * 20, "***"),
        ("data/sk-preferences-helpful-and-harmless.jsonl", None),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("not-of-any-known-form!", "***!"),
        ("hf_transfer hf_xet HF_TOKEN ann@example.org https://example.org:80/a@b", None),
        ("ssh://git@host/x is a name alone; sk-learn", None),
    ],
)
def test_tokens_and_passwords_are_hidden_and_what_only_looks_like_them_is_not(at_home, text, expected):
    assert redact(text) == (text if expected is None else expected)


LEAVES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(JSON)
def test_what_has_nothing_to_hide_stays_as_it_is(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/home/nobody-has-this-name")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        assert redacted(content) == content
        assert expanded(with_tilde({"a": content, "b": "/home/nobody-has-this-name/x"})) == {
            "a": expanded(content),
            "b": "/home/nobody-has-this-name/x",
        }


def test_json_is_redacted_in_keys_and_values_and_read_back(at_home, tmp_path):
    content = {f"{at_home}/a.jsonl": [{"x": f"{at_home}/b", "n": 1.5, "t": TOKEN}], "none": None}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == {"~/a.jsonl": [{"x": "~/b", "n": 1.5, "t": "***"}], "none": None}


def test_a_message_is_redacted(at_home, capsys):
    with pytest.raises(SystemExit):
        cli.fail(f"{at_home}/x does not exist; {TOKEN} not-of-any-known-form https://a:b@host", 2)
    assert capsys.readouterr().err == "rm-recipe: ~/x does not exist; *** *** https://***@host\n"


# --- recipes ---------------------------------------------------------------------------------


@pytest.fixture
def recipe_at_home(at_home, tiny_llama, tiny_data):
    """A recipe whose model, data and run lie in the home folder."""
    shutil.copytree(tiny_llama, at_home / "model")
    shutil.copytree(tiny_data, at_home / "data")
    keys = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4, "max_length": 400}
    return make_recipe(at_home, at_home / "model", at_home / "data", **keys)


def test_a_recipe_may_name_paths_in_the_home_folder_by_a_tilde(recipe_at_home, at_home, tmp_path):
    (at_home / "t.jinja").write_text("{{ messages }}")
    values = yaml.safe_load(recipe_at_home.read_text())
    values |= {"model_name_or_path": "~/model", "output_dir": "~/run", "chat_template_path": "~/t.jinja"}
    values["datasets"] = [{"path": "~/data"}]
    del values["dataset_name"]
    recipe_at_home.write_text(yaml.safe_dump(values))
    recipe = read_recipe(recipe_at_home)
    assert recipe.output_dir == at_home / "run"
    assert recipe.model.model_name_or_path == str(at_home / "model")
    assert recipe.training.chat_template_path == str(at_home / "t.jinja")
    assert recipe.data.datasets == [{"path": str(at_home / "data")}]
    assert read_recipe(recipe_at_home, ["--output_dir=~/other"]).output_dir == at_home / "other"
    with pytest.raises(RecipeError, match="home/ann/gone' does not exist"):
        read_recipe(recipe_at_home, ["--model_name_or_path", "~/gone"])


def test_a_saved_recipe_names_no_home_and_is_the_same_recipe(recipe_at_home, at_home, monkeypatch):
    recipe = read_recipe(recipe_at_home)
    run = at_home / "run"
    run.mkdir()
    recipe.save(run / "recipe.yaml")
    text = (run / "recipe.yaml").read_text()
    assert str(at_home) not in text
    assert "model_name_or_path: ~/model\n" in text
    assert saved_values(run)["dataset_name"] == str(at_home / "data")
    assert not changed_keys(recipe, run)
    assert read_run_recipe(run).model.model_name_or_path == str(at_home / "model")
    assert read_recipe(run / "recipe.yaml").resolved() == recipe.resolved()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_name", f"https://ann:{TOKEN}@host/x"),
        ("hub_model_id", "not-of-any-known-form/x"),
        ("datasets", [{"path": f"{TOKEN}/x"}]),
    ],
)
def test_a_recipe_that_holds_a_token_is_refused_without_showing_it(at_home, write_recipe, key, value):
    with pytest.raises(RecipeError, match="holds a token or a password; log in with") as caught:
        read_recipe(write_recipe(**{key: value}), check_inputs=False)
    assert hide_secrets(str(caught.value)) == str(caught.value)


# --- a whole run -----------------------------------------------------------------------------


def names_home(folder: Path, home: Path) -> set[str]:
    """The files in which the home folder is named, or a token."""
    needles = ("-e", str(home), "-e", TOKEN, "-e", "not-of-any-known-form")
    found = subprocess.run(
        ["grep", "-rlaF", *needles, str(folder)], capture_output=True, text=True, check=False
    )
    return {str(Path(line).relative_to(folder)) for line in found.stdout.splitlines()}


def test_a_run_in_the_home_folder_names_it_only_where_the_base_is_looked_for(recipe_at_home, at_home):
    run, other = at_home / "run", at_home / "data" / "test.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    rows[0]["chosen"] += f" {at_home} {TOKEN}"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(read_recipe(recipe_at_home))
    evaluate(str(run))
    for _ in range(2):  # the second time in place of the first, though its name was redacted
        content = evaluate(str(run), [str(other)], against=str(run))
    export(run)
    assert str(other) in content["datasets"]
    kept = read_json(run / "evaluation.json")
    assert list(kept["datasets"]) == ["held_out", "~/data/test.jsonl"]
    assert (kept["model"], kept["base"]) == ("~/run", "~/model")
    assert kept["datasets"]["~/data/test.jsonl"]["against"]["model"] == "~/run"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["held_out"] * 40 + ["~/data/test.jsonl"] * 40
    files = {name for name in names_home(run, at_home) if not name.endswith("training_args.bin")}
    assert {Path(name).name for name in files} == {"adapter_config.json"}
    assert not list(run.rglob("model/README.md"))
    card = (run / "export" / "README.md").read_text()
    assert 'model = "~/run/export"' in card
    assert "write it out" in card
    # Everything is found again.
    assert RewardModel.from_pretrained(run).score([{"prompt": "hello", "response": "good"}]).shape == (1,)
