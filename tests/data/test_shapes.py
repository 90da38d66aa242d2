"""Preference data as people have it: each file of `hunt/` is read in its shape, or refused in one sentence."""

import gzip
import json
from pathlib import Path

import datasets as hf_datasets
import pytest
from conftest import make_rows, make_tokenizer, write_jsonl

from rm_recipe.data.formats import parse_row, rows_of, shape_of
from rm_recipe.data.loading import read_name
from rm_recipe.data.splits import load_split, load_splits
from rm_recipe.data.tokenization import render, tokenize
from rm_recipe.errors import DataError, RecipeError, UnfitError
from rm_recipe.recipe.reader import DataArguments, read_recipe
from rm_recipe.rl import as_item
from rm_recipe.scoring import read_items

HUNT = Path(__file__).parent / "hunt"

# File; the shape that is taken; comparisons; rows left out; a column that is not read; its first prompt ends in.
READ = """
accuracy_zero | TRL preference (by prompt, chosen, rejected) | 4
arena_conversations | Chatbot Arena (by conversation_a, conversation_b, winner) | 4 | all_tied | model_a
assistant_first | whole conversations (hh-rlhf) (by chosen, rejected) | 4
chinese | TRL preference | 4 | | | 怎么煮米饭0？
chosen_response_cols | chosen_response to an instruction (by instruction, chosen_response, rejected_response) | 4
chosen_swapped_messages | messages and two replies (by messages, chosen, rejected) | 4
content_parts | TRL preference | 4
context_col | TRL preference | 4 | | context
control_tokens | TRL preference | 4 | | | (0)?
dahoas_rm_static | TRL preference | 4 | | response | The blue one.
developer_role | TRL preference | 4
distilabel_orca | distilabel (by input, chosen, rejected) | 4 | | generations
five_rows | TRL preference | 4
gemma_system | TRL preference | 4
gemma_system_half | TRL preference | 4
helpsteer2_preference | HelpSteer 2 | 4 | | preference_statement
html_entities | TRL preference | 4 | | | </p>
json_in_string | TRL preference | 4
label_string | LLMBar (by input, output_1, output_2, label) | 4
llamafactory_alpaca | LLaMA-Factory alpaca (by instruction, input, chosen, rejected) | 4
llamafactory_alpaca_old | LLaMA-Factory alpaca of old | 4
margin_as_string | TRL preference | 4 | | margin
multiturn_prompt_text_first_user | TRL preference | 4 | | | Any.
nul_and_emoji | TRL preference | 4 | | | \0
oasst_tree | OpenAssistant tree (by message_tree_id, prompt) | 4 | | tree_state
one_comparison | TRL preference | 1
one_prompt | TRL preference | 4 | | | Write a poem.
orca_dpo_pairs | orca_dpo_pairs (by question, chosen, rejected) | 4
prompt_and_system_column | TRL preference | 4
prompt_transcript_and_full_transcripts | TRL preference | 4 | | | Hi there 0
r1_think | TRL preference | 4
ranks_strings | ranking (by prompt, responses, ranks) | 4
rejected_list | TRL preference | 4
reply_multi_messages_tool | TRL preference | 4 | | | 42
rewardbench2 | TRL preference | 4 | | num_correct
rmbench | TRL preference | 4 | | domain
role_capital | TRL preference | 4
role_human_gpt | TRL preference | 4
score_chosen_lower | TRL preference | 4 | | score_rejected
scores_as_strings | ranking by scores (by prompt, responses, scores) | 4
shp | SHP (by history, human_ref_A, human_ref_B, labels) | 4 | | score_ratio
skywork | whole conversations | 4 | | source
some_rows_bad_type | TRL preference | 8
stack_exchange_paired | Stack Exchange paired (by question, response_j, response_k) | 4 | | metadata
stack_exchange_preferences | Stack Exchange answers (by question, answers) | 4 | | date | </p>
summarize_from_feedback | summarize_from_feedback (by info, summaries, choice) | 4 | | worker | TL;DR:
system_in_chosen_prompt_text | TRL preference | 4
system_in_half | TRL preference | 4
tool_calls_empty_content | TRL preference | 4 | | | 42
tool_calls_null_content | TRL preference | 4 | | | 42
turns | TRL preference | 4
two_assistants | TRL preference | 4 | | | Let me see.
uf_no_overall | UltraFeedback (by instruction, completions) | 4
uf_rating_na | UltraFeedback | 4
ultrafeedback_binarized | TRL preference | 4 | | messages
ultrafeedback_original | UltraFeedback | 4 | | correct_answers
weight_in_messages | TRL preference | 4
layouts/bom_crlf | TRL preference | 4
layouts/categorical.parquet | TRL preference | 4
layouts/csvdir | TRL preference | 4
layouts/data.arrow | TRL preference | 4
layouts/decimal_margin.parquet | TRL preference | 4 | | margin
layouts/decimal_scores.parquet | ranking by scores | 4
layouts/hub_clone | TRL preference | 4
layouts/index.parquet | TRL preference | 4 | | __index_level_0__
layouts/int8_scores.parquet | ranking by scores | 4
layouts/large_list.parquet | whole conversations | 4
layouts/large_string.parquet | TRL preference | 4
layouts/nan | TRL preference | 4 | | score
layouts/ndjson.ndjson | TRL preference | 4
layouts/prefs.csv | TRL preference | 4
layouts/pretty.json | TRL preference | 3
layouts/save_to_disk | TRL preference | 4
layouts/save_to_disk_single | TRL preference | 4
layouts/string_view.parquet | TRL preference | 4
layouts/validation_name | TRL preference | 4
layouts/with_extra_json | TRL preference | 4
remade/before | TRL preference | 4
"""
REFUSED = """
agent_completions | its columns are prompt, completion; rm_recipe needs prompt, chosen and rejected
diverge_earlier | 4 differing_prompts, first in row 1
ends_with_user | 4 ends_without_reply, first in row 1
guanaco_text | a pair of texts without a prompt is of hh-rlhf transcripts
hh_single_newline | 4 ends_without_reply, first in row 1
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
layouts/utf16 | line 1: not JSON: 'utf-8' codec
"""
# What the tests below or others' try: input of `score`, data made anew.
ELSEWHERE = {"score", "layouts", "remade"}


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in f"{line} | | | |".split(" |")] for line in text.strip().splitlines()]


def at(name: str) -> Path:
    path = HUNT / name
    return path if path.exists() else path.with_name(f"{path.name}.jsonl")


def load(path, split=None, **keys):
    return load_split(DataArguments(dataset_name=str(path), **keys), split, margins="margin_column" in keys)


def test_every_file_is_in_a_table():
    names = {at(row[0]).relative_to(HUNT) for row in table(READ + REFUSED.lstrip())}
    there = {path.relative_to(HUNT) for folder in (HUNT, HUNT / "layouts") for path in folder.iterdir()}
    assert {path for path in there - names if path.suffix != ".jinja"} == {Path(name) for name in ELSEWHERE}


@pytest.mark.parametrize("row", table(READ), ids=lambda row: row[0])
def test_a_file_in_a_shape_that_people_have_is_read(row):
    name, shape, n, left_out, unread, end = row[:6]
    split = load(at(name))
    assert split.shapes[0].startswith(shape)
    assert len(split.comparisons) == int(n) or split.excluded
    assert list(split.excluded) == [reason for reason in (left_out,) if reason]
    assert unread in (split.unread or [""]) if unread else not set(split.unread) & {"prompt", "chosen"}
    assert split[0].prompt[-1]["content"].endswith(end.replace("\\0", "\0") or "0?") or name.startswith("l")
    good = [comparison.responses[0] for comparison in map(split.__getitem__, range(len(split.comparisons)))]
    if "Start slowly" in at(name).read_text(errors="ignore") if at(name).suffix == ".jsonl" else False:
        assert all("Start slowly" in text for text in good) or name == "accuracy_zero"


@pytest.mark.parametrize("row", table(REFUSED), ids=lambda row: row[0])
def test_a_file_that_is_no_preference_data_is_refused_in_one_sentence(row):
    with pytest.raises(DataError) as caught:
        load(at(row[0]))
    assert row[1] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
