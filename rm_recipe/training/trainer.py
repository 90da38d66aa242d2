"""TRL's RewardTrainer on shared-prefix rows.

Trainer's training step, accumulation, distribution, checkpoints and logging are used as they are.
Ours are the collator (rows), `compute_loss` (rewards at the ends, one loss per comparison) and the
metrics, which count comparisons instead of averaging batches.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint
from torch.nn.functional import logsigmoid
from torch.utils.data import Sampler, get_worker_info
from transformers import PreTrainedTokenizerBase, ProgressCallback
from trl import RewardConfig, RewardTrainer

from rm_recipe.data.comparison import Encoded, pair_indices
from rm_recipe.data.dataset import Split, row_name
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model import head, lora, row_attention
from rm_recipe.model.shared_prefix import Sharing, padded_rows, shared_rows
from rm_recipe.recipe.schema import GROUPED
from rm_recipe.training.monitoring import LogLines

TIED = 1e-6  # rewards that differ by no more say nothing of a comparison
SORTED_AMONG = 50  # batches, within which comparisons are sorted by length; as many as in transformers
FAULTY_NAMED = 5  # comparisons whose loss is not finite, in the message
COLUMNS = ["prefix", "suffixes", "ranks", "margins", "subset", "row"]


@dataclass
class RowCollator:
    """Tokenised comparisons to model inputs; see `shared_prefix` for the two layouts.

    Attributes:
        share: shared-prefix rows where True, one conversation a row otherwise.
        one_row: a whole micro-batch in one row, if prefixes are shared.
        budget: tokens that a micro-batch may have; None for whole batches.
    """

    pad_token_id: int
    share: bool
    one_row: bool = False
    budget: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The `micro_batches` of a batch: one, or as many as keep to the budget.

        Each has what `micro_batch` says, the `numbers` of its comparisons in the batch, and what share
        `of_batch` they are.

        In a data loader's worker SIGTERM does nothing from now on: who stops a job sends it to all its
        processes, and the training has a step to finish. The worker ends when the training does.
        """
        if get_worker_info() is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sizes = np.array([self.size(example) for example in examples])
        parts = []
        for numbers in self.split(sizes):
            part = self.micro_batch([examples[i] for i in numbers])
            parts.append(part | {"numbers": numbers, "of_batch": len(numbers) / len(examples)})
        return {"micro_batches": parts}

    def size(self, example: dict[str, Any]) -> int:
        """Count the tokens that are computed of a comparison, without what its batch pads."""
        prefix, suffixes = len(example["prefix"]), [len(rest) for rest in example["suffixes"]]
        return prefix + sum(suffixes) if self.share else len(suffixes) * (prefix + max(suffixes))

    def split(self, sizes: NDArray[np.int64]) -> list[list[int]]:
        """Divide comparisons into micro-batches within the budget, the largest first.

        One that exceeds it stands alone. Of one sequence a row, all are padded to the longest, so like sizes
        stand together.
        """
        if self.budget is None or self.cost(sizes) <= self.budget:
            return [list(range(len(sizes)))]
        parts: list[list[int]] = []
        for number in np.argsort(-sizes, kind="stable").tolist():
            if parts and self.cost(sizes[[*parts[-1], number]]) <= self.budget:
                parts[-1].append(number)
            else:
                parts.append([number])
        return parts

    def cost(self, sizes: NDArray[np.int64]) -> int:
        """Tokens of a micro-batch of comparisons with these sizes, padding included."""
        return int(sizes.sum() if self.share else len(sizes) * sizes.max())

    def micro_batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The `rows` that the model reads, and what the loss is made of.

        That is `pairs` (pairs, 2) int64, numbers of the better and the worse response of each untied
        pair; `margins` (pairs,); `pairs_each` (comparisons,) int64; `num_tokens` (), the real tokens;
        and `names`, a list of what to call each comparison.
        """
        batch = [Encoded(example["prefix"], example["suffixes"]) for example in examples]
        pad = self.pad_token_id
        rows = shared_rows(batch, pad, self.one_row) if self.share else padded_rows(batch, pad)
        better, worse, owner = pair_indices([example["ranks"] for example in examples])
        pairs_each = np.bincount(owner, minlength=len(examples))
        margins = [example["margins"] or [0.0] * n for example, n in zip(examples, pairs_each, strict=True)]
        return {
            "rows": rows,
            "names": [row_name(example) for example in examples],
            "num_tokens": (rows["input_ids"] != pad).sum(),
            "pairs": torch.from_numpy(np.stack([better, worse], axis=1)),
            "pairs_each": torch.from_numpy(pairs_each),
            "margins": torch.tensor([margin for own in margins for margin in own]),
        }


class GroupedByLength(Sampler[int]):
    """An order of comparisons in which those of a batch are about as long as each other.

    Drawn from the seed and the epoch alone, so that a resumed run meets the same batches; which batch comes
    when is random, and so is which comparisons it holds, but for their length.
    """

    def __init__(self, lengths: NDArray[np.int64], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate before an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, among = rng.permutation(len(self.lengths)), SORTED_AMONG * self.batch
        blocks = [order[start : start + among] for start in range(0, len(order), among)]
        order = np.concatenate([block[np.argsort(-self.lengths[block], kind="stable")] for block in blocks])
        whole = len(order) - len(order) % self.batch  # the short batch stays the last
        batches = order[:whole].reshape(-1, self.batch)
        yield from [*rng.permutation(batches).flatten().tolist(), *order[whole:].tolist()]


def mean_of_pairs(values: torch.Tensor, pairs_each: torch.Tensor) -> torch.Tensor:
    """The mean of (pairs,) values over the pairs of each comparison; (comparisons,)."""
    owner = torch.repeat_interleave(pairs_each, output_size=len(values))
    return values.new_zeros(len(pairs_each)).index_add(0, owner, values) / pairs_each


class SharedPrefixRewardTrainer(RewardTrainer):
    """`trl.RewardTrainer` for tokenised splits.

    The loss is -log sigmoid(r_chosen - r_rejected - margin), its mean over the untied pairs of each
    comparison (InstructGPT, arXiv 2203.02155, equation 1; the margin: Llama 2, 2307.09288, equation 2)
    and then over comparisons, with TRL's `center_rewards_coefficient` (arXiv 2312.09244, equation 2).

    Args:
        model: a one-label classifier that takes `last_token_positions`, with its adapters if it has any.
        sharing: whether prefixes are shared, as `decide_sharing` found for this model.
        modules_to_save: the head, and whatever else is trained in full beside LoRA.

    Raises:
        TrainingError: the loss is not finite (Trainer's own filter would hide it).
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        splits: Sequence[Split],
        sharing: Sharing,
        modules_to_save: list[str],
    ) -> None:
        self.train_split, self.test_split = splits
        self.sharing, self.modules_to_save = sharing, modules_to_save
        # TRL rounds what is trained on a quantised base to bf16, where AdamW's small steps on weights
        # near 0.02 are lost, and with them the numbers of a head that the base brought.
        exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        train_dataset, eval_dataset = (split.comparisons.select_columns(COLUMNS) for split in splits)
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=RowCollator(tokenizer.pad_token_id, sharing.used, row_attention.by_block(model)),
        )
        for name, parameter in self.model.named_parameters():
            if name in exact and parameter.dtype != exact[name].dtype:
                parameter.data = exact[name].to(parameter.device)
        self.initial_head = head.head_of(self.model, modules_to_save)
        self._signature_columns = COLUMNS  # what Trainer keeps of a data set
        # Micro-batches, each with its metrics: `(comparisons,)` by name.
        self._uncounted: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        self._needs_autocast = keep_precision(self.accelerator, self.args)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LogLines)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised by `data.tokenization.tokenize`

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's, or one that groups by length; Trainer's own would meet others after a resume."""
        if self.args.train_sampling_strategy != GROUPED:
            return super()._get_train_sampler(train_dataset)
        lengths = self.train_split.sizes(shared=False, padded=True)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(lengths, self.args.train_batch_size, seed)

    def autocast_smart_context_manager(self, *args: Any) -> AbstractContextManager[Any]:
        """Trainer's, which leaves autocast to Accelerate, and ours where Accelerate gives none."""
        if self._needs_autocast:
            return autocast_of(self.args)
        return super().autocast_smart_context_manager(*args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; nothing if the run had ended when it was saved, which Trainer notices a step late."""
        saved = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if saved.get("should_training_stop"):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, which takes no random number from training: how often is no matter."""
        with without_random_numbers(self.args.device):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card in the run folder; the export gets one."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's for each micro-batch of a batch; processes exchange gradients at the last one alone."""
        loss, parts = torch.zeros((), device=self.args.device), inputs["micro_batches"]
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        self.count_comparisons()
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss () of a micro-batch, or of all those of a batch; with `return_outputs` also the rewards.

        It is the mean over the comparisons of the batch, to which a micro-batch adds its part.
        """
        parts = inputs.get("micro_batches", [inputs])
        losses, rewards = zip(*(self._loss(model, part) for part in parts), strict=True)
        if not self.model.training:
            self.count_comparisons()
        loss = sum(losses[1:], losses[0])
        return (loss, {"rewards": torch.cat(rewards)}) if return_outputs else loss

    def _loss(self, model: Any, part: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch's part () of its batch's loss, and its rewards (responses,)."""
        rewards = model(**part["rows"]).logits.squeeze(-1)
        pairs, pairs_each = part["pairs"], part["pairs_each"]
        chosen, rejected = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
        of_pairs = -logsigmoid(chosen - rejected - part["margins"])
        if self.args.center_rewards_coefficient is not None:
            of_pairs = of_pairs + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        losses = mean_of_pairs(of_pairs, pairs_each)
        difference = (chosen - rejected).detach()
        metrics = {
            "accuracy": (difference.sign() + 1) / 2,  # a tie counts 1/2
            "margin": difference,
            "mean_reward": (chosen + rejected).detach() / 2,
            "ties": (difference.abs() <= TIED).to(difference.dtype),
        }
        means = {key: mean_of_pairs(values, pairs_each) for key, values in metrics.items()}
        self._uncounted.append((part, {"loss": losses.detach(), **means}))
        return losses.mean() * part["of_batch"], rewards

    def count_comparisons(self) -> None:
        """Remember one value per comparison since the last time; TRL's `log` takes their mean.

        In evaluation, `gather_for_metrics` drops what a distributed sampler repeats to fill its last batch,
        the last of it, so comparisons are put back into the order in which they came. Not in training: there
        Trainer fetches the batches of a step ahead, and it would drop comparisons of those before the last
        one too.

        Raises:
            TrainingError: a loss is not finite, on all processes, so that they stop together.
        """
        training = self.model.training
        parts, metrics_of_parts = zip(*self._uncounted, strict=True)
        self._uncounted.clear()
        order = np.argsort([number for part in parts for number in part["numbers"]])
        names = [name for part in parts for name in part["names"]]
        values = {
            key: torch.cat([own[key] for own in metrics_of_parts])[order] for key in metrics_of_parts[0]
        }
        gathered = (self.accelerator.gather if training else self.accelerator.gather_for_metrics)(values)
        if not torch.isfinite(gathered["loss"]).all():
            finite = torch.isfinite(values["loss"]).tolist()
            faulty = gather_object([names[i] for i, good in zip(order, finite, strict=True) if not good])
            more = f" and {len(faulty) - FAULTY_NAMED} more" if len(faulty) > FAULTY_NAMED else ""
            raise TrainingError(
                f"the loss is not a finite number in step {self.state.global_step + 1}, of row "
                f"{', '.join(faulty[:FAULTY_NAMED])}{more}; lower learning_rate, or take bf16 for fp16"
            )
        metrics = self._metrics["train" if training else "eval"]
        if training:
            num_tokens = torch.stack([part["num_tokens"] for part in parts]).sum()
            self._total_train_tokens += int(self.accelerator.gather(num_tokens).sum())
            del gathered["loss"]  # which Trainer logs; in evaluation it would weigh batches by their rows
        metrics["num_tokens"] = [self._total_train_tokens]
        for key, each in gathered.items():
            metrics[key] += each.tolist()
        if not training:
            right, ends = metrics["accuracy"], ("accuracy_ci95_low", "accuracy_ci95_high")
            found = proportion_confint(sum(right), len(right), alpha=0.05, method="wilson")
            metrics.update((name, [float(end)]) for name, end in zip(ends, found, strict=True))

    def cheaper_adapters(self) -> AbstractContextManager[None]:
        """`lora.in_one_product`, except where the adapters' weights are sharded: it reads them whole."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return nullcontext() if sharded else lora.in_one_product(self.model)


# --- precision and random numbers, whatever engine trains ----------------------------------------


def keep_precision(accelerator: Any, training: RewardConfig) -> bool:
    """Make FSDP2 and DeepSpeed leave every parameter in its own precision: base in bf16, head in fp32.

    Under a recipe's `bf16` Accelerate (1.15) has FSDP2 gather all parameters in bf16 and round what the model
    returns, and has DeepSpeed make the whole model bf16, the saved one too. Rewards would be bf16: around
    10, neighbours are 0.06 apart. Autocast then chooses the precision of the computation, as under DDP.

    Returns:
        whether the caller has to give that autocast (`autocast_of`), because Accelerate does not.

    Raises:
        RecipeError: FSDP1 was asked for, which is Accelerate's default.
    """
    sharded = getattr(accelerator.state, "fsdp_plugin", None)
    if sharded is not None:
        if sharded.fsdp_version != 2:
            fault = "FSDP1 is not supported: it makes a layer one tensor, which takes no bf16 beside fp32"
            raise RecipeError(f"{fault}: set 'fsdp_version: 2' in the file for `accelerate launch`")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        sharded.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        return True
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and (training.bf16 or training.fp16):
        # No "safe" modules: those would be sent in bf16, and their gradients summed in it.
        dtype = "bfloat16" if training.bf16 else "float16"
        autocast = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
        half = {key: {"enabled": False} for key in ("bf16", "fp16")}
        deepspeed.deepspeed_config.update(half, torch_autocast=autocast)
        return True
    return False


def autocast_of(training: RewardConfig) -> torch.autocast:
    """The recipe's `bf16` or `fp16` as a context.

    Without a cache: that would keep copies of all trained weights, whole, until the step's end.
    """
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    enabled = bool(training.bf16 or training.fp16)
    return torch.autocast(training.device.type, dtype, enabled=enabled, cache_enabled=False)


def without_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What happens within takes no random number from what comes after."""
    there = [] if device.type in ("cpu", "mps") else [device]
    return torch.random.fork_rng(there, device_type=device.type)
