"""How two steps are compared; what an export must not survive is in test_export."""

import numpy as np
import pytest
import torch
from conftest import make_rows, write_jsonl
from transformers import AutoModel, AutoModelForSequenceClassification

from rm_recipe.data.splits import load_held_out_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import ExportError
from rm_recipe.exporting.verify import FLOAT32, N_SEQUENCES, N_SERVED, HeldOut, Proof, pads_left
from rm_recipe.model.reward_model import prepare_for_rewards
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel


@pytest.fixture
def judge(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).eval()
    prepare_for_rewards(model, tokenizer)
    return RewardModel(model, tokenizer)


@pytest.fixture
def held_out(judge, write_recipe):
    split = tokenize(load_held_out_split(read_recipe(write_recipe())), judge.tokenizer, 512, "keep_end")
    return HeldOut.of(split)


def test_64_sequences_are_compared_and_8_of_them_as_texts(held_out):
    assert len(held_out.names) == len(held_out.sequences()) == N_SEQUENCES
    assert held_out.whole == list(range(N_SERVED))
    assert len(held_out.texts) == N_SERVED
    assert np.isnan(held_out.recorded).all()


def test_truncated_conversations_have_no_text(judge, write_recipe):
    split = tokenize(load_held_out_split(read_recipe(write_recipe())), judge.tokenizer, 512, "keep_end")
    lengths = sorted(length for row in split.comparisons["lengths"] for length in row)
    shorter = lengths[len(lengths) // 2]
    split = tokenize(load_held_out_split(read_recipe(write_recipe())), judge.tokenizer, shorter, "keep_end")
    held_out = HeldOut.of(split)
    assert held_out.whole != list(range(N_SERVED))
    for number, messages in zip(held_out.whole, held_out.texts, strict=True):
        text = judge.tokenizer.apply_chat_template(messages, tokenize=False)
        assert judge.tokenizer(text)["input_ids"] == held_out.sequences()[number]


def test_a_short_reply_beside_a_long_one_lost_its_oldest_turns_too(judge, write_recipe, tmp_path):
    """Its own length would fit; the long one's did not, and both read the same prompt."""
    turns = [{"role": role, "content": "hello " * 12} for role in ("user", "assistant", "user")]
    rows = [{"prompt": turns, "chosen": "good", "rejected": "bad " * 30}, *make_rows(3, seed=2)]
    for name in ("train", "test"):
        write_jsonl(tmp_path / "turns" / f"{name}.jsonl", rows if name == "test" else make_rows(4, seed=1))
    recipe = read_recipe(write_recipe(dataset_name=str(tmp_path / "turns")))
    whole = tokenize(load_held_out_split(recipe), judge.tokenizer, 512, "drop_oldest_turns")
    short, long = whole.comparisons[0]["lengths"]
    split = tokenize(load_held_out_split(recipe), judge.tokenizer, (short + long) // 2, "drop_oldest_turns")
    found = HeldOut.of(split)
    assert len(found.whole) == 6
    for number, messages in zip(found.whole, found.texts, strict=True):
        text = judge.tokenizer.apply_chat_template(messages, tokenize=False)
        assert judge.tokenizer(text)["input_ids"] == found.sequences()[number]


def test_recorded_rewards_are_found_by_row(judge, write_recipe):
    split = tokenize(load_held_out_split(read_recipe(write_recipe())), judge.tokenizer, 512, "keep_end")
    rows = split.comparisons
    lines = [
        {"index": n, "row": rows[n]["row"], "subset": rows[n]["subset"], "rewards": [1.0 + n, -n]}
        for n in range(2)
    ]
    found = HeldOut.of(split, [*lines, {"index": 2, "row": 99, "subset": "", "rewards": [5, 5]}])
    assert found.recorded[:4].tolist() == [1.0, 0.0, 2.0, -1.0]
    assert np.isnan(found.recorded[4:]).all()


def test_the_comparison_that_moved_most_is_named_with_both_rewards(judge, held_out):
    proof = Proof(judge, held_out)
    after = proof.now.copy()
    after[5] += 0.25
    after[6] += 0.125
    claim = r"it moved: held-out comparison 3, response 2 .* went from -?\d.* to .*, by 0.25 where 1e-05 is"
    with pytest.raises(ExportError, match=claim):
        proof.step("merge", "it moved", after)


def test_steps_that_round_add_to_the_tolerance(judge, held_out):
    proof = Proof(judge, held_out)
    proof.step("merge", "", proof.now)
    assert proof.tolerance == FLOAT32
    proof.step("rounding", "", proof.now + np.float32(0.1), 0.2)
    assert proof.tolerance == pytest.approx(0.2 + FLOAT32)
    assert proof.moved == {"merge": 0.0, "rounding": pytest.approx(0.1)}


def test_a_reward_that_is_no_number_is_no_agreement(judge, held_out):
    proof = Proof(judge, held_out)
    after = proof.now.copy()
    after[7] = np.nan
    with pytest.raises(ExportError, match="comparison 4, response 2"):
        proof.step("merge", "it moved", after)


def test_fp32_is_allowed_more_where_the_model_is_sensitive(judge, held_out):
    proof = Proof(judge, held_out)
    proof.measure_float32()
    assert proof.float32 == FLOAT32
    proof.judge.model.score.weight.data *= 1e4
    proof.now = proof.rewards()
    proof.measure_float32()
    assert proof.float32 > 10 * FLOAT32


def test_bf16_rounds_eight_times_as_coarsely_as_fp16(judge, held_out):
    proof = Proof(judge, held_out)
    assert proof.rounding_to(torch.float32, torch.float32) == 0
    coarse, fine = (proof.rounding_to(body, torch.float32) for body in (torch.bfloat16, torch.float16))
    assert 0 < coarse == pytest.approx(8 * fine, rel=0.1)
    assert torch.equal(torch.from_numpy(proof.rewards()), torch.from_numpy(proof.now))


@pytest.mark.parametrize(
    ("base", "either"),
    [("llama", True), ("qwen2", True), ("mistral", True), ("gpt2", False), ("bert", False),
     ("distilbert", False), ("deberta", False)],
)  # fmt: skip
def test_models_that_may_be_padded_on_the_left_are_known(tiny_base, base, either):
    model = AutoModelForSequenceClassification.from_config(
        AutoModel.from_pretrained(tiny_base(base)).config, dtype=torch.float32
    ).eval()
    model.config.num_labels, model.config.pad_token_id = 1, 0
    ids = torch.tensor([[5, 6, 7, 8]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        moved = model(padded, attention_mask=mask).logits - model(ids).logits
    assert pads_left(model) == either == bool(moved.abs().max() < 1e-5)
