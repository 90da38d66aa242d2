"""The page says what the files say, whatever text stands in them, and asks nobody for anything."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import make_recipe, write_jsonl
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.findings import HELD_OUT, gate, gate_words, readings
from rm_recipe.evaluation.format import MISSING, decimal, interval, p_value, share, whole
from rm_recipe.evaluation.report import print_evaluation, write_report
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its ids, its addresses, its text, and whether all tags close."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open, self.text, self.found, self.drawn = [], [], [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        # Of drawings the kinds of tags only: longer labels leave room for fewer ticks.
        if tag == "svg" or "svg" in self.open:
            self.drawn.add((tag, *sorted(known)))
        else:
            self.found.append((tag, *known))
        self.ids += [known["id"]] if "id" in known else []
        self.addresses += [known[key] for key in ("src", "href", "xlink:href", "action") if key in known]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def read(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def change(path, function):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(function(content) or content), encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_llama, tiny_base, tiny_data):
    """A run, evaluated on what it holds out and on rankings with subsets, and compared with another model."""
    folder = tmp_path_factory.mktemp("report")
    other = AutoModelForSequenceClassification.from_pretrained(tiny_base("gpt2"), num_labels=1)
    other.config.pad_token_id = 0
    other.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(tiny_base("gpt2")).save_pretrained(folder / "other")
    keys = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 8, "num_train_epochs": 2}
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, **keys)))
    replies = ["good good", "no no good bad", "bad"]
    rankings = [
        {"prompt": f"hello {n}{' how are you' * (n % 3)}", "responses": replies, "subset": f"part {n % 2}"}
        for n in range(60)
    ]
    rankings[0]["responses"] = ["", "bad", "good"]
    path = write_jsonl(folder / "rankings.jsonl", [{**row, "ranks": [0, 1, 2]} for row in rankings])
    evaluate(str(folder / "run"), [HELD_OUT, str(path)], against=str(folder / "other"))
    return folder / "run", *read(folder / "run")


@pytest.fixture
def folder(full, tmp_path):
    """A copy of its files."""
    ignore = shutil.ignore_patterns("model", "export", "checkpoint-*")
    return shutil.copytree(full[0], tmp_path / "run", ignore=ignore)


def test_a_finished_run_gives_every_section_in_order_with_every_figure(full):
    folder, text, page = full
    order = ("headline", "overview", "details", "training", "data", "run", "words")
    places = [text.index(f'id="{section}"') for section in order]
    assert places == sorted(places)
    titles = """All data sets|Rewards|Margins|Calibration|Accuracy by length difference|Baselines|Rankings
    Subsets|Number of turns|Length of the prompt|Size of the margin|Length bias|Edits that should not matter
    Left out|Most confident mistakes|Closest calls|Over the steps|What is used|What repeats|How long it is
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
    change(folder / "evaluation.json", lambda content: content["datasets"].pop(HELD_OUT) and None)
    text, page = read(folder)
    assert not {"training", "data", "overview"} & set(page.ids)
    assert "Closest calls" not in text
    assert 'class="big"' not in text
    assert text.count("<h3>All data sets</h3>") == 1  # in place of the headline


def test_the_page_asks_nobody_for_anything_and_its_references_are_answered(full):
    _, text, page = full
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not re.findall(r"https?:|url\((?!#)|@import|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    spoken = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]+)"', text)
    assert len(spoken) == 2 * 3 + 1
    assert text.count("<figcaption>") == text.count("<figure")


def test_the_same_files_give_the_same_bytes_elsewhere_and_secrets_are_redacted(full, folder, monkeypatch):
    assert read(folder)[0] == full[1]
    monkeypatch.setenv("HF_TOKEN", "not-of-any-known-form")
    monkeypatch.setenv("HOME", "/home/ann")
    model = {"model": "/home/ann/m not-of-any-known-form"}
    change(folder / "evaluation.json", lambda content: content | model)
    assert "~/m ***" in read(folder)[1].words


LOGIC = {"shown", "statistic", "policy"}  # keys whose values decide what is shown


def with_texts(value, text):
    """A file's content with every text that data, a model or a machine may have given replaced."""
    if isinstance(value, dict):
        return {key: value[key] if key in LOGIC else with_texts(value[key], text) for key in value}
    if isinstance(value, list):
        return [with_texts(item, text) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize(
    "text",
    [
        "</style></title></pre></svg></text></details></main></body><script>alert(1)</script>",
        '<img src=http://x/y onerror=alert(1) style="color:red <!-- {{ 7 * 7 }} `|`\x1b\x00\u202e\ud800',
    ],
)
def test_no_text_of_any_file_adds_an_element_an_attribute_or_an_address(folder, tmp_path, text):
    pages = []
    for written in ("harmless", text):
        other = shutil.copytree(folder, tmp_path / str(len(pages)))
        for name in ("evaluation.json", "run.json", "data_report.json"):
            change(other / name, lambda content, written=written: with_texts(content, written))

        def rename(content, written=written):
            held_out, rankings = content["datasets"].values()
            rankings |= {"subsets": {written: rankings["subsets"]["part 0"]}, "excluded": {written: 3}}
            content["datasets"] = {HELD_OUT: held_out, written: rankings}

        change(other / "evaluation.json", rename)
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {
                **with_texts(line, written),
                "dataset": HELD_OUT if line["dataset"] == HELD_OUT else written,
            }
        (other / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (other / "recipe.yaml").write_text(f"a: {written}\n", errors="replace")
        pages.append(read(other)[1])
    harmless, hostile = pages
    assert hostile.found == harmless.found
    assert hostile.drawn == harmless.drawn
    assert sorted(set(hostile.addresses)) == sorted(set(harmless.addresses))
    assert "".join(hostile.text).count("alert(1)") > 20
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", "".join(hostile.text))


def test_without_an_evaluation_there_is_no_page(tmp_path):
    with pytest.raises(RecipeError, match="holds no evaluation; `rm-recipe evaluate"):
        write_report(tmp_path)


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


@pytest.mark.parametrize(("statistic", "passed"), [("accuracy", True), ("ci_low", False)])
def test_the_gate_reads_the_intervals_lower_end_by_default(write_recipe, statistic, passed):
    recipe = read_recipe(write_recipe(target_accuracy=0.7, gate_statistic=statistic))
    found = gate({"accuracy": 0.72, "accuracy_ci95": [0.66, 0.77]}, recipe)
    assert found["passed"] is passed
    assert gate_words(found)["verdict"] == f"Target 0.70 {'' if passed else 'not '}reached"
    assert gate_words(None) is None
    assert read_recipe(write_recipe(gate_statistic="omit")).data.gate_statistic == "ci_low"


FIGURES = {
    **{"n_scored": 990, "excluded": {"too_long": 10}, "accuracy": 0.7, "accuracy_ci95": [0.67, 0.73]},
    **{"ties": 0, "loss": 0.6, "ranking": None, "trained_prompts": 0, "beats_baselines": True},
    "baselines": {"longer_wins": 0.55, "bag_of_words": 0.61},
    "against_baselines": {"bag_of_words": {"difference": -0.02, "ci95": [-0.05, 0.01]}},
    "consistency": {"thank_you": {"wins": 0.02}},
}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"beats_baselines": False},
            "has learnt little that the best baseline does not know: 'bag",
        ),
        ({"beats_baselines": False}, "0.020 behind (95 % interval \u22120.050 to +0.010)"),
        ({"trained_prompts": 3}, "3 of 990 comparisons have a prompt that was trained on"),
        ({"loss": 0.6931}, "equal rewards, ln 2 = 0.693: it tells"),
        ({"loss": 0.9}, "ln 2 = 0.693: it is too sure of its mistakes"),
        ({"ties": 60}, "6.1 % of the pairs are ties"),
        ({"consistency": {"markdown": {"wins": 0.32}}}, "With bold type a rejected response overtakes"),
    ],
)
def test_what_makes_figures_doubtful_is_said_and_nothing_else(keys, said):
    assert [kind for kind, _ in readings(FIGURES)] == ["good"]
    assert any(kind == "bad" and said in sentence for kind, sentence in readings(FIGURES | keys))
    assert len(readings(FIGURES | {"ties": 60, "ranking": {"pairs": 5000}})) == 1


def test_another_model_is_compared_in_one_sentence():
    other = {"model": "other", "n": 980, "other_accuracy": 0.68, "difference": 0.02, "p_value": 0.2134}
    said = "other has accuracy 0.680 on the 980 comparisons that fit both models; this model's minus that is "
    said += "+0.020 (\u22120.010 to +0.050), McNemar's p 0.213."
    assert readings(FIGURES | {"against": {**other, "ci95": [-0.01, 0.05]}})[-1] == ("plain", said)


def test_names_cannot_command_the_terminal_and_the_gate_speaks_of_held_out_alone():
    output, gate = io.StringIO(), {"target": 0.65, "statistic": "ci_low", "value": 0.67, "passed": True}
    datasets = {"\x1b[red]\u202e": FIGURES, "b": FIGURES | {"ties": 60}}
    print_evaluation({"datasets": datasets, "gate": gate}, list(datasets), Console(file=output, width=120))
    text = output.getvalue()
    assert not {"\x1b", "\u202e"} & set(text)
    assert "[U+001B][red][U+202E]" in text  # rich takes no markup in it either
    assert "b: 6.1 % of the pairs are ties" in text
    assert "Target" not in text
