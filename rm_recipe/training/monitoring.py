"""What a training shows while it runs: a line for each log, and early signs that it is wasted."""

import math
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from rm_recipe.processes import warn

ENOUGH = 200  # comparisons, before which a loss says little
BY_STEPS = 0.1  # of all steps, after which something should have been learnt
UPDATES = 10  # at the full learning rate, before which nothing can be expected
LEARNT = 0.005  # by how much the loss is below its start then
TIES = 0.05  # share of pairs with equal rewards that is too many

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
    """Look at what is logged; warn of a loss that stays where it began, and of equal rewards, each once.

    Args:
        comparisons_of_step: how many an optimizer step has.
        plain: whether the loss of an untrained model is ln 2.
    """

    def __init__(self, comparisons_of_step: int, plain: bool) -> None:
        self._of_step, self._loss_to_come, self._ties_to_come = comparisons_of_step, plain, True
        self._before_updates = 1  # steps whose comparisons were judged by a model that had hardly learnt
        self._n, self._total = 0, 0.0  # comparisons of the newest logs after them, the sum of their losses
        self._last_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Of a run that is resumed, the first log holds what came after the last one of before."""
        self._before_updates = 1 + args.get_warmup_steps(state.max_steps)
        self._last_step = max((log["step"] for log in state.log_history if "loss" in log), default=0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Log the last step, too: of a short training nothing would be known."""
        control.should_log |= state.global_step == state.max_steps and args.logging_strategy != "no"

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at the ties of the steps since the last log, and once, when it is time, at the loss."""
        if "loss" not in (logs or ()):
            return
        step, before = state.global_step, self._last_step
        self._last_step = step
        if before >= self._before_updates:
            if self._n >= ENOUGH:
                self._n, self._total = 0, 0.0
            n = (step - before) * self._of_step
            self._n, self._total = self._n + n, self._total + n * logs["loss"]
        if self._ties_to_come and logs.get("ties", 0.0) > TIES:
            self._ties_to_come = False
            found = f"{logs['ties']:.0%} of the comparisons get equal rewards: they have collapsed"
            warn(f"{found}. Lower learning_rate, and take bf16 or fp32 in place of fp16")
        time_to_look = max(UPDATES, BY_STEPS * state.max_steps) <= step - self._before_updates
        if self._loss_to_come and time_to_look and self._n >= ENOUGH:
            self._loss_to_come = False
            loss = self._total / self._n
            if loss > math.log(2) - LEARNT:
                warn(
                    f"after {step} steps the loss is {loss:.3f}, where it began (ln 2 = 0.693). Raise "
                    "learning_rate (LoRA: 1e-4 to 5e-4), or look at the data: rm-recipe check --data"
                )
