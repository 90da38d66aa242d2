"""From (prompt, response) to rewards: one path for evaluation, `score`, the export and RL."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from rm_recipe.data import comparison
from rm_recipe.data.comparison import Comparison, Encoded, Excluded, Malformed, split_at_common_prefix
from rm_recipe.data.formats import in_parts
from rm_recipe.data.loading import read_rows, unit
from rm_recipe.data.tokenization import encode
from rm_recipe.errors import DataError, RecipeError, TrainingError, UnfitError
from rm_recipe.files import whole_file
from rm_recipe.model.lora import in_one_product
from rm_recipe.model.memory import free_unused
from rm_recipe.model.reward_model import autocast, load_trained
from rm_recipe.model.row_attention import by_block
from rm_recipe.model.shared_prefix import TOKENS_ON_CPU, decide_sharing, padded_rows, shared_rows
from rm_recipe.model.tokenizer import load_tokenizer, positions
from rm_recipe.processes import is_out_of_memory, this_device
from rm_recipe.recipe.schema import MODEL_FILES, looks_local

TOKENS_ON_GPU = 16384  # scored together: 1.4 times as fast as 4,096


class RewardModel:
    """A reward model: reads a prompt and a response, returns one number.

    Example::

        model = RewardModel.from_pretrained("outputs/smollm2_offline")
        model.score([{"prompt": "How are you?", "response": "Fine, thanks! And you?"}])

    A prompt is a text (one user message) or a list of messages.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        settings = getattr(model.config, "rm_recipe", None) or {}  # what training truncated to
        self.max_length: int | None = settings.get("max_length", positions(model))
        self.truncation: str = settings.get("truncation", "drop_oldest_turns")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.sharing = decide_sharing(base, settings.get("prefix_sharing", "auto"), self.max_length)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | None = None) -> "RewardModel":
        """Load a run folder, its `model/`, a merged export or a one-label model from the Hub.

        Args:
            device: where to put it; by default this process's accelerator, if there is one.

        Raises:
            RecipeError: there is no such model, or it is not a reward model.
        """
        folder = find_model(str(path))
        tokenizer = load_tokenizer(folder)
        model = load_trained(folder, tokenizer)
        if not getattr(model.config, "quantization_config", None):  # loaded where it is to stay
            model = model.to(device or this_device())
        return cls(model, tokenizer)

    def score(
        self,
        items: Sequence[dict[str, Any]],
        progress: bool | str = False,
        named: Sequence[str] = (),
        unfit: float | None = None,
    ) -> NDArray[np.float32]:
        """Score `{"prompt": str or messages, "response": str}` items: rewards `(n,)`, float32.

        A `system` text of an item comes before its prompt. Items with the same prompt share its encoding. A
        conversation that is too long loses its oldest turns, as in training.

        Args:
            progress: show a bar, which may be given a name.
            named: what an error calls each item, in place of its number.
            unfit: the reward of an item that does not fit the model, which otherwise raises.

        Raises:
            DataError: an item has no prompt or response, or does not fit the model.
        """
        # By prompt the conversations, each with the items that read so: they get the same reward, to the bit.
        groups: dict[str, dict[tuple[int, ...], list[int]]] = {}
        for number, item in enumerate(items):
            try:
                ids = tuple(self._encode(item, named[number] if named else f"item {number + 1}"))
                prompt = json.dumps(item["prompt"], default=str)  # of a table: dates
                groups.setdefault(prompt, {}).setdefault(ids, []).append(number)
            except UnfitError:
                if unfit is None:
                    raise
        members, encoded = [], []
        for group in groups.values():
            (prefix, suffixes), alike = split_at_common_prefix([*group]), [*group.values()]
            once, each = (len(prefix), 0) if self.sharing.used else (0, len(prefix))
            sizes = [each + len(rest) for rest in suffixes]
            # On a GPU no more: they stand in one row, whose mask may be a square.
            for part in _batches(range(len(group)), sizes, TOKENS_ON_CPU, once):
                members.append([alike[k] for k in part])
                encoded.append(Encoded(prefix, [suffixes[k] for k in part]))
        rewards = np.full(len(items), unfit or 0.0, np.float32)
        found = self.score_encoded(encoded, "Scoring" if progress is True else progress or "")
        for together, values in zip(members, found, strict=True):
            for numbers, value in zip(together, values, strict=True):
                rewards[numbers] = value
        return rewards

    def _encode(self, item: dict[str, Any], name: str) -> list[int]:
        _check_item(item, name)
        response = item["response"]
        try:
            prompt = in_parts(item, "prompt")["prompt"]  # after its `history`
            messages = comparison.in_context(comparison.as_messages(prompt), item)
            reply = comparison.as_reply(prompt, response)
            one = Comparison(messages, [reply], tools=comparison.tools_of(item))
            comparison.check_unicode([*(message["content"] for message in messages), response])
            encoded = encode(self.tokenizer, one, self.max_length, self.truncation)
        except Excluded as excluded:
            limit = f" (at most {self.max_length} tokens)" if "long" in excluded.reason else ""
            detail = f": {excluded.detail}" if excluded.detail else ""
            raise UnfitError(f"{name}: {excluded.reason.replace('_', ' ')}{limit}{detail}") from None
        except Malformed as fault:
            raise DataError(f"{name}: '{fault.args[0]}' should be {fault.args[1]}") from None
        return encoded.conversations()[0]

    def score_encoded(
        self, comparisons: Sequence[Encoded], progress: str = "", check: bool = True
    ) -> list[NDArray[np.float32]]:
        """Score tokenised comparisons, in order: for each an array `(K,)` float32.

        Comparisons of similar length are scored together. Raises TrainingError if a reward is not
        finite, unless `check` is False.

        Args:
            progress: what the progress bar says; empty for none.
        """
        shared = self.sharing.used
        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(comparisons)
        sizes = [c.length if shared else sum(map(len, c.conversations())) for c in comparisons]
        order = sorted(range(len(comparisons)), key=lambda i: -sizes[i])
        with tqdm(total=len(order), desc=progress, unit="prompt", disable=not progress) as bar:
            most = TOKENS_ON_GPU if next(self.model.parameters()).is_cuda else TOKENS_ON_CPU
            for members in _batches(order, sizes, most):
                batch = [comparisons[i] for i in members]
                rewards = self._forward(batch)
                if check and not np.isfinite(rewards).all():
                    raise TrainingError("the model gives rewards that are not finite numbers")
                ends = np.cumsum([len(c.suffixes) for c in batch])[:-1]
                for i, values in zip(members, np.split(rewards, ends), strict=True):
                    results[i] = values
                bar.update(len(members))
        return results

    def _forward(self, batch: Sequence[Encoded]) -> NDArray[np.float32]:
        """The rewards (responses,) of a batch, by halves where there is no memory for it whole."""
        pad = self.tokenizer.pad_token_id
        rows = shared_rows(batch, pad, by_block(self.model)) if self.sharing.used else padded_rows(batch, pad)
        try:
            with torch.inference_mode(), autocast(self.model), in_one_product(self.model):
                logits = self.model(
                    **{key: value.to(self.model.device) for key, value in rows.items()}
                ).logits
            return np.asarray(logits.float().squeeze(-1).cpu().numpy())
        except (RuntimeError, MemoryError) as error:
            if sum(len(c.suffixes) for c in batch) == 1 or not is_out_of_memory(error):
                raise
        free_unused()
        parts: Sequence[Encoded] = batch
        if len(batch) == 1:  # many replies to one prompt
            parts = [Encoded(batch[0].prefix, [suffix]) for suffix in batch[0].suffixes]
        middle = len(parts) // 2
        return np.concatenate([self._forward(parts[:middle]), self._forward(parts[middle:])])


def _batches(numbers: Iterable[int], sizes: Sequence[int], most: int, once: int = 0) -> list[list[int]]:
    """Group numbers, in their order, so that `once` and the sizes of a group are at most `most` tokens."""
    groups: list[list[int]] = []
    tokens = 0
    for number in numbers:
        if not groups or tokens + sizes[number] > most:
            groups.append([])
            tokens = once
        groups[-1].append(number)
        tokens += sizes[number]
    return groups


def _check_item(item: dict[str, Any], name: str) -> None:
    if not isinstance(item, dict):
        raise DataError(f"{name}: expected a mapping with 'prompt' and 'response', one for each reply")
    if not item.get("prompt") or not isinstance(item.get("response"), str):
        raise DataError(f"{name}: expected a 'prompt' and a 'response' text; it has {', '.join(item)}")


def find_model(path: str) -> str:
    """The folder with the weights: of a run its `model/`, else the path or Hub id itself.

    Raises:
        RecipeError: a local path with no model in it.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if folder.is_dir() and not any((folder / file).is_file() for file in MODEL_FILES):
        raise RecipeError(f"{path} holds no model; an interrupted run goes on with `train RECIPE --resume`")
    if not folder.exists() and (looks_local(path) or folder.parts[0] == "outputs"):
        raise RecipeError(f"{path} does not exist")
    return path


def score_file(model_path: str, source: Path, target: Path) -> int:
    """Write the items of a file as lines with their `"reward"`; returns how many.

    Raises:
        DataError: a row is no `{"prompt", "response"}`, or the file cannot be read; nothing is written.
    """
    if target.is_dir():
        raise DataError(f"{target} is a folder; --output names a file")
    items = read_items(source)
    reward_model = RewardModel.from_pretrained(model_path)
    rewards = reward_model.score(list(items.values()), progress=True, named=list(items))
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for item, reward in zip(items.values(), rewards.tolist(), strict=True):
            file.write(json.dumps({**item, "reward": reward}, ensure_ascii=False, default=str) + "\n")
    return len(items)


def read_items(source: Path) -> dict[str, dict[str, Any]]:
    """Read the `{"prompt", "response"}` items of a data file, by file and row; raises as `score_file`."""
    items = {f"{source}, {unit(source)} {number}": item for number, item in read_rows(source)}
    for name, item in items.items():
        _check_item(item, name)
    return items
