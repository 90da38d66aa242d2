"""Comparisons to rows: the shared-prefix layout that training and scoring run on.

The responses of a comparison share their prompt, so the prompt is encoded once:

    prefix | rest of response 1 | rest of response 2 | ... | rest of response K

in one row. Position ids restart at `len(prefix)` for every response and a mask lets a response
see the prefix and itself, never a sibling: for a causal model that is the same function as one
sequence at a time. Several comparisons fill one row. Everything here is plain tensors and lists;
`modeling.add_reward_positions` is the forward that reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Encoded:
    """One tokenised comparison: K whole conversations, split at their common prefix.

    Attributes:
        prefix: the tokens that all K conversations start with.
        rests: for each response the tokens after the prefix, at least one each.
    """

    prefix: list[int]
    rests: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens that the comparison takes in a row."""
        return len(self.prefix) + sum(map(len, self.rests))

    def conversations(self) -> list[list[int]]:
        """The K whole conversations, as they are served."""
        return [self.prefix + rest for rest in self.rests]


def split_at_common_prefix(conversations: Sequence[Sequence[int]]) -> Encoded:
    """Splits K tokenised conversations at their longest common token prefix.

    The prefix is shortened where a conversation would be left without a token of its own, which
    is where its reward is read.
    """
    shortest = min(conversations, key=len)
    longest_prefix = len(shortest) - 1
    end = 0
    while end < longest_prefix and all(ids[end] == shortest[end] for ids in conversations):
        end += 1
    return Encoded(list(shortest[:end]), [list(ids[end:]) for ids in conversations])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped so that no group exceeds `capacity`.

    Raises:
        ValueError: one length exceeds the capacity; a comparison is never split.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a comparison of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def choose_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Packs `lengths` into rows of the length that costs least.

    Rows as long as the longest comparison leave gaps; longer ones fill better and pay for larger
    masks. Tried are one to four times the longest, in quarters; a row costs its tokens, plus half
    as much again at 1,000 tokens for the attention between them.
    """
    best: tuple[float, list[list[int]]] | None = None
    for quarters in range(4, 17):
        rows = pack(lengths, max(lengths) * quarters // 4)
        length = max(sum(lengths[index] for index in row) for row in rows)
        cost = len(rows) * length * (1 + length / 2000)
        if best is None or cost < best[0]:
            best = (cost, rows)
    assert best is not None
    return best[1]


def shared_rows(
    batch: Sequence[Encoded], pad_token_id: int, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """The rows of one batch of comparisons.

    Args:
        one_row: all in one row, without padding, for attention that is computed comparison by comparison.

    Returns:
        input_ids, position_ids: (rows, length) int64.
        attention_mask: (rows, 1, length, length) bool, True where the row's token may attend. With `one_row`
            (1, 1, 2, length) int64, whose token each is, as the square would be far larger than its blocks:
            the comparison's number and the response's, from 1, or 0 in the prefix.
        ends: (responses, 2) int64, row and column of each response's last token, responses in the
            order of the batch.
    """
    lengths = [comparison.length for comparison in batch]
    rows = [list(range(len(batch)))] if one_row else choose_rows(lengths)
    shape = (len(rows), max(sum(lengths[member] for member in row) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # Whose token it is: a comparison's number (-1 for padding) and a response's (0 is the prefix).
    comparison_of = torch.full(shape, -1)
    response_of = torch.zeros(shape, dtype=torch.long)
    ends: list[list[tuple[int, int]]] = [[] for _ in batch]
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            prefix_length = len(batch[member].prefix)
            for response, tokens in enumerate([batch[member].prefix, *batch[member].rests]):
                stop = start + len(tokens)
                first = prefix_length if response else 0
                input_ids[row, start:stop] = torch.tensor(tokens, dtype=torch.long)
                position_ids[row, start:stop] = torch.arange(first, first + len(tokens))
                comparison_of[row, start:stop] = member
                response_of[row, start:stop] = response
                start = stop
                if response:
                    ends[member].append((row, stop - 1))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.stack([comparison_of, response_of], dim=1)[:, None]
        if one_row
        else visible(comparison_of, response_of)[:, None],
        "ends": torch.tensor([end for comparison in ends for end in comparison]),
    }


def visible(comparison_of: torch.Tensor, response_of: torch.Tensor) -> torch.Tensor:
    """(rows, length, length) bool from two (rows, length) labellings.

    A token attends to earlier tokens and itself within its comparison: to the prefix and to its
    own response. Padding attends to padding, so that no row of the softmax is empty (NaN).
    """
    length = comparison_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = comparison_of[:, :, None] == comparison_of[:, None, :]
    own = (response_of[:, None, :] == 0) | (response_of[:, :, None] == response_of[:, None, :])
    return causal & same & own


def padded_rows(batch: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One conversation a row, padded right: for models that cannot share prefixes.

    Returns:
        input_ids, attention_mask: (responses, length) int64, responses in the order of the batch.
    """
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    length = max(map(len, conversations))
    input_ids = torch.full((len(conversations), length), pad_token_id)
    attention_mask = torch.zeros((len(conversations), length), dtype=torch.long)
    for row, ids in enumerate(conversations):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
