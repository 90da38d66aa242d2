"""Early signs that a run is wasted, each said once, with what to do about it."""

import math
from typing import Any

from statsmodels.stats.proportion import proportion_confint, proportions_ztest
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ENOUGH = 200  # comparisons, before which an accuracy says little
BY_STEPS = 0.1  # of all steps, after which something should have been learnt
LEARNT = 0.005  # by how much the loss is below its start then
TIES = 0.05  # share of pairs with equal rewards that is too many
BY_HEART = 0.15  # how far train accuracy may be above the held-out one
SIGNIFICANT = 1e-3  # probability of such a gap by chance, below which it is none

NOT_LEARNING = (
    "after a tenth of the steps the loss is {loss:.3f}, where it began (ln 2 = 0.693). Raise learning_rate "
    "(with LoRA 1e-4 to 5e-4 is usual), or look at the data: rm-recipe check --data"
)
AT_CHANCE = (
    "after a tenth of the steps {accuracy:.3f} of the comparisons are judged right, as by chance. Raise "
    "learning_rate, or look whether chosen and rejected are what they should be: rm-recipe check --data"
)
COLLAPSED = (
    "{ties:.0%} of the comparisons get equal rewards: they have collapsed. Lower learning_rate, and take "
    "bf16 or fp32 in place of fp16"
)
LEARNT_BY_HEART = (
    "train accuracy is {train:.3f} and held-out {held_out:.3f}: they are learnt by heart. Train for "
    "fewer epochs or with early_stopping_patience, on more comparisons, or with a lower lora_r"
)


class EarlySigns(TrainerCallback):
    """Looks at what is logged.

    Args:
        comparisons_of_step: how many an optimizer step has.
        held_out: how many are held out.
        plain: whether the loss of an untrained model is ln 2: no margins, no centring.
    """

    def __init__(self, comparisons_of_step: int, held_out: int, plain: bool) -> None:
        self._of_step, self._held_out, self._plain = comparisons_of_step, held_out, plain
        self._looked = False
        self._said: set[str] = set()
        self._logs: list[tuple[int, dict[str, float]]] = []  # the steps that each has, and what it holds
        self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Of a run that is resumed, the first log holds what came after the last one of before."""
        self._last_step = max((log["step"] for log in state.log_history if "loss" in log), default=0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Loss, accuracy and ties of the training steps since the last log."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._logs.append((state.global_step - self._last_step, logs))
        self._last_step = state.global_step
        if logs.get("ties", 0.0) > TIES:
            self._warn(COLLAPSED, ties=logs["ties"])
        if state.global_step < BY_STEPS * state.max_steps:
            return
        n, (loss, accuracy) = self._recent("loss", "accuracy")
        if n < ENOUGH or self._looked:
            return
        self._looked = True
        if self._plain and loss > math.log(2) - LEARNT:
            self._warn(NOT_LEARNING, loss=loss)
        low, high = proportion_confint(accuracy * n, n, method="wilson")
        if low <= 0.5 <= high or high < 0.5:
            self._warn(AT_CHANCE, accuracy=accuracy)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Held-out accuracy beside that of the training steps before."""
        held_out = (metrics or {}).get("eval_accuracy")
        n, (train,) = self._recent("accuracy")
        if held_out is None or n < ENOUGH or train - held_out < BY_HEART or not state.is_world_process_zero:
            return
        if proportions_ztest([train * n, held_out * self._held_out], [n, self._held_out])[1] < SIGNIFICANT:
            self._warn(LEARNT_BY_HEART, train=train, held_out=held_out)

    def _recent(self, *names: str) -> tuple[int, list[float]]:
        """Means over the newest logs that have enough comparisons, and how many these are."""
        n, sums = 0, [0.0] * len(names)
        for steps, logs in reversed(self._logs):
            n += steps * self._of_step
            share = steps * self._of_step
            sums = [total + logs.get(name, 0.0) * share for total, name in zip(sums, names, strict=True)]
            if n >= ENOUGH:
                break
        return n, [total / max(n, 1) for total in sums]

    def _warn(self, text: str, **values: float) -> None:
        if text not in self._said:
            self._said.add(text)
            tqdm.write("warning: " + text.format(**values))
