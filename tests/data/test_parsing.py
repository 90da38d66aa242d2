"""Every row of a source is a comparison or is counted; a row of the wrong type is named."""

import datasets as hf_datasets
import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import loading
from rm_recipe.data.comparison import Comparison
from rm_recipe.data.dataset import Split
from rm_recipe.data.loading import load_rows, parse_rows, text_key
from rm_recipe.errors import DataError


def parsed(path, subset="", margin_column=None, margin_map=None, num_proc=None) -> Split:
    source = DatasetConfig(path=str(path))
    return parse_rows(
        load_rows(source, "train"), source, "train", subset, margin_column, margin_map, num_proc
    )


TEXTS = st.sampled_from(
    ["", " ", "a", "b", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", None]
)
PAIRS = st.fixed_dictionaries(
    {"prompt": st.sampled_from([None, "p", " "]), "chosen": TEXTS, "rejected": TEXTS}
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PAIRS, min_size=1, max_size=12))
def test_the_sum_of_comparisons_and_reasons_is_exact(tmp_path, rows):
    rows.append({"prompt": "p", "chosen": "x", "rejected": "y"})  # gives every column its type
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows))
    assert split.rows == len(rows) == len(split.comparisons) + split.excluded.total()
    assert len(split.comparisons) >= 1


def test_a_comparison_knows_its_row_subset_ranks_and_margins(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a"], "scores": [1.0], "model": "x"},
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 1], "model": "y"},
    ]
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows), "mine", margin_column="scores")
    assert split[0] == Comparison(
        [{"role": "user", "content": "p"}], ["b", "a", "c"], [0, 1, 1], [2.0, 2.0], "mine"
    )
    assert split.column("row").tolist() == [2]
    assert split.first_rows == {"single_response": ["mine:1"]}


def padded(rows: list[dict]) -> list[dict]:
    """The rows behind 11 MB of others: readers that decide by a file's beginning have decided."""
    return [{**row, "chosen": "word " * 500} for row in make_rows(4_000, seed=5)] + rows


@pytest.mark.parametrize("place", [list, padded])
def test_a_rows_type_is_its_own_however_far_down_it_stands(tmp_path, place):
    reply = [{"role": "assistant", "content": "a", "name": "x"}]
    rows = place([{"prompt": "p", "chosen": chosen, "rejected": "b"} for chosen in ("a", reply)])
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows))
    assert split.excluded == {}
    assert split[len(rows) - 1] == split[len(rows) - 2]
    rows = place([{"prompt": "p", "chosen": 5, "rejected": "b"}])
    with pytest.raises(DataError, match=f"line {len(rows)}: column 'chosen' should be a text or a list"):
        parsed(write_jsonl(tmp_path / "y.jsonl", rows))


@pytest.mark.parametrize("place", [list, padded])
def test_a_column_may_be_empty_first_and_appear_or_change_later(tmp_path, place):
    rows = [{**row, "m": None} for row in place(make_rows(2, seed=1))]
    rows += [{**row, "m": m, "later": 1} for row, m in zip(make_rows(2, seed=2), (1, 0.5), strict=True)]
    rows += [
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "m": 1, "subset": n} for n in range(2)
    ]
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows), margin_column="m")
    assert split.excluded == {}
    assert split.comparisons["subset"][-3:] == ["", "0", "1"]
    assert split.comparisons["margins"][-4:-2] == [[1.0], [0.5]]
    assert split.comparisons["margin_fault"][:2] == ["missing_margin"] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "chosen": 5, "rejected": "b"}], "line 1: column 'chosen' should be a text"),
        (
            [*make_rows(2, seed=1), {"prompt": "p", "chosen": 5, "rejected": "b"}],
            "line 3: column 'chosen' should be a text or a list of messages, not int '5'",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"], "ranks": "1, 2"}],
            "line 1: column 'ranks' should be a list",
        ),
        ([*make_rows(2, seed=1), ["p"]], "line 3: a row is a JSON object, this is a list"),
        ([{"text": "a"}], "its columns are text; rm_recipe needs chosen and rejected"),
        ([{"chosen": "a", "prompt": "p"}], "its columns are chosen, prompt"),
    ],
)
def test_a_column_that_is_missing_or_of_the_wrong_type_is_named_with_its_row(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        parsed(path)
    assert str(path) in str(caught.value)


def test_a_margin_column_that_is_missing_or_unmapped_is_named(tmp_path):
    rows = [{**row, "strength": "slightly"} for row in make_rows(2, seed=1)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="has no column 'margin'"):
        parsed(path, margin_column="margin")
    with pytest.raises(DataError, match="line 1: column 'strength' should be one of margin_map's much"):
        parsed(path, margin_column="strength", margin_map={"much": 1})
    assert parsed(path, margin_column="strength", margin_map={"slightly": 0.3})[1].margins == [0.3]


def test_the_columns_that_a_mixture_names_are_all_that_is_read(tmp_path):
    rows = [{**row, "subset": "theirs"} for row in make_rows(2, seed=1)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)

    def subsets(columns):
        source = DatasetConfig(path=str(path), columns=columns)
        split = parse_rows(load_rows(source, "train"), source, "train", "mine", None, None, None)
        return split.comparisons["subset"][:]

    assert subsets(None) == ["theirs"] * 2
    assert subsets(["prompt", "chosen", "rejected"]) == ["mine"] * 2
    with pytest.raises(DataError, match="has no column other"):
        subsets(["prompt", "chosen", "rejected", "other"])
    with pytest.raises(DataError, match="its columns are prompt, chosen"):
        subsets(["prompt", "chosen"])


@pytest.mark.parametrize("parquet", [False, True])
def test_columns_that_are_not_read_are_named_once(tmp_path, parquet):
    rows = [{**row, "context": "doc", "score": 2.5} for row in make_rows(3, seed=1)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    if parquet:
        path = tmp_path / "x.parquet"
        hf_datasets.Dataset.from_list(rows).to_parquet(path)
    assert parsed(path).unread == ["context", "score"]
    assert parsed(path, margin_column="score").unread == ["context"]
    source = DatasetConfig(path=str(path), columns=["prompt", "chosen", "rejected"])
    named = parse_rows(load_rows(source, "train"), source, "train", "", None, None, None)
    assert named.unread == []  # the recipe says so


def test_a_reason_says_what_it_was_in_its_first_row(tmp_path):
    row = make_rows(1, seed=1)[0]
    rows = [row, *({**row, "prompt": [{"role": role, "content": "a"}]} for role in ("judge", "narrator"))]
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows))
    assert split.details == {"unknown_role": "role 'judge'"}
    assert split.why_excluded() == "2 unknown_role, first in row 2: role 'judge'"


def test_a_parquet_files_rows_are_counted_as_rows(tmp_path):
    rows = [*make_rows(2, seed=1), {**make_rows(1, seed=2)[0], "chosen": ""}]
    path = tmp_path / "x.parquet"
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    split = parsed(path)
    assert split.first_rows == {"empty_response": ["3"]}
    hf_datasets.Dataset.from_list([{**row, "chosen": 5} for row in rows]).to_parquet(path)
    with pytest.raises(DataError, match="row 1: column 'chosen' should be a text"):
        parsed(path)


def test_prompts_that_differ_are_counted_whatever_became_of_them(tmp_path):
    question = "\n\nHuman: q\n\nAssistant:"
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"chosen": f"{question} a\n\nAssistant: b", "rejected": f"{question} c"},
        {"chosen": f"{question} a", "rejected": "\n\nHuman: p\n\nAssistant: c"},
        {"chosen": [user, reply], "rejected": [reply, reply]},
        {"chosen": f"{question} a", "rejected": f"{question} c"},
        {"chosen": f"{question} a\n\nAssistant: b", "rejected": f"{question} "},
    ]
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows))
    assert len(split.comparisons) == 2
    assert split.excluded == {"differing_prompts": 2, "empty_response": 1}
    assert split.differing_prompts == 4


def test_a_column_called_json_is_a_column_like_any_other(tmp_path):
    rows = [{**row, "json": "{}", "number": 7} for row in make_rows(2, seed=1)]
    path = tmp_path / "x.parquet"
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    assert parsed(path).column("row").tolist() == [1, 2]


def test_half_a_surrogate_pair_is_counted_in_a_text_and_replaced_in_a_name(tmp_path):
    row = make_rows(1, seed=1)[0]
    rows = [{**row, "subset": "\ud800"}, {**row, "chosen": "\ud800"}]
    split = parsed(write_jsonl(tmp_path / "x.jsonl", rows))
    assert split.comparisons["subset"][:] == ["?"]
    assert split.excluded == {"invalid_text": 1}


@pytest.mark.parametrize("processes", [None, 2])
def test_a_bad_line_is_named_however_many_processes_read(tmp_path, processes):
    path = write_jsonl(tmp_path / "x.jsonl", [{**row, "chosen": "a"} for row in make_rows(1_500, seed=1)])
    with path.open("a") as file:
        file.write('{"prompt": \n')
    with pytest.raises(DataError, match="line 1501: not JSON: Expecting value .column 11."):
        parsed(path, num_proc=processes)


def test_a_second_start_parses_nothing_and_other_settings_do(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", [{**row, "m": 1} for row in make_rows(5, seed=3)])
    first = parsed(path, "a")

    def refuse(*_):
        raise AssertionError("parsed again")

    monkeypatch.setattr(loading, "_parsed_row", refuse)
    again = parsed(path, "a")
    assert [again[n] for n in range(5)] == [first[n] for n in range(5)]
    for settings_ in ({"subset": "b"}, {"subset": "a", "margin_column": "m"}):
        with pytest.raises(AssertionError, match="parsed again"):
            parsed(path, **settings_)


def test_a_key_stands_for_its_texts_and_their_boundaries():
    assert text_key(["a", "b"]) == text_key(["a", "b"])
    assert len({text_key(texts) for texts in (["a", "b"], ["ab"], ["b", "a"], ["\ud800"], [])}) == 5


@needs_hh_rlhf
@pytest.mark.parametrize(
    ("subset", "split", "rows", "differing", "empty"),
    [
        ("harmless-base", "train", 1479, 2, 2),
        ("harmless-base", "test", 350, 2, 1),
        ("helpful-base", "train", 1552, 5, 4),
        ("helpful-base", "test", 350, 1, 0),
    ],
)
def test_genuine_hh_rlhf_rows_are_comparisons_but_for_empty_replies(subset, split, rows, differing, empty):
    """Those whose prompts differ all hold a reply that wrote its own `Assistant:`."""
    source = DatasetConfig(path=str(HH_RLHF), data_dir=subset)
    found = parse_rows(load_rows(source, split), source, split, subset, None, None, None)
    assert (found.rows, found.differing_prompts) == (rows, differing)
    assert found.excluded == ({"empty_response": empty} if empty else {})
    assert all(prompt[0]["role"] == "user" for prompt in found.comparisons["prompt"])
