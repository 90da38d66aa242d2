"""Preference data as people have it: each file of `hunt/` is read in its shape or refused in one sentence."""

import gzip
import json
import math
from pathlib import Path

import datasets as hf_datasets
import pytest
from conftest import make_rows, make_tokenizer, write_jsonl

from rm_recipe.data.comparison import Comparison, Excluded, Malformed
from rm_recipe.data.formats import parse_row, rows_of, shape_of
from rm_recipe.data.loading import read_name
from rm_recipe.data.splits import load_split, load_splits
from rm_recipe.data.tokenization import render, tokenize
from rm_recipe.errors import DataError, RecipeError, UnfitError
from rm_recipe.recipe.reader import DataArguments, read_columns, read_recipe
from rm_recipe.rl import as_item
from rm_recipe.scoring import read_items

HUNT = Path(__file__).parent / "hunt"

# File; the shape taken; comparisons; why rows are left out; a column not read; what the first prompt ends in.
# All other files are TRL preferences, 4 comparisons on how to cook rice.
READ = """
arena_conversations | Chatbot Arena (by conversation_a, conversation_b, winner) | 4 | all_tied | judge
assistant_first | whole conversations (hh-rlhf) (by chosen, rejected) | 4
chinese | TRL preference | 4 | | | 怎么煮米饭0\uff1f
chosen_response_cols | two replies by other names (by instruction, chosen_response, rejected_re | 4
chosen_swapped_messages | two replies (by messages, chosen, rejected) | 4
context_col | TRL preference | 4 | | context
control_tokens | TRL preference | 4 | | | (0)?
dahoas_rm_static | TRL preference | 4 | | response | The blue one.
distilabel_orca | two replies (by input, chosen, rejected) | 4 | | generations
helpsteer2_preference | HelpSteer 2 | 4 | | preference_statement
hh_single_newline | whole conversations | 4
html_entities | TRL preference | 4 | | | </p>
label_string | LLMBar, OffsetBias (by input, output_1, output_2, label) | 4
llamafactory_alpaca | two replies (by instruction, chosen, rejected) | 4
llamafactory_alpaca_old | LLaMA-Factory alpaca of old | 4
margin_as_string | TRL preference | 4 | | margin
multiturn_prompt_text_first_user | TRL preference | 4 | | | Any.
nul_and_emoji | TRL preference | 4 | | | \0
oasst_tree | OpenAssistant tree (by message_tree_id, prompt) | 4 | | tree_state
one_comparison | TRL preference | 1
one_prompt | TRL preference | 4 | | | Write a poem.
orca_dpo_pairs | two replies (by question, chosen, rejected) | 4
prompt_transcript_and_full_transcripts | TRL preference | 4 | | | Hi there 0
ranks_strings | ranking (by prompt, responses, ranks) | 4
reply_multi_messages_tool | TRL preference | 4 | | | 42
rewardbench2 | TRL preference | 4 | | num_correct
rmbench | TRL preference | 4 | | domain
score_chosen_lower | TRL preference | 4 | | score_rejected
scores_as_strings | ranking by scores (by prompt, responses, scores) | 4
shp | SHP (by history, human_ref_A, human_ref_B, labels) | 4 | | score_ratio
skywork | whole conversations | 4 | | source
some_rows_bad_type | TRL preference | 8
stack_exchange_paired | two replies by other names (by question, response_j, response_k) | 4 | | metadata
stack_exchange_preferences | Stack Exchange answers (by question, answers) | 4 | | date | </p>
summarize_from_feedback | summarize_from_feedback (by info, summaries, choice) | 4 | | worker | TL;DR:
tool_calls_empty_content | TRL preference | 4 | | | 42
tool_calls_null_content | TRL preference | 4 | | | 42
two_assistants | TRL preference | 4 | | | Let me see.
uf_no_overall | UltraFeedback (by instruction, completions) | 4
uf_rating_na | UltraFeedback | 4
ultrafeedback_binarized | TRL preference | 4 | | messages
ultrafeedback_original | UltraFeedback | 4 | | correct_answers
layouts/decimal_margin.parquet | TRL preference | 4 | | margin
layouts/decimal_scores.parquet | ranking by scores | 4
layouts/index.parquet | TRL preference | 4 | | __index_level_0__
layouts/int8_scores.parquet | ranking by scores | 4
layouts/large_list.parquet | whole conversations | 4
layouts/nan | TRL preference | 4 | | score
layouts/pretty.json | TRL preference | 3
remade/before | TRL preference | 4 | | | How do I boil rice number 0?
"""
REFUSED = """
agent_completions | its columns are prompt, completion; rm_recipe needs two replies or more in a row
diverge_earlier | 4 differing_prompts, first in row 1
ends_with_user | 4 ends_without_reply, first in row 1
guanaco_text | texts without a prompt are hh-rlhf transcripts
lfs_pointer | is a Git LFS pointer, not the file itself; fetch it: git lfs pull
pku_saferlhf | say which one: 'columns: {verdict: better_response_id} or {verdict: safer_response_id}'
python_repr_in_string | write messages as JSON, not by Python's str()
reply_is_tool_call | 4 tool_calls, first in row 1 (a reply is a call of a tool)
rewardbench_folder | has no split 'train'; it has filtered, raw
trl_standard_implicit | 4 not_a_transcript
layouts/bool_scores.parquet | 4 missing_scores, first in row 1 (scores: [True, False])
layouts/columns.json | not_messages
layouts/data_field.json | its columns are version, data
layouts/list_in | a file that is one list is named .json
layouts/noext | is no data file; expected .jsonl, .ndjson, .json, .parquet, .csv, .tsv, .arrow (.gz too)
layouts/pretty_objects | line 1: not JSON
layouts/trailing_comma.json | the list: not JSON
layouts/utf16 | 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; save it as UTF-8
"""
# Templates, and what the tests below or others' try: input of `score`, data made anew.
ELSEWHERE = {"score", "layouts", "remade", "gemma_template.jinja", "r1_template.jinja", "date_template.jinja"}


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in f"{line} | | | |".split(" |")] for line in text.strip().splitlines()]


PATHS = (*HUNT.glob("*"), *HUNT.glob("layouts/*"))
FILES = {str(path.relative_to(HUNT)).removesuffix(".jsonl") for path in PATHS}
OTHERS = sorted(FILES - ELSEWHERE - {row[0] for row in table(READ + REFUSED.lstrip())})


def at(name: str) -> Path:
    path = HUNT / name
    return path if path.exists() else path.with_name(f"{path.name}.jsonl")


def load(path, split=None, **keys):
    return load_split(DataArguments(dataset_name=str(path), **keys), split, margins="margin_column" in keys)


@pytest.mark.parametrize("row", table(READ + "".join(f"{name} | TRL preference | 4\n" for name in OTHERS)))
def test_a_file_in_a_shape_that_people_have_is_read(row):
    name, shape, n, left_out, unread, end = row[:6]
    split = load(at(name))
    assert split.shapes[0].startswith(shape)
    assert (len(split.comparisons), list(split.excluded)) == (int(n), [left_out] if left_out else [])
    assert unread in split.unread if unread else not split.unread
    asked = split[0].prompt[-1]["content"]
    assert asked.endswith(end.replace("\\0", "\0")) if end else "How do I cook rice number 0?" in asked
    told = [comparison.responses for comparison in split]
    if "Start slowly" in told[0][0] + told[0][-1] and name not in ("accuracy_zero", "arena_conversations"):
        assert all("Start slowly" in replies[0] and "Start slowly" not in replies[-1] for replies in told)


@pytest.mark.parametrize("row", table(REFUSED), ids=lambda row: row[0])
def test_a_file_that_is_no_preference_data_is_refused_in_one_sentence(row):
    with pytest.raises(DataError) as caught:
        load(at(row[0]))
    assert row[1] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- shapes ------------------------------------------------------------------------------------


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASKED, GOOD, BAD = said("user", "Hi"), said("assistant", "good"), said("assistant", "bad")
CHOICE, SCORES = {"response_0": "bad", "response_1": "good"}, {"score_0": -0.5, "score_1": 0.5}
# Published shapes of which no file is in `hunt/`; in each `good` is better than `bad`.
PUBLISHED = [
    {"prompt": "Hi", "chosen_response": "good", "rejected_response": "bad"},
    {"messages": [ASKED], "chosen_response": GOOD, "rejected_response": BAD},
    {"context": [ASKED], "completions": [{"rank": n, "completion": [m]} for n, m in ((1, BAD), (0, GOOD))]},
    {"messages": [ASKED, GOOD], "rejected_response": "bad"},
    {"prompt": "Ho", "messages": [ASKED, GOOD], "rejected_response": "bad"},
    {"instruction": "Hi", "input": math.nan, "chosen": "good", "rejected": "bad"},
    {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": GOOD, "rejected": BAD},
    {"instruction": "Hi", "generations": ["bad", "good"], "ratings": [1, 4]},
    {"messages": [ASKED], "generations": ["bad", "good"], "ratings": [1, 4]},
    {
        "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        "completions": [
            {"score": score, "completion": {"role": "model", "parts": [{"text": text}]}}
            for score, text in enumerate(("bad", "good"))
        ],
    },
    {"prompt": "Hi", "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}]},
    {"prompt": "Hi", **CHOICE, "better_response_id": 1},
    {"question": {"full_text": "Hi"}, "answer_0": "bad", "answer_1": "good", **SCORES},
    {"prompt": "Hi", "response_1": "good", "response_2": "bad", "preference_strength": -2.0},
    {"context": [ASKED], "response1": "bad", "response2": "good", "overall_preference": 3},
    {f"response_{side}": f'["{text}"]' for side, text in (("a", "bad"), ("b", "good"))}
    | {"prompt": '["Hi"]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    {"question": "Hi", "response_A": "good", "response_B": "bad", "label": "A>B"},
    {"prompt": "Hi", "responses": '["bad", "good"]', "scores": "[1, 2]"},
    {"input": "Hi", "accepted": "good", "rejected": "bad"},
    {"question": "Hi", "history": [], "response_chosen": "good", "response_rejected": "bad"},
    {"trajectory": [{"from": "user", "value": "Hi"}], "chosen": "good", "rejected": "bad"},
    {"prompt": "Hi", "initial_reason_steps": "", "chosen": "good", "rejected": "bad", "full_chosen": "x"},
    {"instruction": "Hi", "output_1": "bad", "output_2": "good", "label": 2},
    {"instruction": "Hi", "input": "", "output_1": "bad", "output_2": "good", "preference": 2},
    {"prompt": "Hi", "response_a": "bad", "response_b": "good", "winner": "model_b"},
    {"question": "Hi", "response_a": "good", "response_b": "bad", "preferred": "Response A"},
    {"prompt": "Hi", "response_1": "bad", "response_2": "good", "model_1": "x", "winner": "model_2"},
    {"prompt": "Hi", "response_A": "bad", "response_B": "good", "preference": "Response_B"},
    {"messages_a": [ASKED, BAD], "messages_b": [ASKED, GOOD], "winner": "model_b"},
    {"conv_A": [ASKED, BAD], "conv_B": [ASKED, GOOD], "conv_A_rating": 0.0, "conv_B_rating": 1.0},
    {f"orig_response_{side}": text for side, text in (("A", "bad"), ("B", "good"))}
    | {"orig_instruction": "Hi", "orig_preference": "B", "instruction": "###Task", "output": "B"},
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: shape_of(row).name)
def test_a_published_shape_says_which_reply_is_better(row):
    assert parse_row(row) == Comparison([ASKED], ["good", "bad"])


def test_tools_of_openai_stand_beside_the_messages():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    row = {"input": {"messages": [ASKED], "tools": tools}}
    found = parse_row({**row, "preferred_output": [GOOD], "non_preferred_output": [BAD]})
    assert json.loads(found.tools) == tools


def test_a_system_instruction_of_gemini_is_the_system_message():
    row = next(row for row in PUBLISHED if "contents" in row)
    told = {"role": None, "parts": [{"text": "Be "}, {"text": "terse."}]}  # as a table has it
    found = parse_row({**row, "system_instruction": told})
    assert found.prompt == [said("system", "Be terse."), ASKED]


def test_a_history_that_only_later_rows_have_is_read(tmp_path):
    row = {"instruction": "And", "input": "you?", "chosen": "good", "rejected": "bad"}
    rows = [row, {**row, "history": [["Hi", "Hello"]]}]
    split = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [len(prompt) for prompt in split.comparisons["prompt"]] == [1, 3]
    assert not split.unread


def test_a_history_comes_before_a_question_of_text_or_of_messages():
    row = {"question": "So?", "history": [["Hi", "good"]], "response_chosen": "a", "response_rejected": "b"}
    expected = Comparison([ASKED, GOOD, said("user", "So?")], ["a", "b"])
    assert parse_row(row) == parse_row({**row, "question": [said("user", "So?")]}) == expected
    ours = {"prompt": "So?", "history": [ASKED, GOOD], "chosen": "a", "rejected": "b"}
    assert parse_row(ours) == parse_row({**ours, "prompt": expected.prompt}) == expected  # once
    for unasked in (None, ""):
        with pytest.raises(Excluded, match="prompt_ends_with_reply"):
            parse_row({**ours, "prompt": unasked})
    for empty in (None, "", [], "[]", "So?"):  # the last as SHP's, of which a prompt was made
        assert parse_row({**ours, "history": empty}).prompt == expected.prompt[-1:]


@pytest.mark.parametrize("written", ["", "Step 1: a.\nStep 2:"])
def test_both_replies_of_math_step_dpo_begin_with_their_steps_once(written):
    steps = "Step 1: a.\nStep 2:"
    row = {"initial_reason_steps": steps, "chosen": f"{written} b", "rejected": f"{written} c"}
    assert parse_row({"prompt": "Hi", **row}) == Comparison([ASKED], [f"{steps} b", f"{steps} c"])


def test_what_no_question_can_be_made_of_is_no_question():
    summaries = {"summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    with pytest.raises(Excluded, match="empty_prompt"):
        parse_row({"info": {"id": "x"}, **summaries})
    arena = {"prompt": '["Hi", "And?"]', "winner_model_a": 1, "winner_model_b": 0}
    with pytest.raises(Excluded, match="not_messages"):
        parse_row({**arena, "response_a": '["a", "b"]', "response_b": '["c"]'})


def test_a_prompt_beside_other_sets_answers_does_not_make_them_another_sets():
    row = {"prompt": "Hi", "question": "Hi", "answers": []}
    with pytest.raises(DataError, match="fits Nectar .* and Stack Exchange answers "):
        shape_of(row)


@pytest.mark.parametrize(
    "replies",
    [
        {"chosen": "good", "rejected": "bad"},
        {"chosen_response": "good", "rejected_response": "bad"},
        {"response_a": "bad", "response_b": "good", "winner": "b"},
        {"output_1": "good", "output_2": "bad", "label": 1},
    ],
)
def test_the_input_of_an_instruction_and_the_history_before_it_are_part_of_any_prompt(replies):
    row = {"instruction": "Add", "input": "1 and 2", "history": [["Hi", "good"]], **replies}
    assert parse_row(row) == Comparison([ASKED, GOOD, said("user", "Add\n1 and 2")], ["good", "bad"])


def test_a_verdict_by_itself_may_say_what_the_values_of_a_known_shape_mean(tmp_path):
    row = {"prompt": "Hi", "response_a": "bad", "response_b": "good", "label": 1.0}
    path = write_jsonl(tmp_path / "x.jsonl", [row, {**row, "label": 2}])
    found = load(path, columns={"verdict": "label=0/1/2"})
    assert [found[0].responses, found.excluded["all_tied"]] == [["good", "bad"], 1]
    path = write_jsonl(tmp_path / "y.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b", "verdict": 1}])
    with pytest.raises(DataError, match="its columns are prompt, chosen, rejected, verdict; rm_recipe needs"):
        load(path, columns={"verdict": "verdict"})


def test_a_strength_beside_another_verdict_may_have_no_sign_and_is_asked_for(tmp_path):
    row = {"prompt": "Hi", "response_1": "good", "response_2": "bad", "preference_strength": 3, "winner": 1}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(
        DataError, match=r"say which one: .*\{verdict: preference_strength\} or \{verdict: winner\}"
    ):
        load(path)
    assert load(path, columns={"verdict": "winner"})[0].responses == ["good", "bad"]


def test_scores_of_two_kinds_are_never_compared():
    kinds = ({"overall_score": 6.0, "fine-grained_score": 2.0}, {"fine-grained_score": 4.5})
    texts = [{"response": text, **scores} for text, scores in zip(("bad", "good"), kinds, strict=True)]
    assert parse_row({"instruction": "Hi", "completions": texts}) == Comparison([ASKED], ["good", "bad"])
    del texts[0]["fine-grained_score"]
    with pytest.raises(Excluded, match="missing_overall_score"):
        parse_row({"instruction": "Hi", "completions": texts})


def test_a_number_that_is_no_replys_may_be_asked_for_as_a_strength(tmp_path):
    row = {"prompt": "Hi", "response_1": "bad", "response_2": "good", "preference": 3}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError, match="not int '3'; read as two numbered replies") as caught:
        load(path)
    assert "by COLUMN=strength" in str(caught.value)
    assert load(path, columns={"verdict": "preference=strength"})[0].responses == ["good", "bad"]


def test_half_of_two_replies_numbers_is_a_tie_and_so_is_an_equals_sign():
    for row in (
        {"instruction": "Hi", "output_1": "bad", "output_2": "good", "preference": 1.5},
        {"question": "Hi", "response_A": "bad", "response_B": "good", "label": "A=B"},
    ):
        with pytest.raises(Excluded, match="all_tied"):
            parse_row(row)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        ("response_a response_b", "B A"),
        ("response_a response_b", "response_b response_a"),
        ("answer1 answer2", "2 1"),
        ("gpt4 Llama", "llama GPT4"),
    ],
)
def test_a_pair_of_columns_names_is_no_pair_of_replies(tmp_path, names, values):
    texts = dict(zip(names.split(), ("bad", "good"), strict=True))
    row = {"prompt": "Hi", **dict(zip(("chosen", "rejected"), values.split(), strict=True))}
    path = write_jsonl(tmp_path / "x.jsonl", [{**row, **texts}])
    for columns in (None, {"prompt": "prompt"}):
        with pytest.raises(
            DataError, match="1 column_names, first in row 1 .*'verdict: chosen'; or 'chosen: cho"
        ):
            load(path, columns=columns)
    replies = {"prompt": "prompt", **dict(zip(("chosen", "rejected"), texts, strict=True))}
    assert load(path, columns={**replies, "verdict": "chosen"})[0].responses == ["good", "bad"]
    assert load(path, columns={"chosen": "chosen"})[0].responses == values.split()
    assert load(write_jsonl(tmp_path / "y.jsonl", [row]))[0].responses == values.split()  # of nothing else
    chance = [{**row, **texts}, {**row, "chosen": "good"}]
    assert load(write_jsonl(tmp_path / "z.jsonl", chance)).excluded == {"column_names": 1}


def test_the_best_of_four_is_better_than_each_other_and_those_tie():
    row = {f"first_turn_response_{letter}": letter for letter in "abcd"} | {"first_turn_prompt": "Hi"}
    found = parse_row({**row, "first_turn_preferred_response": "response_c"})
    assert found == Comparison([ASKED], ["c", "a", "b", "d"], [0, 1, 1, 1])
    for missing in (None, "", float("nan")):
        with pytest.raises(Excluded, match="missing_first_turn_preferred_response"):
            parse_row({**row, "first_turn_preferred_response": missing})


def test_a_verdict_may_be_the_model_or_the_text_of_the_better_reply(tmp_path):
    pair = {"prompt": "Hi", "response_a": "bad", "response_b": "good"}
    conversations = {"conversation_a": [ASKED, BAD], "conversation_b": [ASKED, GOOD]}
    models = {"model_a": "gpt-4", "model_b": "llama_3", "winner": "llama_3"}
    expected = Comparison([ASKED], ["good", "bad"])
    assert parse_row({**pair, **models}) == parse_row({**conversations, **models}) == expected
    assert parse_row({**pair, "preferred": "good"}) == expected
    with pytest.raises(Excluded, match="verdict_fits_both"):
        parse_row({**pair, **models, "model_a": "llama_3"})
    with pytest.raises(Malformed):  # the second of 0 and 1, or the first reply?
        parse_row({"prompt": "Hi", "response_a": "1", "response_b": "0", "preferred": "1"})
    path = write_jsonl(tmp_path / "x.jsonl", [{**pair, "name_a": "x", "name_b": "y", "best": "y"}])
    replies = {"prompt": "prompt", "chosen": "response_a", "rejected": "response_b"}
    assert load(path, columns={**replies, "verdict": "best=name_a/name_b"})[0].responses == ["good", "bad"]


def test_a_value_that_is_named_for_a_reply_and_means_a_tie_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "Hi", "a1": "x", "a2": "y", "label": "same"}])
    named = {"prompt": "q", "chosen": "a1", "rejected": "a2", "verdict": "label=same/other"}
    with pytest.raises(DataError, match="line 1: column 'label' should be one of same, other, "):
        load(path, columns=named)


def test_a_pair_that_was_made_of_rated_replies_is_read_as_the_pair():
    rated = {"messages": [ASKED], "instruction": "Hi", "generations": ["bad", "good"], "ratings": [1, 2]}
    pair = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    assert shape_of({**rated, **pair}).name == "TRL preference"


# --- columns that a recipe names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "verdict", "means"),
    [
        ("response_a response_b", "label", {0: "response_a a A model_a", 1: "b B", None: "tie Equal"}),
        ("Answer1 Answer2", "label", {0: "1 answer1", 1: "2 Answer2", None: "both"}),
        ("answer_0 answer_1", "label=0/1", {0: "0", 1: "1.0", None: "Tie both"}),
        ("gpt4 llama", "label", {0: "gpt4", 1: "llama"}),
        ("left right", "label", {0: "left", 1: "Right"}),
        ("response_a response_b", "label=1/2", {0: "1", 1: "2"}),
        ("response_a response_b", "label=1/0/2", {0: "1", 1: "0", None: "2"}),
        ("output_1 output_2", "label=A>B/B>A/A=B", {0: "A>B", 1: "B>A", None: "A=B"}),
        ("response_a response_b", "label=1|2|3/5|6|7/4", {0: "1 2 3", 1: "5 6 7", None: "4"}),
        ("response_a response_b", "label=strength", {0: "-3 -0.5", 1: "2", None: "0"}),
    ],
)
def test_a_named_verdict_is_a_reply_by_its_column_or_what_the_recipe_says(tmp_path, columns, verdict, means):
    names = columns.split()
    cases = [(number, value) for number, values in means.items() for value in values.split()]
    rows = [{"q": f"Q {value}", **dict(zip(names, "xy", strict=True)), "label": value} for _, value in cases]
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, {**rows[0], "label": None}])
    split = load(path, columns={"prompt": "q", "chosen": names[0], "rejected": names[1], "verdict": verdict})
    told = {one.prompt[0]["content"]: one.responses[0] for one in split}
    assert told == {f"Q {value}": "xy"[number] for number, value in cases if number is not None}
    assert split.excluded["missing_verdict"] == 1


@pytest.mark.parametrize(
    ("columns", "value"), [("response_a response_b", 1), ("answer_1 answer_2", 0), ("answer_0 answer_1", 1)]
)
def test_a_number_that_no_column_has_is_refused_with_how_to_say_what_it_means(tmp_path, columns, value):
    names = columns.split()
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "Hi", names[0]: "x", names[1]: "y", "label": value}])
    asked = {"prompt": "q", "chosen": names[0], "rejected": names[1], "verdict": "label"}
    with pytest.raises(DataError, match=f"line 1: column 'label' .*one of {names[0]}[/,].*verdict: COLUMN="):
        load(path, columns=asked)
    assert load(path, columns={**asked, "verdict": f"label={1 - value}/{value}"})[0].responses == ["y", "x"]


# Columns that nothing reads, the prompt first and the good reply next; then a verdict, if there is one.
UNKNOWN = """
Prompt,Chosen,Rejected
User Prompt,Good Answer,Bad Answer
problem,preferred,dispreferred
question,BestReply,WorstReply
prompt,completion_a,completion_b,preferred=a
question,answer1,answer2,choice=1
text prompt,left completion A,left completion B,winner=A
prompt,reply0,reply1,label=reply0
prompt,chosen_text,rejected_text
prompt,chosen_messages,rejected_messages
query,positive,negative
query,response,rejected_response
prompt,preferred,rejected
prompt,preferred_output,non_preferred_output
context,edited_response,original_response
question,chosen,reject
prompt,pos_resp,neg_resp
instruction,left_answer,right_answer,result=left
problem,correct_solution,incorrect_solution
"""


@pytest.mark.parametrize("line", UNKNOWN.split("\n")[1:-1])
def test_the_columns_that_a_refusal_proposes_read_the_file(tmp_path, line):
    head, _, verdict = line.partition("=")
    names = head.split(",")
    cells = dict(zip(names, ["Hi", "good", "bad", verdict], strict=False))
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt_id": "z", "a_id": "x", "b_idx": 1, **cells}])
    with pytest.raises(DataError, match="others are named by 'columns: ") as caught:
        load(path)
    proposed = read_columns(str(caught.value).rpartition("'columns: ")[2].removesuffix("'"))
    found = load(path, columns=proposed)
    assert (found[0].prompt, found[0].responses) == ([ASKED], ["good", "bad"])
    assert {*found.unread} == {"prompt_id", "a_id", "b_idx"}


def proposed_in(error) -> dict[str, str]:
    return read_columns(str(error.value).rpartition("'columns: ")[2].partition("'")[0])


def test_a_ranking_by_other_names_and_an_unread_prompt_are_proposed_too(tmp_path):
    row = {"messages": [ASKED], "model": "x", "completions": ["bad", "good"]}
    for name, numbers in (("rewards", [0, 1]), ("ranks", [2, 1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{**row, name: numbers}])
        with pytest.raises(DataError, match="others are named by 'columns: ") as caught:
            load(path)
        assert load(path, columns=proposed_in(caught))[0] == Comparison([ASKED], ["good", "bad"])
    row = {"question": "Hi", "answers": ["bad", "good"], "ratings": [1, 2]}  # not Stack Exchange's
    path = write_jsonl(tmp_path / "y.jsonl", [row])
    with pytest.raises(DataError, match="list of mappings .*; read as Stack Exchange .*; another") as caught:
        load(path)
    assert load(path, columns=proposed_in(caught))[0] == Comparison([ASKED], ["good", "bad"])
    path = write_jsonl(tmp_path / "x.jsonl", [{"context": [ASKED], "chosen": GOOD, "rejected": BAD}])
    with pytest.raises(DataError, match="1 empty_prompt, .*columns not read: context") as caught:
        load(path)
    assert load(path, columns=proposed_in(caught))[0] == Comparison([ASKED], ["good", "bad"])


def test_a_prompt_by_another_name_keeps_its_input_and_has_a_history(tmp_path):
    row = {"instruction": "Add", "input": "1 and 2", "before": [ASKED, GOOD], "best": "a", "worst": "b"}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    named = {"prompt": "instruction", "history": "before", "chosen": "best", "rejected": "worst"}
    found = load(path, columns=named)
    assert found[0] == Comparison([ASKED, GOOD, said("user", "Add\n1 and 2")], ["a", "b"])
    assert not found.unread


def test_of_two_prompts_either_can_be_asked_for_by_what_the_refusal_says(tmp_path):
    row = {"question": "Hi", "instruction": "Ho", "chosen": "good", "rejected": "bad"}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError, match="fits two replies .* say which one: 'columns: ") as caught:
        load(path)
    ways = str(caught.value).rpartition("'columns: ")[2].removesuffix("'").split(" or ")
    assert [load(path, columns=read_columns(way))[0].prompt[0]["content"] for way in ways] == ["Hi", "Ho"]


def node(role, text, *replies, **rank):
    """A node of a tree, with what follows it."""
    return {"role": role, "text": text, "replies": list(replies), **rank}


def test_a_tree_is_a_comparison_for_each_question_with_ranked_replies():
    replies = [node("assistant", text, rank=rank) for text, rank in (("no", None), ("y", 0), ("z", 1))]
    good = node("assistant", "good", node("prompter", "More", *replies), rank=0)
    row = {"prompt": node("prompter", "Hi", node("assistant", "bad", rank=1), good), "message_tree_id": "a"}
    first, second = (parse_row(part, shape=shape_of(row)) for part in rows_of(row, shape_of(row)))
    assert first == Comparison([ASKED], ["good", "bad"])
    assert second == Comparison([ASKED, GOOD, said("user", "More")], ["y", "z"])


def test_the_strength_of_a_preference_can_be_its_margin():
    split = load(at("helpsteer2_preference"), margin_column="preference_strength")
    assert [abs(margins[0]) for margins in split.comparisons["margins"]] == [1, 1, 3, 1]


def test_a_file_that_fits_two_shapes_names_both_and_columns_say_which_is_meant(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "responses": ["c", "d"], "scores": [1, 2]}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError, match=r"fits TRL preference .* and ranking by scores .* or \{.prompt.: "):
        load(path)
    assert load(path, columns={"scores": "scores"})[0].responses == ["d", "c"]
    assert load(path, columns={"chosen": "rejected", "rejected": "chosen"})[0].responses == ["b", "a"]
    for name, best in (("better", "Start slowly"), ("safer", "No idea")):
        split = load(at("pku_saferlhf"), columns={"verdict": f"{name}_response_id"})
        assert split[0].responses[0].startswith(best)


def test_columns_name_what_a_data_set_calls_otherwise(tmp_path, write_recipe):
    row = {"question": "q", "best": "a", "worst": "b", "prompt": "not this", "sys": "Be terse."}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    named = {"prompt": "question", "chosen": "best", "rejected": "worst", "system": "sys"}
    split = load(path, columns=named)
    assert [message["content"] for message in split[0].prompt] == ["Be terse.", "q"]
    assert (split[0].responses, split.unread) == (["a", "b"], ["prompt"])
    assert split.shapes == ["TRL preference (by question, best, worst)"]
    with pytest.raises(DataError, match="its columns are .*; rm_recipe needs"):  # of two replies only one
        load(path, columns={"chosen": "best", "verdict": "worst"})
    with pytest.raises(DataError, match="and not other"):
        load(path, columns={**named, "chosen": "other"})
    for wrong in ({"chosn": "best"}, {"chosen": "best", "rejected": "best"}, ["chosen"]):
        with pytest.raises(RecipeError, match="'columns: "):
            read_recipe(write_recipe(dataset_name=str(path), columns=wrong))
    path = write_jsonl(tmp_path / "y.jsonl", [{"m": 2, **row} for row in make_rows(4, seed=1)])
    entry = {"path": str(path), "columns": ["prompt", "chosen", "rejected", "m"]}  # TRL's list
    recipe = read_recipe(write_recipe(dataset_name="omit", datasets=[entry], margin_column="m"))
    assert load_splits(recipe)[0][0].margins == [2]


# --- files, folders and splits -----------------------------------------------------------------


def test_splits_have_other_names_shards_and_slices(tmp_path):
    rows = make_rows(10, seed=1)
    (tmp_path / "clone" / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:6], rows[6:])):
        name = f"train_prefs-0000{number}-of-00002-abc.parquet"
        hf_datasets.Dataset.from_list(part).to_parquet(tmp_path / "clone" / "data" / name)
    slices = {"train": [*range(1, 11)], "train[:4]": [1, 2, 3, 4], "train[-20%:]": [9, 10]}
    for spec, numbers in {**slices, "train_prefs[3:5]": [4, 5]}.items():
        assert load(tmp_path / "clone", spec).column("row").tolist() == numbers
    with pytest.raises(DataError, match="split 'train.:x.' cannot be read"):
        load(tmp_path / "clone", "train[:x]")
    assert len(load(tmp_path / "clone", "test").comparisons) == 10  # the only split, for `evaluate --dataset`
    write_jsonl(tmp_path / "held" / "test.jsonl", rows)
    with pytest.raises(DataError, match="no split 'train'; it has test"):
        load(tmp_path / "held", "train")
    assert load(HUNT / "rewardbench_folder", "raw").rows == 4


def test_folders_of_the_splits_names_are_splits_and_others_are_named(tmp_path, write_recipe):
    rows = make_rows(10, seed=1)
    for place, part in {"train/0000": rows[:4], "train/0001": rows[4:8], "test/0000": rows[8:]}.items():
        path = tmp_path / "sets" / "data" / "en" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        hf_datasets.Dataset.from_list(part).to_parquet(path)
    with pytest.raises(DataError, match=r"name them in 'dataset_subsets': \['data/en'\]"):
        load(tmp_path / "sets")
    recipe = write_recipe(dataset_name=str(tmp_path / "sets"), dataset_subsets=["data/en"])
    assert [len(split.comparisons) for split in load_splits(read_recipe(recipe))[:2]] == [8, 2]


def test_folders_of_splits_may_be_saved_to_disk_and_hold_what_is_no_comparison(tmp_path):
    for name in ("train", "test"):
        hf_datasets.Dataset.from_list(make_rows(3, seed=1)).save_to_disk(tmp_path / "saved" / name)
        write_jsonl(tmp_path / "files" / name / "0.jsonl", make_rows(3, seed=1))
        (tmp_path / "files" / name / "about.json").write_text('{\n"rows": 3}')
    assert load(tmp_path / "saved", "test").rows == load(tmp_path / "files", "test").rows == 3


def test_what_macos_leaves_beside_a_file_is_no_split(tmp_path, write_recipe):
    path = write_jsonl(tmp_path / "data" / "train.jsonl", make_rows(10, seed=1))
    path.with_name("._train.jsonl").write_bytes(b"\0\5")
    train, test, _ = load_splits(read_recipe(write_recipe(dataset_name=str(path.parent))))
    assert len(train.comparisons) + len(test.comparisons) == 10


def test_slices_of_one_file_are_what_is_trained_on_and_what_is_held_out(tmp_path, write_recipe):
    path = write_jsonl(tmp_path / "x.jsonl", make_rows(10, seed=1))
    slices = {"dataset_train_split": "train[:8]", "dataset_test_split": "train[80%:]"}
    train, test, _ = load_splits(read_recipe(write_recipe(dataset_name=str(path), **slices)))
    assert train.column("row").tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(test.column("row").tolist()) == [9, 10]


def test_an_ending_may_be_in_capitals_and_a_table_of_tabs(tmp_path):
    row = json.dumps(make_rows(1, seed=1)[0]).encode()
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(row))
    (tmp_path / "b.tsv").write_text("prompt\tchosen\trejected\na, b\tc\td\n")
    assert load(tmp_path / "A.JSONL.GZ").rows == 1
    assert load(tmp_path / "b.tsv")[0].prompt == [{"role": "user", "content": "a, b"}]


@pytest.mark.parametrize(
    ("table", "refusal"),
    [
        ("prompt,chosen,rejected\na,b,c\nHi,Yes, sure,No\n", "row 2: more cells than the header has"),
        ("prompt,chosen,rejected,chosen\na,b,c,d\n", "two columns of the same name: chosen"),
        ('prompt,chosen,rejected\na,b,c\nHi,"a \\"b\\" c",d\n', "read after row 1: .* written twice"),
        ('prompt,chosen,rejected\nHi,"b,c\nHo,d,e\n', "cannot be read: unexpected end of data"),
    ],
)
def test_a_table_whose_cells_are_not_under_their_columns_is_refused(tmp_path, table, refusal):
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(DataError, match=refusal):
        load(tmp_path / "x.csv")


def test_empty_cells_beyond_a_tables_header_are_none(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,,\nHi,a,b,,,,\n")
    assert load(tmp_path / "x.csv")[0].responses == ["a", "b"]


def test_a_data_set_of_evaluate_is_named_with_subset_split_and_revision(tmp_path):
    keys = {"dataset_name": "Anthropic/hh-rlhf", "dataset_subsets": ["harmless-base"]}
    assert read_name("Anthropic/hh-rlhf:harmless-base") == keys
    every = keys | {"dataset_test_split": "test[:20]", "dataset_revision": "09be8c5"}
    assert read_name("Anthropic/hh-rlhf:harmless-base@test[:20]#09be8c5") == every
    odd = write_jsonl(tmp_path / "a:b@c#d.jsonl", [])
    assert read_name(str(odd)) == {"dataset_name": str(odd)}
    for windows in (r"C:\data\x.jsonl", "d:/data/x.jsonl"):  # a drive is no subset
        assert read_name(windows) == {"dataset_name": windows}
        assert read_name(f"{windows}:sub@raw")["dataset_subsets"] == ["sub"]
    assert read_name(f"{tmp_path}@raw") == {"dataset_name": str(tmp_path), "dataset_test_split": "raw"}


# --- templates, tools and special tokens ---------------------------------------------------------

CALLING = "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
CALLING += "{{ c.function.name }}={{ c.function.arguments.n }}{% endfor %}</s>{% endfor %}"


@pytest.mark.parametrize("name", ["tool_calls_empty_content", "tool_calls_null_content"])
def test_calls_of_tools_are_rendered_or_counted_where_the_template_shows_none(name):
    tokenizer, split = make_tokenizer(), load(at(name))
    with pytest.raises(DataError, match="4 tools, first in row 1 .the template does not show 'lookup'"):
        tokenize(split, tokenizer, None, "exclude")
    tokenizer.chat_template = CALLING
    assert len(tokenize(split, tokenizer, None, "exclude").comparisons) == 4
    text = render(tokenizer, split[0].prompt, split[0].tools)
    assert "lookup=0</s>tool: 42" in text
    assert "'description': 'd'" in text


@pytest.mark.parametrize(
    ("name", "template", "left_out", "said"),
    [
        ("gemma_system_half", "gemma_template", 2, "System role not supported"),
        ("r1_think", "r1_template", 2, "identical_after_tokenization"),
    ],
)
def test_what_a_template_cannot_take_is_said(name, template, left_out, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (HUNT / f"{template}.jinja").read_text()
    found = tokenize(load(at(name)), tokenizer, None, "exclude")
    assert found.excluded.total() == left_out
    assert said in str(found.first_rows)
    assert (found.comparisons["unshown"][0] == "reply") is (name == "r1_think")


def test_where_all_is_too_long_the_refusal_says_what_to_raise():
    with pytest.raises(DataError, match="4 too_long, first in row 1; raise 'max_length'"):
        tokenize(load(at("one_prompt")), make_tokenizer(), 16, "exclude")


# --- what others read --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((HUNT / "score").iterdir()), ids=lambda path: path.name)
def test_input_of_score_is_read_as_training_reads_it_or_refused(path):
    try:
        assert all(item["prompt"] and isinstance(item["response"], str) for item in read_items(path).values())
    except (DataError, UnfitError) as refusal:
        assert path.name in ("completion.jsonl", "msgs.jsonl", "resp_msgs.jsonl")
        assert "expected a 'prompt' and a 'response' text" in str(refusal)


def test_what_a_rollout_hands_over_is_never_an_exception():
    for row in map(json.loads, at("agent_completions").open()):
        item = as_item(row["prompt"], row["completion"])
        assert item is None or isinstance(item["response"], str)
