"""Early signs that a run is wasted, each said once, with what to do about it."""

import math
from typing import Any

from statsmodels.stats.proportion import proportion_confint, proportions_ztest
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ENOUGH = 200  # comparisons, before which a loss says little
BY_STEPS = 0.1  # of all steps, after which something should have been learnt
UPDATES = 10  # at the full learning rate, before which nothing can be expected
# A run at chance is told from one that has learnt a little only by many comparisons: of those whose true
# accuracy is 0.55, one in a hundred is taken for the other (alpha is two-sided).
MANY = 1000
LEARNS = 0.55
CHANCE_ALPHA = 0.02
LEARNT = 0.005  # by how much the loss is below its start then
TIES = 0.05  # share of pairs with equal rewards that is too many
BY_HEART = 0.15  # how far train accuracy may be above the held-out one
SIGNIFICANT = 1e-3  # probability of such a gap by chance, below which it is none

NOT_LEARNING = (
    "after {step} steps the loss is {loss:.3f}, where it began (ln 2 = 0.693). Raise learning_rate "
    "(with LoRA 1e-4 to 5e-4 is usual), or look at the data: rm-recipe check --data"
)
AT_CHANCE = (
    "after {step} steps {accuracy:.3f} of the last {n} comparisons are judged right, as by chance. Raise "
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
        self._before_updates = 1  # steps whose comparisons were judged by a model that had hardly learnt
        self._said: set[str] = set()
        self._logs: list[tuple[int, int, dict[str, float]]] = []  # steps before each, those in it, content
        self._looked: set[str] = set()
        self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Of a run that is resumed, the first log holds what came after the last one of before."""
        self._before_updates = 1 + args.get_warmup_steps(state.max_steps)
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
        self._logs.append((self._last_step, state.global_step - self._last_step, logs))
        self._last_step = step = state.global_step
        if logs.get("ties", 0.0) > TIES:
            self._warn(COLLAPSED, ties=logs["ties"])
        if step - self._before_updates < max(UPDATES, BY_STEPS * state.max_steps):
            return
        n, (loss,) = self._recent(ENOUGH, "loss", after=self._before_updates)
        if n >= ENOUGH and self._first_look("loss") and self._plain and loss > math.log(2) - LEARNT:
            self._warn(NOT_LEARNING, step=step, loss=loss)
        n, (accuracy,) = self._recent(MANY, "accuracy", after=self._before_updates)
        if n >= MANY and self._first_look("accuracy"):
            high = proportion_confint(accuracy * n, n, alpha=CHANCE_ALPHA, method="wilson")[1]
            if high < LEARNS:
                self._warn(AT_CHANCE, step=step, accuracy=accuracy, n=n)

    def _first_look(self, at: str) -> bool:
        """Whether this has not been looked at: a look at every log would find chance sooner or later."""
        first = at not in self._looked
        self._looked.add(at)
        return first

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
        n, (train,) = self._recent(ENOUGH, "accuracy")
        if held_out is None or n < ENOUGH or train - held_out < BY_HEART or not state.is_world_process_zero:
            return
        if proportions_ztest([train * n, held_out * self._held_out], [n, self._held_out])[1] < SIGNIFICANT:
            self._warn(LEARNT_BY_HEART, train=train, held_out=held_out)

    def _recent(self, enough: int, *names: str, after: int = 0) -> tuple[int, list[float]]:
        """Means over the newest logs that have enough comparisons, and how many these are.

        Args:
            after: logs of this step or earlier ones do not count.
        """
        n, sums = 0, [0.0] * len(names)
        for before, steps, logs in reversed(self._logs):
            if n >= enough or before < after:
                break
            share = steps * self._of_step
            n += share
            sums = [total + logs.get(name, 0.0) * share for total, name in zip(sums, names, strict=True)]
        return n, [total / max(n, 1) for total in sums]

    def _warn(self, text: str, **values: float) -> None:
        if text not in self._said:
            self._said.add(text)
            tqdm.write("warning: " + text.format(**values))
