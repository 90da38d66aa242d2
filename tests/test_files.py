"""Files are whole or not there, and pass on no token, password or name of the user's home."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_recipe, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe import RewardModel, cli
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.files import hide_secrets, read_json, read_json_lines, redact, whole_folder, write_json
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.run_folder import changed_keys
from rm_recipe.training.train import train

HF_TOKEN = "hf_" + "aB3" * 11 + "x"


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


LEAVES = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.dictionaries(st.text(), JSON))
def test_what_has_nothing_to_hide_is_read_back_as_it_is_and_nan_leaves_the_old(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "written" / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/home/nobody-has-this-name")
        write_json(path, content)
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == content
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    path.with_suffix(".jsonl").write_text(f'{json.dumps(content, ensure_ascii=False)}\n{{"n": 1}}\n', "utf-8")
    assert read_json_lines(path.with_suffix(".jsonl")) == [content, {"n": 1}]
    path.with_suffix(".jsonl").unlink()


@pytest.mark.parametrize(("content", "fault"), [(b"{", "not JSON"), (b"[1]", "holds no"), (b"\xff", "utf-8")])
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content, fault):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RecipeError, match=f"a.json .*{fault}"):
        read_json(tmp_path / "a.json")


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
        (f"https://user:{HF_TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://user:pass%20word@host:8080/a?b=c@d", "https://***@host:8080/a?b=c@d"),
        (f"{HF_TOKEN} not-of-any-known-form!", "*** ***!"),
        ("/home/annfs /home/ann-x /home/ann.old /home/ann_x https://example.org/home/ann/x", None),
        ("hf_transfer HF_TOKEN ann@example.org https://example.org:80/a@b ssh://git@host/x", None),
    ],
)
def test_secrets_and_the_home_folder_are_hidden_and_what_only_looks_like_them_is_not(
    at_home, monkeypatch, text, expected
):
    for home in ("/home/ann", "/home/ann/"):
        monkeypatch.setenv("HOME", home)
        assert redact(text) == (expected or text)


@pytest.mark.parametrize("home", [None, "/"])
def test_without_a_home_of_its_own_nothing_is_replaced(monkeypatch, home):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    text = "/home/ann/a /etc/x relative/y . ./z"
    assert redact(text) == text


def test_a_message_is_redacted(at_home, capsys):
    with pytest.raises(SystemExit):
        cli.fail(f"{at_home}/x does not exist; {HF_TOKEN} not-of-any-known-form https://a:b@host", 2)
    assert capsys.readouterr().err == "rm-recipe: ~/x does not exist; *** *** https://***@host\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_name", f"https://ann:{HF_TOKEN}@host/x"),
        ("hub_model_id", "not-of-any-known-form/x"),
        ("datasets", [{"path": f"{HF_TOKEN}/x"}]),
    ],
)
def test_a_recipe_that_holds_a_token_is_refused_without_showing_it(at_home, write_recipe, key, value):
    with pytest.raises(RecipeError, match="holds a token or a password; log in with") as caught:
        read_recipe(write_recipe(**{key: value}), check_inputs=False)
    assert hide_secrets(str(caught.value)) == str(caught.value)


def test_a_run_in_the_home_folder_names_it_only_where_the_base_is_looked_for(at_home, tiny_llama, tiny_data):
    """By a recipe that names its folders by `~`."""
    shutil.copytree(tiny_llama, at_home / "model")
    shutil.copytree(tiny_data, at_home / "data")
    run, other = at_home / "run", at_home / "data" / "test.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    rows[0]["chosen"] += f" {at_home} {HF_TOKEN}"
    write_jsonl(other, rows)
    keys = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4, "max_length": 400}
    keys |= {"dataset_name": "omit", "datasets": [{"path": "~/data"}], "output_dir": "~/run"}
    recipe = read_recipe(make_recipe(at_home, Path("~/model"), tiny_data, **keys))
    train(recipe)
    assert not changed_keys(recipe, run)
    assert read_recipe(run / "recipe.yaml").resolved() == recipe.resolved()
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
    texts = [text.encode() for text in (str(at_home), HF_TOKEN, "not-of-any-known-form")]
    files = [path for path in run.rglob("*") if path.is_file()]
    named = {path.name for path in files if any(text in path.read_bytes() for text in texts)}
    assert named == {"adapter_config.json"}
    assert not list(run.rglob("model/README.md"))
    card = (run / "export" / "README.md").read_text()
    assert 'model = "~/run/export"' in card
    assert "write it out" in card
    # Everything is found again.
    assert RewardModel.from_pretrained(run).score([{"prompt": "hello", "response": "good"}]).shape == (1,)
