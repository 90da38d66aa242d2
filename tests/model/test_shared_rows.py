"""Rows: every token once, each seeing exactly what it should."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.comparison import Encoded, split_at_common_prefix
from rm_recipe.model.row_attention import row_mask
from rm_recipe.model.shared_prefix import ALIGNED, choose_rows, pack, padded_rows, shared_rows

PAD = 0
tokens = st.lists(st.integers(1, 9), min_size=1, max_size=6)
prefixes = st.lists(st.integers(1, 9), max_size=6)
comparisons = st.builds(Encoded, prefixes, st.lists(tokens, min_size=1, max_size=4))
batches = st.lists(comparisons, min_size=1, max_size=4) | st.lists(comparisons, min_size=5, max_size=9)


@given(st.lists(tokens, min_size=1, max_size=4))
def test_conversations_are_split_behind_the_longest_prefix_that_leaves_each_a_token(conversations):
    encoded = Encoded(*split_at_common_prefix(conversations))
    assert encoded.conversations() == conversations
    assert all(encoded.suffixes)
    assert len({rest[0] for rest in encoded.suffixes}) > 1 or min(map(len, encoded.suffixes)) == 1


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(20, 40))
def test_packing_places_every_comparison_once_and_overfills_no_row(lengths, capacity):
    rows = pack(lengths, capacity)
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    for some in (rows, choose_rows(lengths) if lengths else rows):
        assert sorted(index for row in some for index in row) == list(range(len(lengths)))


@given(batches, st.booleans())
def test_each_response_reads_back_from_what_its_last_token_attends_to(batch, one_row):
    """The naive check: ids and positions that the end of a response sees are its conversation."""
    rows = shared_rows(batch, PAD, one_row)
    mask = row_mask(rows["attention_mask"])
    if one_row:
        assert rows["input_ids"].shape == (1, sum(comparison.length for comparison in batch))
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    for (row, column), conversation in zip(rows["last_token_positions"].tolist(), conversations, strict=True):
        seen = mask[row, 0, column]
        assert rows["input_ids"][row, seen].tolist() == conversation
        assert rows["position_ids"][row, seen].tolist() == list(range(len(conversation)))


@given(batches)
def test_the_mask_is_the_one_that_its_definition_gives_pair_by_pair_of_tokens(batch):
    """Also what padding attends to: padding before it and itself, never a token."""
    rows = shared_rows(batch, PAD)
    n_rows, length = rows["input_ids"].shape
    assert length % ALIGNED == 0
    whose = [[None] * length for _ in range(n_rows)]  # (comparison, response), of a prefix (comparison, 0)
    ends = iter(rows["last_token_positions"].tolist())
    for number, comparison in enumerate(batch):
        for response, tokens_of_it in enumerate(comparison.suffixes, start=1):
            row, end = next(ends)
            start = end + 1 - len(tokens_of_it)
            whose[row][start : end + 1] = [(number, response)] * len(tokens_of_it)
            if response == 1:
                whose[row][start - len(comparison.prefix) : start] = [(number, 0)] * len(comparison.prefix)
    expected = torch.zeros(n_rows, 1, length, length, dtype=torch.bool)
    for row in range(n_rows):
        for query in range(length):
            for key in range(query + 1):
                mine, other = whose[row][query], whose[row][key]
                if mine is None or other is None:
                    expected[row, 0, query, key] = mine is other
                else:
                    expected[row, 0, query, key] = other in (mine, (mine[0], 0))
    assert torch.equal(row_mask(rows["attention_mask"]), expected)


def test_padded_rows_hold_one_conversation_each_padded_right():
    rows = padded_rows([Encoded([1, 2], [[3], [4, 5]])], PAD)
    assert rows["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5]]
    assert torch.equal(rows["attention_mask"], (rows["input_ids"] != PAD).long())


def test_what_a_collator_makes_grows_with_its_tokens_and_not_with_their_square():
    """A batch of 50,000 tokens had a mask of 2.5 GB."""
    rows = shared_rows([Encoded([5] * 40, [[6] * 10, [7] * 12])] * 800, 0, one_row=True)
    assert sum(tensor.nbytes for tensor in rows.values()) < 40 * rows["input_ids"].numel()
