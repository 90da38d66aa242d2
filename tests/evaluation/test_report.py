"""The page says what the files say, whatever text stands in them, and asks nobody for anything."""

import io
import json
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser

import pytest
from conftest import make_recipe, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.findings import HELD_OUT, gate, gate_words, readings
from rm_recipe.evaluation.format import MISSING, decimal, duration, interval, p_value, share, whole
from rm_recipe.evaluation.report import print_evaluation, write_report
from rm_recipe.files import visible
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

VOID = {"meta", "link", "br", "img", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a browser would make of a page: its ids, its addresses, its text, and whether all tags close."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.policies, self.open, self.text = [], [], [], [], []
        self.found, self.drawn = [], set()
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
        self.policies += [known["content"]] if known.get("http-equiv") == "Content-Security-Policy" else []
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
    _, text, page = full
    order = ("headline", "overview", "details", "training", "data", "run", "words")
    places = [text.index(f'id="{section}"') for section in order]
    assert places == sorted(places)
    titles = """All data sets|Rewards|Margins|Calibration|Accuracy by length difference|Baselines|Rankings
    Subsets|Number of turns|Length of the prompt|Size of the margin|Length bias|Edits that should not matter
    Left out|Most confident mistakes|Closest calls|Loss|Accuracy|Learning rate|Gradient norm|What is used
    What repeats|How long it is|Cost|Versions"""
    for title in re.split(r"\||\n\s+", titles):
        assert f"<h3>{title}</h3>" in text
    assert "<h3>Against " in text
    # A figure that the template asks for by a wrong name would be a dash.
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", text)
    assert len(cells) > 200
    assert cells.count(MISSING) == 0
    assert page.words.count("the model prefers it") > 10


def test_the_headline_says_the_accuracy_its_interval_and_the_verdict(full):
    folder, _, page = full
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = evaluation["datasets"][HELD_OUT]
    low, high = figures["accuracy_ci95"]
    assert f"{figures['accuracy']:.3f} held-out accuracy" in page.words
    assert f"95 % interval {low:.3f} to {high:.3f} , 40 comparisons" in page.words
    assert gate_words(evaluation["gate"])["verdict"] in page.words


@pytest.mark.parametrize(
    ("missing", "section"),
    [("run.json", "training"), ("data_report.json", "data"), ("predictions.jsonl", "Closest calls")],
)
def test_a_missing_file_leaves_its_section_out(folder, missing, section):
    (folder / missing).unlink()
    text, page = read(folder)
    assert section not in page.ids
    assert f"<h3>{section}</h3>" not in text
    assert f'href="#{section}"' not in text


def test_without_held_out_the_headline_is_the_table(folder):
    change(folder / "evaluation.json", lambda content: content["datasets"].pop(HELD_OUT) and None)
    text, page = read(folder)
    assert 'class="big"' not in text
    assert "overview" not in page.ids
    assert text.count("<h3>All data sets</h3>") == 1


def test_of_many_subsets_the_largest_are_shown(folder):
    def many(content):
        figures = content["datasets"][HELD_OUT]
        part = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}
        figures["subsets"] = {f"subset {n}": {"n": n, **part} for n in range(3000)}

    change(folder / "evaluation.json", many)
    text, page = read(folder)
    assert "and 2,950 more, not shown" in page.words
    assert text.count('<th scope="row">subset ') == 50
    assert "subset 2999" in page.words


def test_the_page_asks_nobody_for_anything_and_its_references_are_answered(full):
    _, text, page = full
    assert page.policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not re.findall(r"https?:|url\((?!#)|@import|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    spoken = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]+)"', text)
    assert len(spoken) == 2 * 4 + 4
    assert text.count("<figcaption>") == text.count("<figure")


def test_the_same_files_give_the_same_bytes_elsewhere_too(full, folder):
    assert read(folder)[0] == full[1]


def test_what_a_reader_should_not_see_is_redacted(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-any-known-form")
    monkeypatch.setenv("HOME", "/home/ann")
    change(
        folder / "evaluation.json", lambda content: {**content, "model": "/home/ann/m not-of-any-known-form"}
    )
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
        "\" onload=alert(1) x='y' style=\"color:red <!-- {{ 7 * 7 }} {% raw %} &lt;b&gt; `|`",
        "<img src=http://x/y onerror=alert(1)>\x1b[31m\x00\u202e\ud800",
    ],
)
def test_no_text_of_any_file_adds_an_element_an_attribute_or_an_address(folder, tmp_path, text):
    pages = []
    for written in ("harmless", text):
        other = shutil.copytree(folder, tmp_path / str(len(pages)))
        for name in ("evaluation.json", "run.json", "data_report.json"):
            change(other / name, lambda content, written=written: with_texts(content, written))

        def rename(content, written=written):
            datasets = content["datasets"]
            held_out, rankings = datasets.values()
            rankings["subsets"] = {written: rankings["subsets"]["part 0"]}
            rankings["excluded"] = {written: 3}
            content["datasets"] = {HELD_OUT: held_out, written: rankings}

        change(other / "evaluation.json", rename)
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        named = [{**with_texts(line, written), "dataset": line["dataset"]} for line in lines]
        named = [line if line["dataset"] == HELD_OUT else {**line, "dataset": written} for line in named]
        (other / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
        (other / "recipe.yaml").write_text(f"a: {written}\n", errors="replace")
        pages.append(read(other)[1])
    harmless, hostile = pages
    assert hostile.found == harmless.found
    assert hostile.drawn == harmless.drawn
    assert sorted(set(hostile.addresses)) == sorted(set(harmless.addresses))
    assert "".join(hostile.text).count("alert(1)") > 20
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", "".join(hostile.text))


@given(st.text(st.characters(codec=None)))
def test_shown_text_holds_nothing_invisible_and_is_stable(text):
    shown = visible(text)
    assert visible(shown) == shown
    shown.encode("utf-8")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF")]


def test_a_file_that_cannot_be_read_is_one_sentence_and_the_old_page_stays(folder, tmp_path):
    with pytest.raises(RecipeError, match="holds no evaluation; `rm-recipe evaluate"):
        write_report(tmp_path)
    before = (folder / "report.html").read_text()
    for name in ("run.json", "predictions.jsonl", "evaluation.json"):
        (folder / name).write_text("{}\n{")
        with pytest.raises(RecipeError, match=name):
            write_report(folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("planted", "policy"), [(False, True), (True, True), (True, False)])
def test_a_browser_shows_the_page_without_complaint_or_request(full, tmp_path, planted, policy):
    """And would have complained of an image from elsewhere, or asked for it without the page's policy."""
    text = full[1].replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">') if planted else full[1]
    text = text if policy else text.replace("Content-Security-Policy", "none")
    (tmp_path / "page.html").write_text(text)
    log, page = tmp_path / "net.json", tmp_path / "page.html"
    options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --enable-logging=stderr --v=0 --dump-dom"""
    places = [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", page.as_uri()]
    command = [CHROMIUM, *options.split(), "--host-resolver-rules=MAP * ~NOTFOUND", *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own business has "not an origin" for an initiator, a page from a file has "null".
    urls = [params["url"] for params in asked if params.get("initiator") == "null" and "url" in params]
    assert any(url.startswith("http") for url in urls) == (not policy)
    assert (":CONSOLE" in done.stderr) == (planted and policy)
    assert done.stdout.count("<figure") == text.count("<figure")


# --- numbers, findings and the terminal --------------------------------------------------------


def test_numbers_are_written_alike():
    assert decimal(0.87349) == "0.873"
    assert decimal(-0.0001, signed=True) == "0.000"
    assert decimal(-0.25, 2, signed=True) == "\N{MINUS SIGN}0.25"
    assert decimal(1e9) == "1.000e+09"
    assert decimal(None) == whole(None) == share(None) == interval(None) == MISSING
    assert (whole(12345), share(0.0301)) == ("12,345", "3.0 %")
    assert interval([0.851, 0.8924]) == "0.851 to 0.892"
    assert (p_value(1e-20), p_value(0.04)) == ("below 0.001", "0.040")
    assert [duration(s) for s in (3.25, 235.49, 7322)] == ["3.2 s", "3 min 55 s", "2 h 2 min"]


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
        ({"beats_baselines": False}, "has learnt little that the rule 'bag of words' does not know"),
        ({"beats_baselines": False}, "0.020 behind (95 % interval \u22120.050 to +0.010)"),
        ({"trained_prompts": 3}, "3 of 990 comparisons have a prompt that was trained on"),
        ({"accuracy": 0.3, "accuracy_ci95": [0.2, 0.4]}, "worse than guessing"),
        ({"loss": 0.6931}, "about ln 2 = 0.693"),
        ({"loss": 0.9}, "above ln 2 = 0.693"),
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
    kind, sentence = readings(FIGURES | {"against": {**other, "ci95": [-0.01, 0.05]}})[-1]
    assert kind == "plain"
    for part in ("other has accuracy 0.680 on the 980", "+0.020 (\u22120.010 to +0.050)", "p 0.213."):
        assert part in sentence


def test_names_cannot_command_the_terminal_and_the_gate_speaks_of_held_out_alone():
    output, gate = io.StringIO(), {"target": 0.65, "statistic": "ci_low", "value": 0.67, "passed": True}
    datasets = {"\x1b[red]\u202e": FIGURES, "b": FIGURES | {"ties": 60}}
    print_evaluation({"datasets": datasets, "gate": gate}, list(datasets), Console(file=output, width=120))
    text = output.getvalue()
    assert not {"\x1b", "\u202e"} & set(text)
    assert "[U+001B][red][U+202E]" in text  # rich takes no markup in it either
    assert "b: 6.1 % of the pairs are ties" in text
    assert "Target" not in text
