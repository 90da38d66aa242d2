"""Comparisons to rows: the shared-prefix layout that training and scoring run on.

The responses of a comparison share their prompt, so the prompt is encoded once:

    prefix | rest of response 1 | rest of response 2 | ... | rest of response K

in one row. Position ids restart at `len(prefix)` for every response and a mask lets a response
see the prefix and itself, never a sibling: for a causal model that is the same function as one
sequence at a time. Several comparisons fill one row. Everything here is plain tensors and lists;
`reward_model.add_reward_positions` is the forward that reads them.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rm_recipe.data.comparison import Encoded
from rm_recipe.errors import one_line
from rm_recipe.model import reward_model, row_attention

ALIGNED = 16  # tokens of which a row of several has a multiple
TOKENS_ON_CPU = 2048  # computed together; more were no faster on two cores, and take memory


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped so that no group exceeds `capacity`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def choose_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Pack `lengths` into rows of the length that costs least.

    Rows as long as the longest comparison leave gaps; longer ones fill better and pay for larger
    masks. Tried are one to four times the longest, in quarters; a row costs its tokens, plus half
    as much again at 1,000 tokens for the attention between them.
    """

    def cost(rows: list[list[int]]) -> float:
        length = max(sum(lengths[index] for index in row) for row in rows)
        return len(rows) * length * (1 + length / 2000)

    return min((pack(lengths, max(lengths) * quarters // 4) for quarters in range(4, 17)), key=cost)


def shared_rows(
    batch: Sequence[Encoded], pad_token_id: int, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """The rows of one batch of comparisons.

    Args:
        one_row: all in one row, without padding, for attention that is computed comparison by comparison.

    Returns:
        input_ids, position_ids: (rows, length) int64.
        attention_mask: (rows, 1, 2, length) int64, whose token each is: the comparison's number, -1 for
            padding, and the response's, from 1, or 0 in the prefix. The square that `row_mask` makes of it is
            made where it is needed: on the device, or never where attention goes block by block.
        last_token_positions: (responses, 2) int64, row and column of each response's last token, responses
            in the order of the batch.
    """
    lengths = [comparison.length for comparison in batch]
    rows = [list(range(len(batch)))] if one_row else choose_rows(lengths)
    longest = max(sum(lengths[member] for member in row) for row in rows)
    if not one_row:  # a GPU's attention would copy every layer's mask to a width like that
        longest += -longest % ALIGNED
    # Of each token its id, its position and whose it is: a comparison's number (-1 for padding) and a
    # response's (0 is the prefix).
    table = torch.tensor([pad_token_id, 0, -1, 0])[:, None, None].repeat(1, len(rows), longest)
    ends: list[list[tuple[int, int]]] = [[] for _ in batch]
    for row, members in enumerate(rows):
        stop = 0
        for member in members:
            prefix, suffixes = batch[member].prefix, batch[member].suffixes
            for response, tokens in enumerate([prefix, *suffixes]):
                n, first = len(tokens), len(prefix) if response else 0
                start, stop = stop, stop + n
                columns = [tokens, range(first, first + n), [member] * n, [response] * n]
                table[:, row, start:stop] = torch.tensor(columns, dtype=torch.long)
                if response:
                    ends[member].append((row, stop - 1))
    input_ids, position_ids, *owners = (column.clone() for column in table)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.stack(owners, dim=1)[:, None],
        "last_token_positions": torch.tensor([end for comparison in ends for end in comparison]),
    }


def padded_rows(batch: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One conversation a row, padded right: for models that cannot share prefixes.

    Returns:
        input_ids, attention_mask: (responses, length) int64, responses in the order of the batch.
    """
    conversations = [torch.tensor(ids) for comparison in batch for ids in comparison.conversations()]
    ones = [torch.ones_like(ids) for ids in conversations]
    return {
        "input_ids": pad_sequence(conversations, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


# --- may a model share prefixes? proven on a small random copy ---------------------------------

TOLERANCE = 1e-5
VOCABULARY = 64
FEED_FORWARD = 64  # width, of which nothing that is proven depends
WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
# How far a token may look. A row may be longer: a copy that looks no further than a conversation shows
# whether the row's mask takes the place of these, or is cut by them, as it is by GPT-Neo's `window_size`.
REACHES = ("max_position_embeddings", "sliding_window", "window_size")


@dataclass(frozen=True)
class Sharing:
    """The decision and its reason, as `run.json` records it."""

    used: bool
    reason: str
    max_abs_diff: float | None = None


def decide_sharing(
    model: PreTrainedModel, wanted: str, max_length: int | None, device: torch.device | None = None
) -> Sharing:
    """Share prefixes where `wanted` is `auto` and a small copy of the model proves it exact.

    Args:
        model: the classifier that will be trained or scored with.
        wanted: the recipe's `prefix_sharing`.
        max_length: the longest conversation. It must fit the sliding window, if there is one: a row
            may be longer, because the mask that comes with it is used in place of the window's.
        device: where the model will compute, by default where it is. On a CPU, and on a GPU with flash
            attention, a model that shares prefixes and uses `sdpa` gets the attention of `row_attention.py`.
    """
    config = model.config
    attention = config._attn_implementation
    if wanted == "off":
        return Sharing(False, "prefix_sharing is off")
    if not reward_model.is_decoder(model):
        return Sharing(False, f"{config.model_type} has no causal classifier")
    if attention not in ("sdpa", "eager", row_attention.NAME):
        return Sharing(False, f"{attention} attention takes no such mask")
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window and (max_length is None or max_length > window):
        return Sharing(False, f"conversations may be longer than the sliding window of {window} tokens")
    device = device or model.device
    simple = text is config and model._can_set_attn_implementation()
    if attention == "sdpa" and simple and (device.type == "cpu" or row_attention.has_flash(device, text)):
        attention = row_attention.NAME
    try:
        difference = measure_sharing(config, attention)
    except Exception as error:  # whatever a foreign architecture raises: it is not proven
        return Sharing(False, f"the proof failed: {type(error).__name__}: {one_line(error)[:200]}")
    if not difference <= TOLERANCE:
        return Sharing(False, f"rewards differ by {difference:.1e} on a small copy", difference)
    if attention != config._attn_implementation:
        model.set_attn_implementation(attention)
    return Sharing(True, "equal on a small copy", difference)


def measure_sharing(config: Any, attention: str) -> float:
    """Largest reward difference between shared rows and one sequence at a time, on a small copy.

    One sequence at a time is computed by transformers' own attention, rows by `row_attention`.
    """
    own_attention = "sdpa" if attention == row_attention.NAME else attention
    batch = _random_comparisons()
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    small = _small(config, max(map(len, conversations)))
    # In float64, where rounding is no difference: in float32 one start in some hundred was seen at 1.2e-5
    # instead of 6e-7, and trained without sharing. Grouped experts know no float64.
    chosen = {"attn_implementation": own_attention, "experts_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(small, dtype=torch.float32, **chosen)
    model.double().eval()
    reward_model.add_reward_positions(model)
    with torch.no_grad():
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    if attention != own_attention:
        model.set_attn_implementation(attention)
    rows = shared_rows(batch, 0, one_row=attention == row_attention.NAME)
    trained = model(**rows).logits[:, 0].detach()  # with gradients attention takes another way
    with torch.no_grad():
        scored = model(**rows).logits[:, 0]
    return max(float((shared - alone).abs().max()) for shared in (trained, scored))


def _small(config: Any, longest: int) -> Any:
    """The one-label configuration of a small copy: a layer of each kind, two at least, and few tokens.

    Args:
        longest: conversation, which sets `REACHES`.
    """
    small = copy.deepcopy(config)
    small.num_labels = 1
    vars(small).pop("quantization_config", None)
    text = small.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        kinds = list(dict.fromkeys(text.layer_types))
        text.layer_types = kinds if len(kinds) > 1 else kinds * 2
        text.num_hidden_layers = len(text.layer_types)
    for key in REACHES:
        if (getattr(text, key, None) or 0) > 0:  # XLNet's, which has no limit, is -1 and cannot be set
            setattr(text, key, longest)
    for key in WIDTHS:
        if not isinstance(getattr(text, key, []), list):  # as Gemma 3n's are, by layer
            setattr(text, key, FEED_FORWARD)
    for name in small.sub_configs:  # a vision tower, which reads no text
        if (part := getattr(small, name)) is not text and hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = 1
    text.vocab_size = VOCABULARY
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2
    return small


def _random_comparisons() -> list[Encoded]:
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    shapes = [(0, (3, 5)), (7, (1, 9)), (20, (4, 4, 6)), (2, (2, 1))]
    return [Encoded(tokens(prefix), [tokens(n) for n in suffixes]) for prefix, suffixes in shapes]
