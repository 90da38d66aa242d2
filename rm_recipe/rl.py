"""The reward model in the week of reinforcement learning: as a reward function for TRL's trainers.

TRL (1.16) also takes an export's folder as it is: `reward_funcs="outputs/NAME/export"`. A function from here
gives the same rewards to conversations, and more: it reads prompts that are plain texts as one user message,
where TRL would apply no template to them, and it normalises, clips and combines.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from rm_recipe.data.comparison import Excluded, Malformed, as_messages
from rm_recipe.errors import RecipeError
from rm_recipe.scoring import RewardModel

# (prompts, completions, **columns) -> a reward for each; as `reward_funcs` of TRL's RLOO and GRPO trainers.
RewardFunction = Callable[..., list[float]]
Text = str | list[dict[str, Any]]

LEAST_STD = 1e-8  # a batch of equal rewards is whitened to zeros


def reward_function(
    path: str | Path, *, normalize: bool = False, clip: float | None = None, device: str | None = None
) -> RewardFunction:
    """A reward model as a reward function.

    Completions of one prompt share its encoding. A reply that does not fit the model has no reward: NaN,
    which TRL leaves out; so has a completion that is no reply, as one that ends in a call of a tool.

    Args:
        path: a run folder, an export or a one-label model.
        normalize: give (reward - mean) / std, with the mean and standard deviation over held-out replies that
            the export keeps in its config.json. So mean and scale are the same for every reward model
            (InstructGPT, arXiv 2203.02155, section 3.5, shifts the reward to mean 0 before RL).
        clip: the largest reward either way, after normalising.

    Raises:
        RecipeError: there is no such model, or `normalize` is asked of one without mean and std.
    """
    reward_model = RewardModel.from_pretrained(path, device)
    config = reward_model.model.config
    scale: list[Any] = [getattr(config, name, None) for name in ("reward_mean", "reward_std")]
    if normalize and None in scale:
        raise RecipeError(f"{path} has no reward_mean and reward_std in its config.json; export it anew")
    mean, std = map(float, scale if normalize else (0, 1))
    limit = np.inf if clip is None else clip

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        """One reward for each prompt and its completion."""
        read = enumerate(as_item(*pair) for pair in zip(prompts, completions, strict=True))
        items = {number: item for number, item in read if item is not None}
        rewards = np.full(len(prompts), np.nan)
        rewards[list(items)] = reward_model.score(list(items.values()), unfit=np.nan)
        return np.clip((rewards - mean) / std, -limit, limit).tolist()

    # TRL logs rewards under a function's name, and exports are all called so.
    folder = Path(path).resolve() if Path(path).is_dir() else Path(path)
    reward.__name__ = folder.parent.name if folder.name == "export" else folder.name
    return reward


def as_item(prompt: Text, completion: Text) -> dict[str, Any] | None:
    """What `RewardModel.score` takes, of a prompt and a completion as TRL has them: texts or messages.

    Returns:
        None where the completion does not end in an assistant's text, but in a call of a tool, say.
    """
    try:
        # What is a text here was one to the policy, too, whatever it looks like.
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_messages(prompt)
        if isinstance(completion, str):
            return {"prompt": before, "response": completion} if before else None
        said = as_messages(completion, "completion")
    except (Excluded, Malformed):
        return None
    if not before or not said or said[-1]["role"] != "assistant" or "tool_calls" in said[-1]:
        return None
    return {"prompt": [*before, *said[:-1]], "response": said[-1]["content"]}


def combine(
    safety: str | Path | RewardFunction,
    helpfulness: str | Path | RewardFunction,
    *,
    threshold: float = 0.15,
    whiten: bool = True,
) -> RewardFunction:
    """Two reward models as one (Llama 2, arXiv 2307.09288, section 3.2.3).

    The safety score counts where the prompt is marked as one that may bring an unsafe response, or where
    that score, as a probability sigmoid(r), is below the threshold; elsewhere the helpfulness score does.
    The chosen scores are then whitened: mean 0 and standard deviation 1 over the batch. What one of the
    models cannot read has no reward, NaN, whatever the other says.

    Args:
        safety, helpfulness: models, or reward functions of the caller's own.
        threshold: a probability; the paper's 0.15 found unsafe responses with precision 0.89 and recall 0.55.

    Returns:
        a reward function; the marks come from the data set's column `is_safety`, if it has one.
    """
    functions = [model if callable(model) else reward_function(model) for model in (safety, helpfulness)]

    def combined(
        prompts: Sequence[Text], completions: Sequence[Text], is_safety: Any = None, **columns: Any
    ) -> list[float]:
        """One reward for each prompt and its completion."""
        safe, helpful = (np.array(score(prompts, completions, **columns), float) for score in functions)
        unsafe = expit(safe) < threshold
        if is_safety is not None:
            unsafe |= np.array(is_safety, bool)
        # The paper's logit of the sigmoid is the reward itself.
        rewards = np.where(unsafe, safe, helpful)
        rewards[np.isnan(safe) | np.isnan(helpful)] = np.nan
        if whiten and not np.isnan(rewards).all():  # which numpy would warn of
            rewards = (rewards - np.nanmean(rewards)) / max(float(np.nanstd(rewards)), LEAST_STD)
        return rewards.tolist()

    return combined
