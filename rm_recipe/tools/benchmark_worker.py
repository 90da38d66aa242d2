"""One measurement of `rm-recipe benchmark`, in a process of its own, so that peak memory is its own.

    python -m rm_recipe.tools.benchmark_worker WHAT RECIPE RESULT.json [REPEATS] [--key value ...]

WHAT is `stock` (`trl.RewardTrainer`), `ours` (`SharedPrefixRewardTrainer`) or `scoring`, which takes REPEATS.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from trl import RewardTrainer

from rm_recipe.data.dataset import Split
from rm_recipe.files import write_json
from rm_recipe.model import lora, memory, shared_prefix
from rm_recipe.recipe.reader import Recipe, read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.training import train

SCORED = 256  # comparisons: enough that their lengths are the data's


def measure_training(recipe: Recipe, what: str) -> dict[str, Any]:
    """Train for the recipe's `max_steps`, of which the first warms up and is not timed.

    Returns:
        of the timed steps comparisons and real tokens a second, the share of padding and the TFLOP/s of the
        model; the loss of every step; the peak memory in bytes. FLOPs for a token are 2 for each parameter
        outside the embeddings forwards, 2 for the gradient of what goes in, and, where the base itself is
        trained, 2 for its own (recomputing does not count).
    """
    tokenizer, train_split, test_split, _ = train.load_data(recipe)
    model, modules_to_save = train.load_model(recipe, tokenizer)
    parameters = model.num_parameters(exclude_embeddings=True)
    # As stock needs it, for both.
    train.decide_step(recipe, model, modules_to_save, train_split, shared=False, divide=False)
    if what == "ours":
        trainer: Any = train.make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split)
    else:
        recipe.training.chat_template_path = None  # what is tokenised already needs none
        recipe.training.use_liger_kernel = False  # `load_model` has done it
        trainer = RewardTrainer(
            model=model,
            args=recipe.training,
            train_dataset=as_pairs(train_split),
            processing_class=tokenizer,
            peft_config=lora.lora_config(recipe.model, modules_to_save) if recipe.model.use_peft else None,
        )
    start_alike(trainer.model, recipe.training.seed)
    watch = Watch(trainer, tokenizer.pad_token_id)
    trainer.add_callback(watch)
    with trainer.cheaper_adapters() if what == "ours" else nullcontext():
        trainer.train()

    accumulation = recipe.training.gradient_accumulation_steps
    seconds = watch.times[-1] - watch.times[1]
    tokens, places = (int(sum(counted)) for counted in zip(*chain(*watch.tokens[1:]), strict=True))
    flop_per_token = (4 if recipe.model.use_peft else 6) * parameters
    comparisons = (len(watch.tokens) - 1) * accumulation * recipe.training.train_batch_size
    return {
        "comparisons_per_s": comparisons / seconds,
        "tokens_per_s": tokens / seconds,
        "padding_share": 1 - tokens / places,
        "peak_memory_bytes": memory.peak_memory(),
        "tflops": tokens / seconds * flop_per_token / 1e12,
        "losses": [float(torch.stack(step).double().sum()) / accumulation for step in watch.losses],
    }


def start_alike(model: torch.nn.Module, seed: int) -> None:
    """Draw the adapters' A anew as PEFT does (B is zero): the trainers get there by other random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def as_pairs(split: Split) -> Any:
    """The comparisons with the columns that stock TRL takes as tokenised."""

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = sorted(range(2), key=lambda k: row["ranks"][k])
        ids = {
            "chosen_ids": row["prefix"] + row["suffixes"][chosen],
            "rejected_ids": row["prefix"] + row["suffixes"][rejected],
        }
        return ids | ({"margin": row["margins"][0]} if row["margins"] else {})

    columns = split.comparisons.column_names
    return split.comparisons.map(pair, remove_columns=columns, load_from_cache_file=False)


class Watch(TrainerCallback):
    """Note when training began and each optimizer step ended, so that making the batches counts.

    And of each step, by micro-batch, the loss, and how many of its tokens are real and are there at all.
    """

    def __init__(self, trainer: Any, pad_token_id: int) -> None:
        self.times: list[float] = []
        self.losses: list[list[torch.Tensor]] = []
        self.tokens: list[list[tuple[torch.Tensor, int]]] = []
        compute = trainer.compute_loss

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids = inputs.get("rows", inputs)["input_ids"]
            self.tokens[-1].append(((ids != pad_token_id).sum(), ids.numel()))
            result = compute(model, inputs, *args, **kwargs)
            self.losses[-1].append((result[0] if isinstance(result, tuple) else result).detach())
            return result

        trainer.compute_loss = watched

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(_now())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.losses.append([])
        self.tokens.append([])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(_now())


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure_scoring(recipe: Recipe, repeats: int) -> dict[str, Any]:
    """Held-out comparisons scored by a plain padded loop and by `RewardModel`, in turns.

    The loop is what one writes with transformers: in the order of the data, both replies of
    `per_device_eval_batch_size` comparisons a batch, padded to its longest.

    Returns:
        conversations a second by either, medians; the median of each repeat's ratio; and the largest
        difference of rewards.
    """
    tokenizer, _, test_split, _ = train.load_data(recipe)
    model, _ = train.load_model(recipe, tokenizer)
    reward_model = RewardModel(model.to(recipe.training.device).eval(), tokenizer)
    comparisons = test_split.encoded()[:SCORED]
    size = recipe.training.eval_batch_size

    def plain() -> np.ndarray:
        rewards = []
        for start in range(0, len(comparisons), size):
            batch = shared_prefix.padded_rows(comparisons[start : start + size], tokenizer.pad_token_id)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            with torch.inference_mode():
                rewards.append(model(**batch).logits.float().squeeze(-1).cpu().numpy())
        return np.concatenate(rewards)

    def ours() -> np.ndarray:
        return np.concatenate(reward_model.score_encoded(comparisons))

    def speed(score: Callable[[], np.ndarray]) -> float:
        began = _now()
        score()
        return sum(len(comparison.suffixes) for comparison in comparisons) / (_now() - began)

    difference = float(np.abs(plain() - ours()).max())  # warms up, too
    speeds = [(speed(plain), speed(ours)) for _ in range(repeats)]
    return {
        "plain_conversations_per_s": statistics.median(by_loop for by_loop, _ in speeds),
        "conversations_per_s": statistics.median(own for _, own in speeds),
        "ratio": statistics.median(own / by_loop for by_loop, own in speeds),
        "max_reward_difference": difference,
    }


def main() -> None:
    """Run the measurement that the command line names."""
    what, path, target, *words = sys.argv[1:]
    if what == "scoring":
        result = measure_scoring(read_recipe(path, words[1:]), int(words[0]))
    else:
        result = measure_training(read_recipe(path, words), what)
    write_json(Path(target), result)


if __name__ == "__main__":
    main()
