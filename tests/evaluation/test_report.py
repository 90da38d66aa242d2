"""The page says what the files say, whatever text stands in them, and asks nobody for anything."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from conftest import make_recipe, save_classifier, set_keys, write_jsonl

from rm_recipe.evaluation import plots
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.findings import HELD_OUT, gate, gate_words, readings
from rm_recipe.evaluation.format import MISSING, decimal, interval, p_value, share, whole
from rm_recipe.evaluation.report import print_evaluation, write_report
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = '"</pre></details><img src=x onerror=alert(1)><!-- {{ 7 * 7 }} \x1b\u202e'


class Page(HTMLParser):
    """What a browser would make of a page: its ids, its addresses, its text, and whether all tags close."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open, self.text, self.found = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.found.append((tag, *known))
        self.ids += [known["id"]] if "id" in known else []
        self.addresses += [known[key] for key in ("src", "href", "xlink:href", "action") if key in known]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(folder):
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_llama, tiny_base, tiny_data):
    """A run, evaluated on what it holds out and on rankings with subsets, and compared with another model.

    Whoever named it, and wrote the rankings, means no good.
    """
    folder = tmp_path_factory.mktemp('"><b onclick=alert(1)>')
    other = save_classifier(folder / "other", tiny_base("gpt2"))
    keys = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 8, "num_train_epochs": 2}
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, **keys)))
    replies, subsets = ["good good", "no no good bad", "bad <script>"], ["one", HOSTILE]
    rankings = [
        {
            **{"prompt": f"hello {n}{' how are you' * (n % 3)} {HOSTILE}", "subset": subsets[n % 2]},
            **{"responses": replies, "ranks": [0, 1, 2] if n % 9 else [2, 1, 0]},
        }
        for n in range(60)
    ]
    rankings[0]["responses"] = ["", "bad", "good"]
    path = write_jsonl(folder / "<img src=x onerror=alert(1)>.jsonl", rankings)
    evaluate(str(folder / "run"), [HELD_OUT, str(path)], against=str(other))
    return folder / "run", *read(folder / "run")


@pytest.fixture
def folder(full, tmp_path):
    """A copy of its files."""
    ignore = shutil.ignore_patterns("model", "export", "checkpoint-*")
    return shutil.copytree(full[0], tmp_path / "run", ignore=ignore)


def test_a_finished_run_gives_every_section_with_every_figure(full):
    folder, text, page = full
    assert {"headline", "overview", "details", "training", "data", "run", "words"} <= set(page.ids)
    titles = """All data sets|Rewards|Margins|Calibration|Accuracy by length difference|Baselines|Rankings
    Subsets|Number of turns|Length of the prompt|Length bias|Edits that should not matter|Left out
    Most confident mistakes|Closest calls|Over the steps|What is used|What repeats|How long it is
    Cost|Versions"""
    for title in re.split(r"\||\n\s+", titles):
        assert f"<h3>{title}</h3>" in text
    assert "<h3>Against " in text
    # A figure that the template asks for by a wrong name would be a dash.
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", text)
    assert len(cells) > 200
    assert cells.count(MISSING) == 0
    assert page.words.count("the model prefers it") > 10
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = evaluation["datasets"][HELD_OUT]
    low, high = figures["accuracy_ci95"]
    assert f"{figures['accuracy']:.3f} held-out accuracy" in page.words
    assert f"95 % interval {low:.3f} to {high:.3f} , 40 comparisons" in page.words
    assert gate_words(evaluation["gate"])["verdict"] in page.words


def test_a_missing_file_leaves_its_section_out(folder):
    for missing in ("run.json", "data_report.json", "predictions.jsonl"):
        (folder / missing).unlink()
    datasets = json.loads((folder / "evaluation.json").read_text())["datasets"]
    del datasets[HELD_OUT]
    set_keys(folder / "evaluation.json", datasets=datasets)
    text, page = read(folder)
    assert not {"training", "data", "overview"} & set(page.ids)
    assert "Closest calls" not in text
    assert 'class="big"' not in text
    assert text.count("<h3>All data sets</h3>") == 1  # in place of the headline


def test_the_page_counts_leaked_first_turns_where_leakage_goes_by_them(folder):
    """It spoke of 30 comparisons on 0 held-out prompts, and of none where first turns alone are shared."""
    leakage = {"prompts": 0, "first_turns": 7, "policy": "drop", "by": "first_turn", "comparisons": 30}
    set_keys(folder / "data_report.json", leakage=leakage)
    assert "30 training comparisons stand on 7 held-out first turns; they were" in read(folder)[1].words
    set_keys(folder / "data_report.json", leakage=leakage | {"by": "prompt", "comparisons": 0})
    assert "as it should be, but 7 first questions of dialogues do" in read(folder)[1].words
    set_keys(folder / "data_report.json", leakage=leakage | {"same_replies": 7})
    assert "7 held-out comparisons have the very replies of one of train" in read(folder)[1].words


def test_the_page_asks_nobody_for_anything_and_its_references_are_answered(full):
    _, text, page = full
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.findall(r"https?:|url\(|@import|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert text.count("<figcaption>") == text.count("<figure")


def test_the_same_files_give_the_same_bytes_elsewhere_and_secrets_are_redacted(full, folder, monkeypatch):
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert read(folder)[0] == full[1]
    monkeypatch.setenv("HF_TOKEN", "not-of-any-known-form")
    monkeypatch.setenv("HOME", "/home/ann")
    set_keys(folder / "evaluation.json", model="/home/ann/m not-of-any-known-form")
    assert "~/m ***" in read(folder)[1].words


def test_no_text_of_data_or_names_adds_an_element_an_attribute_or_an_address(full):
    page = full[2]
    assert not {"script", "onclick", "onerror"} & {word for found in page.found for word in found}
    assert page.words.count("alert(1)") > 20
    assert "{{ 7 * 7 }}" in page.words
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", "".join(page.text))


# --- pictures --------------------------------------------------------------------------------------


def test_pictures_are_images_that_say_in_words_what_they_show(full):
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="[^"]+">', full[1])
    assert len(found) == full[1].count("<img") == 2 * 3 + 1
    drawn = [ElementTree.fromstring(base64.b64decode(source)) for source in found]
    texts = {element.text for image in drawn for element in image.iter()}
    assert {"chosen", "rejected", "right", "wrong", "ideal", "model", "held out", "grad norm"} <= texts
    label = plots.svg(lambda figure: figure.subplots(), 'a "quoted" <label> \u202e').rpartition("alt=")[2]
    assert label == '"a &#34;quoted&#34; &lt;label&gt; [U+202E]">'


@pytest.mark.parametrize("values", [[-7, 0.2, 3], [0.0], [3.0, 3.0], [-1e-9, 1e9], [0.3, 0.7], [-5, -4.9]])
def test_every_value_is_in_a_bar_and_no_bar_holds_both_signs(values):
    edges = np.array(plots.edges_of(values))
    assert np.histogram(values, edges)[0].sum() == len(values)
    small = 1e-9 * abs(edges).max()
    assert not np.any((edges[:-1] < -small) & (edges[1:] > small))


# --- numbers, findings and the terminal --------------------------------------------------------


def test_numbers_are_written_alike():
    assert decimal(0.87349) == "0.873"
    assert decimal(-0.0001) == "0.000"
    assert decimal(-0.25, 2, signed=True) == "\N{MINUS SIGN}0.25"
    assert decimal(1e9) == "1.000e+09"
    assert decimal(None) == whole(None) == share(None) == interval(None) == MISSING
    assert (whole(12345), share(0.0301)) == ("12,345", "3.0 %")
    assert interval([0.851, 0.8924]) == "0.851 to 0.892"
    assert (p_value(1e-20), p_value(0.04)) == ("below 0.001", "0.040")


@pytest.mark.parametrize(
    ("target", "value", "said"),
    [
        (0.65, 0.6671, "Target 0.65 reached: the accuracy is 0.667"),
        (0.655, 0.654, "Target 0.655 not reached: the accuracy is 0.654"),
        (0.65, 0.64996, "Target 0.65 not reached: the accuracy is 0.649960"),
    ],
)
def test_what_is_said_of_the_gate_does_not_contradict_itself_by_rounding(target, value, said):
    words = gate_words({"target": target, "statistic": "accuracy", "value": value, "passed": value >= target})
    assert f"{words['verdict']}: {words['why']}" == said


@pytest.mark.parametrize(("statistic", "passed"), [("accuracy", True), ("omit", False)])
def test_the_gate_reads_the_intervals_lower_end_by_default(write_recipe, statistic, passed):
    recipe = read_recipe(write_recipe(target_accuracy=0.7, gate_statistic=statistic))
    assert gate({"accuracy": 0.72, "accuracy_ci95": [0.66, 0.77]}, recipe)["passed"] is passed


FIGURES = {
    **{"n_scored": 990, "excluded": {"too_long": 10}, "accuracy": 0.7, "accuracy_ci95": [0.67, 0.73]},
    **{"ties": 0, "loss": 0.6, "ranking": None, "trained_prompts": 0},
    "baselines": {"longer_wins": 0.55, "bag_of_words": 0.61},
    "against_baselines": {"bag_of_words": {"difference": 0.09, "ci95": [0.05, 0.13]}},
    **{"consistency": {"thank_you": {"wins": 0.02}}, "consistency_unseen": {}},
}
LITTLE = {"against_baselines": {"bag_of_words": {"difference": -0.02, "ci95": [-0.05, 0.01]}}}
OTHER = {"model": "other", "n": 980, "other_accuracy": 0.68, "difference": 0.02, "ci95": [-0.01, 0.05]}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (LITTLE, "The model is not shown to beat the best baseline: 'bag"),
        (LITTLE, "0.020 behind (95 % interval \u22120.050 to +0.010)"),
        ({"n_scored": 3, "trained_prompts": 3}, "3 comparisons are too few to say anything"),
        ({"n_scored": 3, "trained_prompts": 3}, "3 of 3 comparisons, or their prompts, were trained on"),
        ({"trained_prompts": 3}, "3 of 990 comparisons, or their prompts, were trained on"),
        ({"loss": 0.685}, "0.685, is not clearly below that of equal rewards, ln 2 = 0.693"),
        ({"ties": 60}, "6.1 % of the pairs are ties"),
        ({"consistency": {"markdown": {"wins": 0.32}}}, "the chosen one in 32.0 % of those judged right"),
        ({"against": OTHER | {"p_value": 0.2134}}, "+0.020 (\u22120.010 to +0.050), McNemar's p 0.213."),
        ({"prompts": 330}, "The 990 comparisons have 330 different prompts, and"),
        ({"chose_checkpoint": True}, "keeps the checkpoint that is best on these comparisons"),
    ],
)
def test_what_makes_figures_doubtful_is_said_and_nothing_else(keys, said):
    assert [kind for kind, _ in readings(FIGURES)] == ["good"]
    expected = "plain" if keys.keys() & {"against", "prompts", "chose_checkpoint"} else "bad"
    assert any(kind == expected and said in sentence for kind, sentence in readings(FIGURES | keys))
    assert len(readings(FIGURES | {"ties": 60, "ranking": {"pairs": 5000}})) == 1
    assert len(readings(FIGURES | LITTLE | {"n_scored": 3, "loss": 0.7, "prompts": 2})) == 1
    assert len(readings(FIGURES | {"prompts": 980})) == len(readings(FIGURES | {"prompts": 1})) == 1


def test_names_cannot_command_the_terminal_and_the_gate_speaks_of_held_out_alone(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    datasets = {"\x1b[red]\u202e": FIGURES, "b": FIGURES | {"ties": 60}}
    gate = {"target": 0.65, "statistic": "ci_low", "value": 0.67, "passed": True}
    print_evaluation({"datasets": datasets, "gate": gate}, list(datasets))
    text = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(text)
    assert "[U+001B][red][U+202E]" in text  # rich takes no markup in it either
    assert "b: 6.1 % of the pairs are ties" in text
    assert "Target" not in text
