"""What the card says is in the files, what it shows runs, and the Hub's own classes can read it."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import warnings

import pytest
import yaml
from conftest import make_recipe
from huggingface_hub import ModelCard
from made_up_export import make_export, prove, write
from markdown_it import MarkdownIt

from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.card import adapter_card, for_repository, write_card
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import RUN_HEADER, read_recipe
from rm_recipe.tools import offline
from rm_recipe.training.train import train


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_llama, tiny_data):
    """A finished run's export."""
    folder = tmp_path_factory.mktemp("card")
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, num_train_epochs=1)))
    evaluate(str(folder / "run"))
    export(folder / "run")
    return folder / "run" / "export"


def blocks(card, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def output_of(snippet):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    return printed.getvalue()


def test_the_snippets_give_the_rewards_that_the_card_says(exported):
    card = (exported / "README.md").read_text()
    [by_pipeline, by_model], [said] = blocks(card, "python"), blocks(card, "text")
    expected = [float(line) for line in said.split()]
    assert len(expected) == 3
    assert [float(line) for line in output_of(by_pipeline).split()] == pytest.approx(expected, abs=1e-3)
    found = [float(number) for number in re.findall(r"-?\d+\.\d+", output_of(by_model))]
    assert found == pytest.approx(expected[:2], abs=1e-3)
    proof = json.loads((exported / "proof.json").read_text())
    assert expected == pytest.approx([sample["reward"] for sample in proof["samples"]], abs=1e-3)


def test_the_hubs_classes_find_the_accuracy_in_it(exported):
    figures = json.loads((exported / "evaluation.json").read_text())["datasets"]["held_out"]
    card = ModelCard.load(exported / "README.md")
    [result] = card.data.eval_results
    assert result.metric_value == pytest.approx(figures["accuracy"], abs=1e-4)
    assert result.metric_args["ci95"] == pytest.approx(figures["accuracy_ci95"], abs=1e-4)
    assert result.metric_args["comparisons"] == 40
    assert (result.metric_type, result.dataset_split, result.dataset_type) == (
        "accuracy",
        "test",
        "preferences",
    )
    assert card.data.pipeline_tag == "text-classification"
    assert "reward-model" in card.data.tags
    assert f"| held out | {figures['accuracy']:.3f} |" in card.text
    assert "](reliability.png)" in card.text
    assert (exported / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_local_is_no_id_on_the_hub(exported, tiny_data):
    card = ModelCard.load(exported / "README.md")
    assert card.data.datasets is None
    assert card.data.base_model is None
    assert card.data.license is None
    front = card.content.split("---")[1]
    assert str(tiny_data.parent) not in front


def test_a_server_can_be_asked_as_the_card_says(exported):
    card = (exported / "README.md").read_text()
    [served] = blocks(card, "bash")
    body = json.loads(shlex.split(served.splitlines()[1])[-1])
    [first, *_] = json.loads((exported / "proof.json").read_text())["samples"]
    assert body["input"] == first["text"]
    assert body["model"] == str(exported)
    assert body["use_activation"] is body["add_special_tokens"] is False


def made_up(tmp_path, **keys):
    folder = make_export(tmp_path)
    (folder / "reliability.png").unlink()
    path = folder.parent / "recipe.yaml"
    write(path, f"# a run{RUN_HEADER}\n{json.dumps(yaml.safe_load(path.read_text()) | keys)}\n")
    write_card(folder, folder.parent, "outputs/x/export")
    return folder, ModelCard.load(folder / "README.md")


def test_hub_ids_of_data_and_base_are_linked(tmp_path):
    _, card = made_up(
        tmp_path, dataset_name="Anthropic/hh-rlhf", dataset_subsets=["helpful-base"], dataset_revision="v1"
    )
    assert card.data.datasets == ["Anthropic/hh-rlhf"]
    assert card.data.base_model == "bob/base"
    [result] = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_revision) == (
        "Anthropic/hh-rlhf", "helpful-base", "v1",
    )  # fmt: skip
    assert "[bob/base](https://huggingface.co/bob/base)" in card.text
    assert "offensive" in card.text


def test_the_licence_and_origin_of_a_local_base_are_its_own_cards(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "README.md", "---\nbase_model: big/base\nlicense: mit\n---\n")
    _, card = made_up(tmp_path, model_name_or_path=str(tmp_path / "base"))
    assert (card.data.base_model, card.data.license) == ("big/base", "mit")


def test_the_origin_and_the_language_of_the_base_are_said(tmp_path):
    (tmp_path / "base").mkdir()
    offline.write_origin(tmp_path / "base", "big/base", "Taken out of a wheel (GGUF, Q4_1) and de-quantised.")
    _, card = made_up(tmp_path, model_name_or_path=str(tmp_path / "base"))
    assert card.data.language == ["en"]
    assert "The base: Taken out of a wheel (GGUF, Q4_1) and de-quantised." in card.text
    assert "Language: en " in card.text


def test_how_ppo_is_used_is_said(exported):
    text = " ".join((exported / "README.md").read_text().split())
    proof = json.loads((exported / "proof.json").read_text())
    assert proof["contracts"]["ppo"] is True
    assert "they pad with `<unk>`, this model's pad token" in text
    assert "a reply ends with `</s>`, so that the policy stops there. One that is cut" in text
    assert "`missing_eos_penalty`" in text


def test_where_ppo_scores_other_ids_the_card_says_why(tmp_path):
    folder = make_export(tmp_path)
    prove(folder, contracts={"ppo": None}, ppo_reason="its template thinks aloud")
    write_card(folder, folder.parent, "x")
    text = " ".join((folder / "README.md").read_text().split())
    assert "**Not for PPO trainers**" in text
    assert "is null): its template thinks aloud." in text
    assert "missing_eos_penalty" not in text


def test_another_end_token_than_eos_has_to_be_set(tmp_path):
    folder = make_export(tmp_path)
    prove(folder, end_token="<|im_end|>")
    write_card(folder, folder.parent, "x")
    text = " ".join((folder / "README.md").read_text().split())
    assert "ends with `<|im_end|>`, so that the policy stops there (this tokenizer's `eos_token` is" in text


def test_how_to_cut_and_which_transformers_is_said(exported):
    text = " ".join((exported / "README.md").read_text().split())
    assert "at most 128 tokens" in text
    assert '`truncation=True, max_length=128`, with `truncation_side="left"`' in text
    assert "transformers 4.57 and 5 read it alike." in text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "x", "rope_parameters": {"full_attention": {}}}, "It needs transformers 5"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, 'add `attn_implementation="eager"`'),
    ],
)
def test_what_transformers_4_reads_otherwise_is_said(tmp_path, keys, said):
    folder = make_export(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | keys)
    write_card(folder, folder.parent, "x")
    assert said in (folder / "README.md").read_text()


def test_a_model_that_must_be_padded_right_says_so(tmp_path):
    _, card = made_up(tmp_path)
    assert "**Pad on the right.**" in card.text
    assert "| padding on the left | not possible |" in card.text


def test_without_an_evaluation_nothing_is_claimed(tmp_path):
    folder = make_export(tmp_path)
    (folder / "evaluation.json").unlink()
    write_card(folder, folder.parent, "x")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None
    assert "has not been evaluated" in card.text


def test_on_the_hub_the_snippets_load_from_there_and_edits_are_kept(tmp_path):
    _, card = made_up(tmp_path)
    text = card.content + "\nWords of my own on outputs/x/export.\n"
    pushed = for_repository(text, "ann/judge")
    assert '"outputs/x/export"' not in pushed
    assert pushed.count('"ann/judge"') == card.content.count('"outputs/x/export"') >= 4
    assert pushed.endswith("Words of my own on outputs/x/export.\n")


def test_a_short_folder_name_is_replaced_as_a_name_only(tmp_path):
    folder = make_export(tmp_path)
    write_card(folder, folder.parent, "model")
    pushed = for_repository((folder / "README.md").read_text(), "ann/judge")
    assert pushed.startswith("---\nbase_model")
    assert "reward model" in pushed
    [by_pipeline, *_] = blocks(pushed, "python")
    assert 'model = "ann/judge"\njudge = pipeline("text-classification", model=model)' in by_pipeline


def test_the_adapters_card_is_about_the_adapter(tmp_path):
    folder, _ = made_up(tmp_path)
    card = ModelCard(adapter_card(folder, folder.parent, "ann/adapter"))
    assert card.data.library_name == "peft"
    assert card.data.base_model == "bob/base"
    [snippet] = blocks(card.text, "python")
    assert 'model = "ann/adapter"' in snippet
    assert "RewardModel.from_pretrained(model)" in snippet
    assert "pipeline(" not in card.text


def test_the_card_of_the_same_files_is_the_same(exported, tmp_path):
    shutil.copytree(exported.parent, tmp_path / "run")
    write_card(tmp_path / "run" / "export", tmp_path / "run", str(exported))
    assert (tmp_path / "run" / "export" / "README.md").read_text() == (exported / "README.md").read_text()


def test_the_hub_library_has_nothing_to_warn_of(exported):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelCard.load(exported / "README.md")


HOSTILE = (
    "a` | [x](javascript:alert(1)) ![i](http://t/x.png) <script>alert(1)</script>\n---\n# big\n\n```\n"
    "$(id)\"\\</details> <!-- 'q'"
)


@pytest.fixture
def hostile(tmp_path):
    """The card of a run in which every name that somebody else may have chosen does its worst."""
    folder = make_export(tmp_path)
    figures = {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "n_scored": 40, "beats_baselines": True,
               "baselines": {HOSTILE: 0.6}, "consistency": {HOSTILE: {"wins": 0.5}},
               "against": {"model": HOSTILE, "difference": 0.1, "other_accuracy": 0.5}}  # fmt: skip
    evaluation = json.loads((folder / "evaluation.json").read_text())
    write(folder / "evaluation.json", evaluation | {"datasets": {"held_out": figures, HOSTILE: figures}})
    (tmp_path / "base").mkdir()
    front = json.dumps({"base_model": "x](javascript:alert(1)) <b>", "license": HOSTILE})
    write(tmp_path / "base" / "README.md", f"---\n{front}\n---\n")
    path, record = folder.parent / "recipe.yaml", folder.parent / "run.json"
    keys = {"dataset_name": HOSTILE, "dataset_subsets": [HOSTILE], "dataset_revision": HOSTILE,
            "dataset_test_split": HOSTILE, "datasets": [{"path": HOSTILE}],
            "model_name_or_path": str(tmp_path / "base")}  # fmt: skip
    write(path, f"# a run{RUN_HEADER}\n{json.dumps(yaml.safe_load(path.read_text()) | keys)}\n")
    write(record, json.loads(record.read_text()) | {"device": HOSTILE, "versions": {"torch": HOSTILE}})
    run = folder.parent.rename(tmp_path / HOSTILE.replace("/", ""))
    write_card(run / "export", run, HOSTILE)
    return run / "export"


def test_names_that_somebody_else_chose_do_nothing_in_the_card(hostile):
    card = ModelCard.load(hostile / "README.md")
    assert card.text.lstrip().startswith("# a\\`")  # no `---` of a name's has ended the front matter
    assert card.data.base_model is None
    assert card.data.license is None
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    inner = [child for token in tokens for child in token.children or []]
    assert not {"html_block"} & {token.type for token in tokens}
    assert not {"html_inline", "link_open"} & {child.type for child in inner}
    assert [child.attrs["src"] for child in inner if child.type == "image"] == ["reliability.png"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == [
        "How good it is", "Use", "Serve", "How it was proven", "Training", "Intended use and limits"
    ]  # fmt: skip
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "text", "python", "bash"]
    widths = re.findall(
        r"(?:td_open ?)+", " ".join(t.type for t in tokens if t.type in ("td_open", "tr_close"))
    )
    assert {width.count("td_open") for width in widths} == {2, 6}


def test_the_snippets_name_a_model_of_any_name_as_a_text_and_no_program(hostile):
    card = (hostile / "README.md").read_text()
    for snippet in blocks(card, "python"):
        [named] = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Assign)][:1]
        assert ast.literal_eval(named.value) == HOSTILE
    [served] = blocks(card, "bash")
    words = shlex.split(served)
    assert words[:3] == ["vllm", "serve", " ".join(HOSTILE.split())]
    assert json.loads(words[words.index("-d") + 1])["model"] == HOSTILE
    assert "$(id)" not in re.sub(r"'[^']*'", "", served)  # but in single quotes


def test_a_model_of_any_name_has_another_on_the_hub(hostile):
    pushed = for_repository((hostile / "README.md").read_text(), "ann/judge")
    assert 'vllm serve "ann/judge" --runner' in pushed
    assert 'reward_funcs="ann/judge"' in pushed
    assert all('model = "ann/judge"\n' in snippet for snippet in blocks(pushed, "python"))
