"""From (prompt, response) to rewards: one path for evaluation, `score`, the export and RL."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rm_recipe.data.comparison import (
    Comparison,
    Encoded,
    Excluded,
    Malformed,
    as_messages,
    as_reply,
    check_unicode,
    in_context,
    split_at_common_prefix,
    tools_of,
)
from rm_recipe.data.loading import read_rows, unit
from rm_recipe.data.tokenization import encode
from rm_recipe.errors import DataError, RecipeError, TrainingError, UnfitError
from rm_recipe.files import whole_file
from rm_recipe.model.reward_model import autocast, load_trained
from rm_recipe.model.row_attention import by_block
from rm_recipe.model.shared_prefix import decide_sharing, padded_rows, shared_rows
from rm_recipe.model.tokenizer import load_tokenizer, positions
from rm_recipe.processes import this_device
from rm_recipe.recipe.schema import MODEL_FILES, looks_local

TOKENS_PER_BATCH = 4096  # enough to fill two cores or a small GPU, little enough for 8 GB


class RewardModel:
    """A reward model: reads a prompt and a response, returns one number.

    Example::

        model = RewardModel.from_pretrained("outputs/smollm2_offline")
        model.score([{"prompt": "How are you?", "response": "Fine, thanks! And you?"}])

    A prompt is a text (one user message) or a list of messages.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        settings = getattr(model.config, "rm_recipe", None) or {}  # what training truncated to
        self.max_length: int | None = settings.get("max_length", positions(model))
        self.truncation: str = settings.get("truncation", "drop_oldest_turns")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        wanted = settings.get("prefix_sharing", "auto")
        self.sharing = decide_sharing(base, wanted, self.max_length)

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
        progress: bool = False,
        named: str | Sequence[str] = "item",
        unfit: float | None = None,
    ) -> NDArray[np.float32]:
        """Score `{"prompt": str or messages, "response": str}` items: rewards `(n,)`, float32.

        A `system` text of an item comes before its prompt. Items with the same prompt share its encoding. A
        conversation that is too long loses its oldest turns, as in training.

        Args:
            named: what an error calls an item, before its number, which counts from 1; or each one's name.
            unfit: the reward of an item that does not fit the model, which otherwise raises.

        Raises:
            DataError: an item has no prompt or response, or does not fit the model.
        """
        groups: dict[str, list[int]] = {}
        conversations: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            name = f"{named} {number + 1}" if isinstance(named, str) else named[number]
            try:
                conversations[number] = self._encode(item, name)
            except UnfitError:
                if unfit is None:
                    raise
                continue
            groups.setdefault(json.dumps(item["prompt"]), []).append(number)
        members, encoded = [], []
        for group in groups.values():
            whole = split_at_common_prefix([conversations[i] for i in group])
            shared = self.sharing.used
            once, each = (len(whole.prefix), 0) if shared else (0, len(whole.prefix))
            for part in _in_groups([each + len(rest) for rest in whole.suffixes], once):
                members.append([group[k] for k in part])
                encoded.append(Encoded(whole.prefix, [whole.suffixes[k] for k in part]))
        rewards = np.full(len(items), unfit or 0.0, np.float32)
        found = self.score_encoded(encoded, "Scoring" if progress else "")
        for group, values in zip(members, found, strict=True):
            rewards[group] = values
        return rewards

    def _encode(self, item: dict[str, Any], name: str) -> list[int]:
        _check_item(item, name)
        response = item["response"]
        try:
            prompt = in_context(as_messages(item["prompt"]), item)
            comparison = Comparison(prompt, [as_reply(item["prompt"], response)], tools=tools_of(item))
            check_unicode([*(message["content"] for message in comparison.prompt), response])
            encoded = encode(self.tokenizer, comparison, self.max_length, self.truncation)
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
        device = next(self.model.parameters()).device
        pad, shared = self.tokenizer.pad_token_id, self.sharing.used
        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(comparisons)
        sizes = [c.length if shared else sum(map(len, c.conversations())) for c in comparisons]
        order = sorted(range(len(comparisons)), key=lambda i: -sizes[i])
        with tqdm(total=len(order), desc=progress, unit="prompt", disable=not progress) as bar:
            for group in _in_groups([sizes[i] for i in order]):
                members = [order[place] for place in group]
                batch = [comparisons[i] for i in members]
                rows = shared_rows(batch, pad, by_block(self.model)) if shared else padded_rows(batch, pad)
                rows = {key: value.to(device) for key, value in rows.items()}
                with torch.inference_mode(), autocast(self.model):
                    logits = self.model(**rows).logits
                rewards = logits.float().squeeze(-1).cpu().numpy()
                if check and not np.isfinite(rewards).all():
                    raise TrainingError("the model gives rewards that are not finite numbers")
                ends = np.cumsum([len(comparison.suffixes) for comparison in batch])[:-1]
                for i, values in zip(members, np.split(rewards, ends), strict=True):
                    results[i] = values
                bar.update(len(members))
        return results


def _in_groups(sizes: Sequence[int], once: int = 0) -> list[list[int]]:
    """Group indices, in their order, so that a group fits a batch: of sizes and of what it holds `once`."""
    groups: list[list[int]] = []
    tokens = 0
    for index, size in enumerate(sizes):
        if not groups or tokens + size > TOKENS_PER_BATCH:
            groups.append([])
            tokens = once
        groups[-1].append(index)
        tokens += size
    return groups


def _check_item(item: dict[str, Any], name: str) -> None:
    if not item.get("prompt") or not isinstance(item.get("response"), str):
        raise DataError(f"{name}: expected a 'prompt' and a 'response' text")


def find_model(path: str) -> str:
    """The folder with the weights: of a run its `model/`, else the path or Hub id itself.

    Raises:
        RecipeError: a local path with no model in it.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if folder.is_dir() and not any((folder / file).is_file() for file in MODEL_FILES):
        unfinished = (folder / "recipe.yaml").is_file()
        raise RecipeError(
            f"{path} has no trained model yet; continue its training with `--resume`"
            if unfinished
            else f"{path} holds no model (no config.json) and no run (no model/)"
        )
    if not folder.exists() and (looks_local(path) or folder.parts[0] == "outputs"):
        raise RecipeError(f"{path} does not exist")
    return path


def score_file(model_path: str, source: Path, target: Path) -> int:
    """Write the items of a file as lines with their `"reward"`; returns how many.

    Raises:
        DataError: a row is not such an item; nothing is written.
    """
    if target.is_dir():
        raise DataError(f"{target} is a folder; --output names a file")
    items = read_items(source)
    reward_model = RewardModel.from_pretrained(model_path)
    rewards = reward_model.score(list(items.values()), progress=True, named=list(items))
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for item, reward in zip(items.values(), rewards, strict=True):
            file.write(json.dumps({**item, "reward": float(reward)}, ensure_ascii=False, default=str) + "\n")
    return len(items)


def read_items(source: Path) -> dict[str, dict[str, Any]]:
    """The `{"prompt", "response"}` items of a data file (`data.loading.read_rows`), by file and row.

    Raises:
        DataError: with file and row.
    """
    items = {}
    for number, item in read_rows(source):
        name = f"{source}, {unit(source)} {number}"
        _check_item(item, name)
        items[name] = item
    return items
