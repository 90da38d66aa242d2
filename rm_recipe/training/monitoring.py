"""What a training shows while it runs: a line for each log, and early signs that it is wasted."""

import math
from typing import Any

from statsmodels.stats.proportion import proportion_confint
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from rm_recipe.processes import warn
from rm_recipe.recipe.reader import Recipe

ENOUGH = 200  # comparisons, before which a loss or an accuracy says little
BY_STEPS = 0.1  # of all steps, after which something should have been learnt
UPDATES = 10  # at the full learning rate, before which nothing can be expected
# A run at chance is told from one that has learnt a little only by many comparisons: of those whose true
# accuracy is 0.55, one in a hundred is taken for the other (alpha is two-sided).
MANY = 1000
LEARNS = 0.55
CHANCE_ALPHA = 0.02
LEARNT = 0.005  # by how much the loss is below its start then
TIES = 0.05  # share of pairs with equal rewards that is too many
OVERFITTING = 0.15  # how far train accuracy may be above the held-out one; 3 standard errors of 200 and 200

SHOWN = {"loss": ".3f", "accuracy": ".3f", "margin": ".2f", "learning_rate": ".1e"}
SHOWN |= {"eval_loss": ".3f", "eval_accuracy": ".3f"}


class LogLines(ProgressCallback):
    """Trainer's progress bar, with one short line above it for each log instead of a dict."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Print step, loss, accuracy, margin and learning rate."""
        if self.training_bar is None or not {"loss", "eval_loss"} & set(logs or ()):
            return
        parts = [f"{key.replace('_', ' ')} {logs[key]:{form}}" for key, form in SHOWN.items() if key in logs]
        self.training_bar.write(f"step {state.global_step:>4}  " + "  ".join(parts))

    def close(self) -> None:
        """End the bars where they stand."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


class EarlySigns(TrainerCallback):
    """Look at what is logged; warn of a loss that stays, of chance, of equal rewards and of overfitting.

    Args:
        comparisons_of_step: how many an optimizer step has.
        held_out: how many are held out.
        plain: whether the loss of an untrained model is ln 2, see `starts_at_ln2`.
    """

    def __init__(self, comparisons_of_step: int, held_out: int, plain: bool) -> None:
        self._of_step, self._held_out, self._plain = comparisons_of_step, held_out, plain
        self._before_updates = 1  # steps whose comparisons were judged by a model that had hardly learnt
        self._logs: list[tuple[int, int, dict[str, float]]] = []  # steps before, comparisons, content
        self._done: set[str] = set()
        self._last_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Of a run that is resumed, the first log holds what came after the last one of before."""
        self._before_updates = 1 + args.get_warmup_steps(state.max_steps)
        self._last_step = max((log["step"] for log in state.log_history if "loss" in log), default=0)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at loss, accuracy and ties of the training steps since the last log.

        At loss and accuracy once, when there is enough: who looks at every log finds chance sooner or later.
        """
        if "loss" not in (logs or ()):
            return
        step = state.global_step
        self._logs.append((self._last_step, (step - self._last_step) * self._of_step, logs))
        self._last_step = step
        if logs.get("ties", 0.0) > TIES and self._first("ties"):
            warn(
                f"{logs['ties']:.0%} of the comparisons get equal rewards: they have collapsed. Lower "
                "learning_rate, and take bf16 or fp32 in place of fp16"
            )
        if step - self._before_updates < max(UPDATES, BY_STEPS * state.max_steps):
            return
        n, loss = self._recent(ENOUGH, "loss", after=self._before_updates)
        if n >= ENOUGH and self._first("loss") and self._plain and loss > math.log(2) - LEARNT:
            warn(
                f"after {step} steps the loss is {loss:.3f}, where it began (ln 2 = 0.693). Raise "
                "learning_rate (with LoRA 1e-4 to 5e-4 is usual), or look at the data: rm-recipe check --data"
            )
        n, accuracy = self._recent(MANY, "accuracy", after=self._before_updates)
        if n >= MANY and self._first("accuracy"):
            high = proportion_confint(accuracy * n, n, alpha=CHANCE_ALPHA, method="wilson")[1]
            if high < LEARNS:
                warn(
                    f"after {step} steps {accuracy:.3f} of the last {n} comparisons are judged right, as by "
                    "chance. Raise learning_rate, or look whether chosen and rejected are what they should "
                    "be: rm-recipe check --data"
                )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Compare held-out accuracy with that of the training steps before."""
        held_out = metrics["eval_accuracy"]
        n, train = self._recent(ENOUGH, "accuracy")
        if min(n, self._held_out) >= ENOUGH and train - held_out > OVERFITTING and self._first("overfitting"):
            warn(
                f"train accuracy is {train:.3f} and held-out {held_out:.3f}: the model is overfitting. "
                "Train for fewer epochs or with early_stopping_patience, on more data, or with a lower lora_r"
            )

    def _first(self, what: str) -> bool:
        """Whether this is asked for the first time."""
        first = what not in self._done
        self._done.add(what)
        return first

    def _recent(self, enough: int, name: str, after: int = 0) -> tuple[int, float]:
        """How many comparisons the newest logs have, until these are enough, and the mean over them.

        Args:
            after: logs of this step or earlier ones do not count.
        """
        n, total = 0, 0.0
        for before, comparisons, logs in reversed(self._logs):
            if n >= enough or before < after:
                break
            n += comparisons
            total += logs.get(name, 0.0) * comparisons
        return n, total / max(n, 1)


def starts_at_ln2(recipe: Recipe) -> bool:
    """Whether the loss of an untrained model is ln 2: no margins, no centring."""
    return recipe.training.center_rewards_coefficient is None and recipe.data.margin_column is None
