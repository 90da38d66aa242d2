"""Nothing that is written to be read passes on a token, a password or where the user's home is."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import make_recipe, run_cli
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe import RewardModel, cli
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.report import write_report
from rm_recipe.exporting.export import export
from rm_recipe.files import expanded, hide_secrets, read_json, redact, redacted, with_tilde, write_json
from rm_recipe.recipe.reader import read_recipe, read_run_recipe, saved_values
from rm_recipe.tools.pipeline import run as run_recipe
from rm_recipe.training.run_folder import changed_keys
from rm_recipe.training.train import train

TOKEN = "hf_" + "aB3" * 11 + "x"


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
        ("/root/data/a.jsonl", "~/data/a.jsonl"),
        ("in /root, '/root' and (/root/x).", "in ~, '~' and (~/x)."),
        ("It is /root.", "It is ~."),
        ("a=/root/x:/root/y file:///root/z", "a=~/x:~/y file://~/z"),
        ("/rootfs /root2/x /root-x /root.old /root_x", "/rootfs /root2/x /root-x /root.old /root_x"),
        ("/data/root/x ./root ~/root a/root", "/data/root/x ./root ~/root a/root"),
        ("https://example.org/root/x", "https://example.org/root/x"),
        ("root and Root/x", "root and Root/x"),
    ],
)
def test_the_home_folder_is_a_tilde_where_it_is_whole_components_of_a_path(monkeypatch, text, expected):
    monkeypatch.setenv("HOME", "/root")
    assert redact(text) == expected
    monkeypatch.setenv("HOME", "/root/")
    assert redact(text) == expected


@pytest.mark.parametrize("home", [None, "", "/", "//", "relative", "."])
def test_without_a_home_of_its_own_nothing_is_replaced(monkeypatch, home):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    text = "/root/a /etc/x relative/y . ./z"
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
        (f"token {TOKEN}.", "token ***."),
        (f'{{"a": "{TOKEN}"}}', '{"a": "***"}'),
        (f"https://user:{TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://user:pass%20word@host:8080/a?b=c@d", "https://***@host:8080/a?b=c@d"),
        ("http://:secret@proxy", "http://***@proxy"),
        ("ghp_" + "a1" * 18, "***"),
        ("sk-" + "aB3" * 16 + " x", "*** x"),
        ("sk-proj-" + "aB3_" * 3 + "aB3" * 12 + "-_c", "***"),
        ("sk-proj-Zr_9-" + "aB3" * 4 + "_" + "Cd4" * 5 + "-" + "Xy7" * 5, "***"),
        ("sk-svcacct-" + "aB3_" * 30, "***"),
        ("sk-ant-api03-" + "Zx9" * 20, "***"),
        ("sk-or-v1-" + "0af3" * 16, "***"),
        ("hf_" + "aBcDeFgH" * 4 + "xy", "***"),
        ("data/sk-preferences-helpful-and-harmless.jsonl", None),
        ("outputs/sk-SmolLM2-135M-Instruct-helpful-harmless-2024-11-05", None),
        ("sk-preferencesofpeople20242025inslovak hf_datasetsofpreferencesofpeople", None),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("not-of-any-known-form!", "***!"),
        ("hf_transfer hf_xet HF_TOKEN ann@example.org https://example.org:80/a@b", None),
        ("ssh://git@host/x is a name alone; sk-learn", None),
        ("at 12:30 http://host/a:b@c", None),
    ],
)
def test_tokens_and_passwords_are_hidden_and_what_only_looks_like_them_is_not(at_home, text, expected):
    assert redact(text) == (text if expected is None else expected)


def test_a_value_too_short_for_a_token_hides_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redact("a banana") == "a banana"


def test_the_other_variable_for_the_token_counts_too(monkeypatch):
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "another-secret ")
    assert redact("it is another-secret") == "it is ***"


@given(st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.text(), inner))))  # fmt: skip
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


def test_a_report_of_files_that_were_not_redacted_is(at_home, tmp_path):
    name = f"{at_home}/a.jsonl"
    figures = {"accuracy": 0.5, "n_scored": 1, "subsets": {TOKEN: {"n": 1, "accuracy": 0.5}}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"model": name, "datasets": {name: figures}}))
    line = {"dataset": name, "rewards": [1.0, 2.0], "ranks": [0, 1], "margin": -1.0, "shown": "mistake"}
    prompt = [{"role": "user", "content": f"my token {TOKEN}"}]
    line["text"] = {"prompt": prompt, "responses": [f"see {at_home}", "https://a:b@host"]}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {at_home}/m\n")
    page = write_report(tmp_path).read_text()
    assert str(at_home) not in page
    assert TOKEN not in page
    assert "a:b@" not in page
    for shown in ("~/a.jsonl", "my token ***", "see ~", "https://***@host", "model_name_or_path: ~/m"):
        assert shown in page


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
        ("run_name", TOKEN),
        ("hub_model_id", "not-of-any-known-form/x"),
        ("datasets", [{"path": f"{TOKEN}/x"}]),
    ],
)
def test_a_recipe_that_holds_a_token_is_refused_without_showing_it(at_home, write_recipe, key, value):
    with pytest.raises(RecipeError, match=f"'{key}' holds a token or a password; log in with") as caught:
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


def test_a_run_in_the_home_folder_names_it_only_where_the_base_is_looked_for(
    recipe_at_home, at_home, monkeypatch
):
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
    assert (
        "Most confident" in (run / "report.html").read_text()
        or "Closest" in (run / "report.html").read_text()
    )
    files = {name for name in names_home(run, at_home) if not name.endswith("training_args.bin")}
    assert {Path(name).name for name in files} == {"adapter_config.json"}
    assert not list(run.rglob("model/README.md"))
    card = (run / "export" / "README.md").read_text()
    assert 'model = "~/run/export"' in card
    assert "write it out" in card
    # Everything is found again.
    assert RewardModel.from_pretrained(run).score([{"prompt": "hello", "response": "good"}]).shape == (1,)


def test_stages_that_are_finished_are_skipped_in_the_home_folder_too(
    recipe_at_home, at_home, monkeypatch, capsys
):
    recipe = read_recipe(recipe_at_home)
    train(recipe)
    evaluate(str(at_home / "run"))
    export(at_home / "run")
    capsys.readouterr()
    run_recipe(recipe_at_home, [])
    out = capsys.readouterr().out
    assert out.count("finished already, skipped") == 3


def test_an_interrupted_run_in_the_home_folder_is_resumed(recipe_at_home, at_home):
    recipe = read_recipe(recipe_at_home)
    train(recipe)
    (at_home / "run" / "run.json").unlink()
    train(read_recipe(recipe_at_home), resume=True)
    assert (at_home / "run" / "run.json").is_file()


def test_exported_from_the_folder_above_it_the_card_says_how_it_is_found_from_there(
    recipe_at_home, at_home, monkeypatch
):
    train(read_recipe(recipe_at_home))
    monkeypatch.chdir(at_home)
    export(at_home / "run")
    card = (at_home / "run" / "export" / "README.md").read_text()
    assert 'model = "run/export"' in card
    assert "write it out" not in card


def test_the_command_line_says_a_path_at_home_with_a_tilde(at_home):
    result = run_cli("score", str(at_home / "gone"), "--prompt", "a", "--response", "b")
    assert result.returncode == 2
    assert "~/gone does not exist" in result.stderr
    assert str(at_home) not in result.stderr
