"""The page says what the files say, whatever stands in them, and asks nobody for anything."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.report import TEMPLATE, write_report

SECTIONS = {"headline", "overview", "details", "training", "data", "run", "words"}
VOID = {"meta", "link", "br", "img", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_figures(generator, lines, subsets=3):
    """Plausible figures of a data set with these predictions; all keys that there may be."""
    n, accuracy = len(lines), sum(line["correct"] for line in lines) / len(lines)

    def part(label, count, value):
        return {"label": label, "n": count, "accuracy": value, "accuracy_ci95": [value - 0.05, value + 0.04]}

    def change(mean):
        return {
            "n": 100,
            "mean_change": mean,
            "std_change": 0.1,
            "share_up": 0.4,
            "wins": 0.03,
            "largest": 0.9,
        }

    spans = ("below -40", "-40 to -11", "-10 to 10", "11 to 40", "above 40")
    return {
        "n_comparisons": n + 10, "n_scored": n, "excluded": {"too_long": 8, "empty_response": 2},
        "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.02, accuracy + 0.019], "ties": 0, "loss": 0.4123,
        "mean_margin": 1.5, "mean_reward": 0.1, "std_reward": 2.0,
        "ranking": {"pairs": 5940, "pairwise_accuracy": 0.7, "best_of_k": 0.5, "kendall_tau": 0.41},
        "baselines": {"longer_wins": 0.48, "shorter_wins": 0.52, "bag_of_words": 0.61},
        "against_baselines": {
            name: {"difference": 0.21, "ci95": [0.18, 0.24], "p_value": 1e-20}
            for name in ("longer_wins", "shorter_wins", "bag_of_words")
        },
        "beats_baselines": True,
        "against": {
            "model": "outputs/other", "n": 990, "accuracy": 0.82, "other_accuracy": 0.81, "difference": 0.01,
            "ci95": [-0.01, 0.03], "p_value": 0.4, "only_this": 30, "only_other": 20,
        },
        "calibration": {
            "ece": 0.031, "temperature": 1.42, "ece_after": 0.012, "loss_after": 0.391,
            "bins": [
                {"confidence": 0.525 + i / 20, "accuracy": 0.52 + i / 24, "n": generator.randrange(40, 200)}
                for i in range(10)
            ],
        },
        "length": {
            "spearman": 0.12, "spearman_margin": -0.05, "accuracy_chosen_longer": 0.84,
            "accuracy_chosen_shorter": 0.79,
        },
        "by": {
            "turns": [part(str(turns), 200, 0.85 - turns / 50) for turns in (1, 3, 5, 7)],
            "length_difference": [part(span, 200, 0.7 + i / 40) for i, span in enumerate(spans)],
            "prompt_tokens": [part(span, 300, 0.8) for span in ("1 to 50", "51 to 120", "above 120")],
            "margin": [part(f"{i} to {i + 1}", 250, 0.6 + i / 9) for i in range(4)],
        },
        "consistency": {
            "trailing_space": change(-0.02), "repeated_sentence": change(0.3), "thank_you": change(0.55),
            "markdown": change(0.1),
        },
        "subsets": {f"subset {i}": part("", 300 - i % 100, 0.8) for i in range(subsets)},
    }  # fmt: skip


def make_lines(generator, name, n):
    """Plausible predictions, with text on ten mistakes and ten close calls."""
    lines = []
    for index in range(n):
        better, worse = generator.gauss(1.0, 1.4), generator.gauss(-0.6, 1.4)
        lines.append(
            {
                "dataset": name, "index": index, "row": 3 * index, "subset": f"subset {index % 3}",
                "rewards": [better, worse], "ranks": [0, 1], "margin": better - worse,
                "correct": float(better > worse), "tokens": [120, 131],
                "response_tokens": [20, 31], "turns": 3,
            }
        )  # fmt: skip
    order = sorted(lines, key=lambda line: line["margin"])
    close = sorted(lines, key=lambda line: abs(line["margin"]))
    for kind, chosen in (
        ("close", close[:10]),
        ("mistake", [line for line in order[:10] if line["margin"] < 0]),
    ):
        for line in chosen:
            line["shown"] = kind
            line["text"] = {
                "prompt": [
                    {"role": "user", "content": "How do I keep bread fresh for longer?"},
                    {"role": "assistant", "content": "In a box or in a paper bag, never in the fridge."},
                    {"role": "user", "content": f"And number {line['index']}?"},
                ],
                "responses": ["Freeze it in slices, it will keep for months.", "No idea. " * 12],
            }
    return lines


def make_folder(folder, seed=0, n=400, names=("held_out", "data/other"), subsets=3):
    """A finished run's files, all of them, with every key."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {name: make_lines(generator, name, n) for name in names}
    evaluation = {
        "model": "outputs/tiny",
        "base": "models/tiny",
        "recipe": {"seed": 0},
        "datasets": {name: make_figures(generator, lines, subsets) for name, lines in predictions.items()},
        "gate": {"target": 0.65, "statistic": "ci_low", "value": 0.78, "passed": True},
    }
    log = [
        {"step": step, "epoch": step / 100, "loss": 0.3 + 0.39 * 0.97**step,
         "accuracy": 0.85 - 0.35 * 0.97**step,
         "learning_rate": 1e-4 * (1 - step / 100), "grad_norm": None if step == 10 else 2.0, "margin": 0.5}
        for step in range(5, 101, 5)
    ]  # fmt: skip
    log += [{"step": step, "eval_loss": 0.45, "eval_accuracy": 0.78} for step in (50, 100)]
    split = {
        "rows": 1000, "comparisons": 900, "pairs": 900, "excluded": {"not_sampled": 100},
        "differing_prompts": 0,
        "duplicates": {"exact": 3, "near": 1, "contradictory": 0, "repeated_prompts": 12}, "truncated": 4,
        "identical_after_truncation": 0, "baselines": {"longer_wins": 0.52, "shorter_wins": 0.48},
        "tokens": {"p50": 110, "p90": 147, "p99": 171, "max": 199},
    }  # fmt: skip
    files = {
        "evaluation.json": evaluation,
        "run.json": {
            "seed": 0, "versions": {"python": "3.11.7", "torch": "2.13.0", "bitsandbytes": None},
            "git_commit": "78355af", "data_fingerprints": {"train": "53fe", "held_out": "85e0"},
            "comparisons": {"train": 900, "train_excluded": {}, "held_out": n},
            "prefix_sharing": {"used": False, "reason": "no causal classifier", "max_abs_diff": None},
            "device": "cpu", "processes": 1, "steps": 100, "comparisons_per_s": 13.6, "tokens_per_s": 2978.4,
            "train_seconds": 235.5, "peak_memory_bytes": 2677051392, "final_loss": 0.2934, "log": log,
        },
        "data_report.json": {
            "max_length": 256, "splits": {"train": split, "test": split}, "held_out_by_prompt": None,
            "leakage": {"prompts": 2, "comparisons": 7, "first_rows": ["6"], "policy": "drop"},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    lines = [json.dumps(line) for own in predictions.values() for line in own]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text("seed: 0\nlearning_rate: 0.0001\n", encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would make of a page: its ids, its addresses, its text, and whether all tags close."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.policies, self.open, self.text = [], [], [], [], []
        self.tags = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.tags.append(tag)
        self.ids += [known["id"]] if "id" in known else []
        self.addresses += [
            value for key, value in attributes if key in ("src", "href", "xlink:href", "action")
        ]
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
    text = (write_report(folder)).read_text(encoding="utf-8")
    return text, Page(text)


def change(folder, name="evaluation.json", **keys):
    """Writes other values into a file's first level, of the evaluation into its held-out figures."""
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8"))
    (content["datasets"]["held_out"] if name == "evaluation.json" else content).update(keys)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("report") / "run")
    return folder, *read(folder)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "run", n=30, names=("held_out",))


def test_a_finished_run_gives_every_section_in_order(full):
    _, text, page = full
    assert set(page.ids) >= SECTIONS
    order = ("headline", "overview", "details", "training", "data", "run")
    places = [text.index(f'id="{section}"') for section in order]
    assert places == sorted(places)
    for title in (
        "All data sets", "Rewards", "Margins", "Calibration", "Accuracy by length difference", "Baselines",
        "Against outputs/other", "Rankings", "Subsets", "Number of turns", "Length of the prompt",
        "Size of the margin", "Length bias", "Edits that should not matter", "Left out",
        "Most confident mistakes", "Closest calls", "Loss", "Learning rate", "Gradient norm", "What repeats",
        "Cost", "Versions",
    ):  # fmt: skip
        assert f"<h3>{title}</h3>" in text
    assert page.tags.count("svg") >= 2 * 4 + 4


def test_the_headline_says_the_accuracy_its_interval_and_the_verdict(full):
    folder, _, page = full
    figures = json.loads((folder / "evaluation.json").read_text())["datasets"]["held_out"]
    low, high = figures["accuracy_ci95"]
    assert f"{figures['accuracy']:.3f} held-out accuracy" in page.words
    assert f"95 % interval {low:.3f} to {high:.3f} , 400 comparisons" in page.words
    assert "Target 0.65 reached the interval's lower end is 0.780." in page.words


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("run.json", "training"),
        ("data_report.json", "data"),
        ("predictions.jsonl", "Most confident mistakes"),
    ],
)
def test_a_missing_file_leaves_its_section_out(folder, missing, section):
    (folder / missing).unlink()
    text, page = read(folder)
    assert section not in page.ids
    assert f"<h3>{section}</h3>" not in text
    assert f'href="#{section}"' not in text


def test_an_evaluation_alone_is_enough(folder):
    for path in folder.iterdir():
        if path.name != "evaluation.json":
            path.unlink()
    _, page = read(folder)
    assert set(page.ids) & SECTIONS == {"headline", "overview", "details", "words"}


def test_without_held_out_the_headline_is_the_table(tmp_path):
    text, page = read(make_folder(tmp_path / "run", n=20, names=("data/one", "data/two")))
    assert 'class="big"' not in text
    assert "overview" not in page.ids
    assert text.index("All data sets") < text.index('id="details"')
    assert text.count("<h3>All data sets</h3>") == 1


def test_held_out_comes_first_and_alone_is_open(tmp_path):
    text, _ = read(make_folder(tmp_path / "run", n=20, names=("a", "held_out", "z")))
    assert re.findall(r'<details class="set" id="(set-\d)"( open)?>\s*<summary><b>([^<]*)', text) == [
        ("set-1", " open", "held_out"), ("set-2", "", "a"), ("set-3", "", "z"),
    ]  # fmt: skip


def test_the_page_asks_nobody_for_anything(full):
    _, text, page = full
    assert page.policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not re.findall(r"https?:|url\((?!#)|@import", text)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)


def test_ids_are_unique_and_every_reference_is_answered(full):
    _, text, page = full
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)


def test_every_figure_has_a_text_alternative_and_a_caption(full):
    _, text, page = full
    drawings = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"', text)
    assert len(drawings) == 2 * 4 + 4
    assert len(set(drawings)) > 4 + 4
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert all(drawings)


def test_the_same_files_give_the_same_bytes_elsewhere_too(full, tmp_path):
    folder, text, _ = full
    assert read(make_folder(tmp_path / "somewhere" / "else"))[0] == text
    assert str(folder) not in text


def test_the_template_is_a_file_of_the_package():
    assert TEMPLATE.is_file()


HOSTILE = "</div><script>alert(1)</script><img src=http://x/y>\x1b[31m\x00\u202e\ud800 " + "w" * 3000


def test_text_from_data_is_shown_and_does_nothing(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        if "text" in line:
            line["text"] = {
                "prompt": [{"role": HOSTILE, "content": HOSTILE}],
                "responses": [HOSTILE, HOSTILE],
            }
            line["subset"] = HOSTILE
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = evaluation["datasets"]["held_out"]
    figures["subsets"] = {HOSTILE: figures["by"]["turns"][0]}
    figures["by"] = {key: [{**value[0], "label": HOSTILE}] for key, value in figures["by"].items()}
    figures["excluded"] = {HOSTILE: 1}
    evaluation = {"model": HOSTILE, "datasets": {HOSTILE: figures, "held_out": figures}, "gate": None}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "recipe.yaml").write_text("a: '</pre><script>'\n")
    change(folder, "run.json", device=HOSTILE, versions={HOSTILE: HOSTILE})
    text, page = read(folder)
    assert not {"script", "img"} & set(page.tags)
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    shown = "</div><script>alert(1)</script><img src=http://x/y>\u241b[31m\u2400[U+202E]\ufffd www"
    assert "".join(page.text).count(shown) > 20
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", text)


class Elements(HTMLParser):
    """Every tag of a page with the names of its attributes, and where its links go.

    Of the tags inside drawings the kinds only: longer labels leave room for fewer ticks.
    """

    def __init__(self, page):
        super().__init__()
        self.found, self.drawn, self.addresses, self.drawing = [], set(), set(), False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.drawing |= tag == "svg"
        if self.drawing:
            self.drawn.add((tag, *sorted(name for name, _ in attrs)))
        else:
            self.found.append((tag, *(name for name, _ in attrs)))
            self.addresses |= {value for name, value in attrs if name in ("href", "src", "action")}

    def handle_endtag(self, tag):
        if not self.drawing:
            self.found.append(f"/{tag}")
        self.drawing &= tag != "svg"


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
        "</details></section></main></body></html>",
        "</style></title></pre></svg></text></textarea><script>alert(1)</script>",
        "\" onload=alert(1) x='y' style=\"color:red",
        "javascript:alert(1)",
        "<!-- ]]> --> <![CDATA[ {{ 7 * 7 }} {% raw %} &lt;b&gt; `|`",
        "<a href=javascript:alert(1)>x</a><svg onload=alert(1)><math><mtext>",
    ],
)
def test_no_text_of_any_file_adds_an_element_an_attribute_or_an_address(tmp_path, text):
    folder, pages = tmp_path / "run", []
    make_folder(folder, n=60)
    for written in ("harmless", text):
        other = shutil.copytree(folder, tmp_path / str(len(pages)))
        for name in ("evaluation.json", "run.json", "data_report.json"):
            content = with_texts(json.loads((folder / name).read_text()), written)
            if name == "evaluation.json":
                content["datasets"][written] = content["datasets"].pop("data/other")
                for figures in content["datasets"].values():
                    for key in ("subsets", "excluded", "baselines", "consistency"):
                        figures[key] = {f"{written}{i}": item for i, item in enumerate(figures[key].values())}
            elif name == "run.json":
                content["versions"][written] = written
            (other / name).write_text(json.dumps(content))
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        names = {"held_out": "held_out", "data/other": written}
        lines = [with_texts(line, written) | {"dataset": names[line["dataset"]]} for line in lines]
        (other / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (other / "recipe.yaml").write_text(f"a: {written}\n")
        pages.append(write_report(other).read_text())
    harmless, hostile = map(Elements, pages)
    assert hostile.found == harmless.found
    assert hostile.drawn == harmless.drawn
    assert hostile.addresses == harmless.addresses
    assert pages[1].count("alert(1)") > 20 or "alert" not in text


# --- what the page says ----------------------------------------------------------------------


def test_a_model_that_beats_no_baseline_is_told_so(folder):
    change(
        folder, beats_baselines=False,
        against_baselines={"bag_of_words": {"difference": -0.02, "ci95": [-0.05, 0.01], "p_value": 0.3}},
    )  # fmt: skip
    _, page = read(folder)
    assert "This model has learnt little that the rule 'bag of words' does not know" in page.words
    assert "the model is 0.020 behind (95 % interval \u22120.050 to +0.010)" in page.words


# --- files that are older, odd, large or broken ----------------------------------------------


def without(value, generator, rate):
    """The value with some keys dropped and some values null."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if generator.random() > rate}
        return {key: without(item, generator, rate) for key, item in kept.items()}
    if isinstance(value, list):
        return [without(item, generator, rate) for item in value]
    return None if generator.random() < rate else value


@pytest.mark.parametrize("seed", range(5))
def test_values_that_are_missing_or_null_never_stop_the_page(folder, seed):
    generator = random.Random(seed)
    rate = (0.05, 0.2, 0.5)[seed % 3]
    for name in ("run.json", "data_report.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(without(content, generator, rate)))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = without(evaluation["datasets"]["held_out"], generator, rate)
    (folder / "evaluation.json").write_text(json.dumps({"datasets": {"held_out": figures}}))
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    lines = [json.dumps(without(line, generator, rate)) for line in lines]
    (folder / "predictions.jsonl").write_text("\n".join(lines))
    read(folder)


def test_figures_without_a_single_value_still_make_a_page(folder):
    (folder / "evaluation.json").write_text('{"datasets": {"held_out": {}, "odd": null}}')
    for name in ("run.json", "data_report.json", "predictions.jsonl"):
        (folder / name).write_text("{}")
    _, page = read(folder)
    assert "unnamed model" in page.words


def test_one_comparison_and_nothing_but_ties_are_drawn(folder):
    line = {"dataset": "held_out", "rewards": [1.0, 1.0], "ranks": [0, 1], "margin": 0.0, "correct": 0.5}
    for count in (1, 20):
        (folder / "predictions.jsonl").write_text("\n".join([json.dumps(line)] * count))
        text, _ = read(folder)
        assert ">tie</text>" in text


def test_numbers_that_are_none_or_overflow_count_for_nothing(folder):
    rewards = [[float("nan"), 1.0], [float("inf"), 1e300], [True, "1"], [10**400, -1e300]]
    lines = [{"dataset": "held_out", "rewards": pair, "ranks": [0, 1], "margin": pair[0]} for pair in rewards]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    change(folder, loss=float("nan"), accuracy=float("inf"), std_reward=0)
    read(folder)


def test_of_thousands_of_subsets_the_largest_are_shown(tmp_path):
    text, page = read(make_folder(tmp_path / "run", n=20, names=("held_out",), subsets=3000))
    assert "and 2,950 more, not shown" in page.words
    assert text.count('<th scope="row">subset ') == 50
    assert "subset 2900" in page.words  # of those with 300 comparisons, the most
    assert "subset 2999" not in page.words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "evaluation.json is missing; `rm-recipe evaluate"),
        ("{", "is not JSON that can be read"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("[]", "holds no JSON object"),
        ("{}", "holds no data set"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_one_sentence(tmp_path, content, message):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "evaluation.json").write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["run.json", "data_report.json", "predictions.jsonl"])
def test_another_file_that_is_broken_is_named_and_the_old_page_stays(folder, name):
    (folder / "report.html").write_text("the old one")
    (folder / name).write_text("{}\n{")
    with pytest.raises(RecipeError, match=name):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the old one"
    assert not list(folder.glob(".*"))


# --- a browser -------------------------------------------------------------------------------


def browse(page, scratch):
    """What Chromium makes of a page: its document, its messages, and the addresses that the page asks for."""
    log = scratch / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={scratch / 'profile'}",
        f"--log-net-log={log}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own business has "not an origin" for an initiator, a page from a file has "null".
    urls = [params["url"] for params in asked if params.get("initiator") == "null" and "url" in params]
    return done.stdout, done.stderr, [url for url in urls if not url.startswith(("file:", "data:"))]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@needs_chromium
def test_a_browser_shows_the_page_without_complaint_or_request(full, tmp_path):
    folder, _, page = full
    document, messages, asked = browse(folder / "report.html", tmp_path)
    assert ":CONSOLE" not in messages
    assert asked == []
    assert document.count("<figure") == page.tags.count("figure")
    assert 'id="words"' in document


@needs_chromium
@pytest.mark.parametrize("policy", [True, False])
def test_a_request_would_have_been_seen(full, tmp_path, policy):
    text = full[1].replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">')
    text = text if policy else text.replace("Content-Security-Policy", "none")
    (tmp_path / "planted.html").write_text(text)
    _, messages, asked = browse(tmp_path / "planted.html", tmp_path)
    assert (":CONSOLE" in messages, asked == []) == (True, True) if policy else asked
