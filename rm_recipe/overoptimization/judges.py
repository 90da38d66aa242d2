"""What reward models say of the same replies, each by its own template; and what several are together."""

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rm_recipe.errors import DataError, TrainingError
from rm_recipe.evaluation.probes import EDITS
from rm_recipe.overoptimization.best_of_n import Array, spread
from rm_recipe.overoptimization.exploits import edited, to_edit
from rm_recipe.overoptimization.replies import Sample
from rm_recipe.rl import combine
from rm_recipe.scoring import RewardModel

FEWEST_REPLIES = 2
MEAN, WORST = "mean of the proxies", "worst of the proxies"


@dataclass(frozen=True)
class Judged:
    """What a judge says.

    Attributes:
        rewards: of the replies, `(prompts, N)`; NaN where a conversation does not fit the model.
        of_edited: of the edited replies, `(edits, replies)`; likewise.
    """

    name: str
    rewards: Array
    of_edited: Array

    def scaled(self) -> "Judged":
        """With mean 0 over all replies and 1 as the standard deviation within a prompt.

        By that over all replies a judge would have the less say the more its rewards differ between prompts,
        which means nothing.
        """
        mean, unit = self.rewards.mean(), spread(self.rewards) or np.inf
        return Judged(self.name, (self.rewards - mean) / unit, (self.of_edited - mean) / unit)


def judge_all(
    names: Sequence[str], samples: Sequence[Sample]
) -> tuple[list[Sample], list[tuple[int, int]], dict[str, Judged], Counter[str]]:
    """What each model says of the same replies.

    Returns:
        the prompts with as many replies each that fit all models, which of the replies were edited (as
        `exploits.to_edit` gives them), the models' rewards by name, and the count of what was left out.
    """
    kept, excluded = comparable(samples)
    places = to_edit(kept)
    judged = {name: judge(name, kept, edited(kept, places)) for name in dict.fromkeys(names)}
    fits = np.all([np.isfinite(own.rewards).all(axis=1) for own in judged.values()], axis=0)
    kept, places, judged, lost = without_unfit(kept, places, judged, fits)
    return kept, places, judged, excluded + Counter({"does_not_fit_a_model": lost} if lost else {})


def comparable(samples: Sequence[Sample]) -> tuple[list[Sample], Counter[str]]:
    """Prompts with as many replies each, N, and the count of those with fewer.

    N is what keeps most replies. Of more than that, N are taken by lot: files may be sorted.

    Raises:
        DataError: no prompt has two.
    """
    sizes = np.array([len(prompt.responses) for prompt in samples])
    possible = sorted({int(size) for size in sizes if size >= FEWEST_REPLIES})
    if not possible:
        raise DataError("no prompt has two replies: of one reply none is the best")
    n = max(possible, key=lambda size: size * int((sizes >= size).sum()))
    rng = np.random.default_rng(0)
    same = []
    for prompt in samples:
        if len(prompt.responses) > n:
            chosen = np.sort(rng.choice(len(prompt.responses), n, replace=False)).tolist()
            same.append(replace(prompt, responses=[prompt.responses[k] for k in chosen], cut=None))
        elif len(prompt.responses) == n:
            same.append(prompt)
    few = len(samples) - len(same)
    return same, Counter({"fewer_replies": few} if few else {})


def judge(name: str, samples: Sequence[Sample], edits: Sequence[dict[str, Any]]) -> Judged:
    """The rewards of a model, which is loaded for it and let go of: of two, one at a time is in memory.

    Raises:
        TrainingError: some are not finite.
    """
    model = RewardModel.from_pretrained(name)
    items = [{"prompt": prompt.prompt, "response": reply} for prompt in samples for reply in prompt.responses]
    try:
        rewards = model.score([*items, *edits], progress=True, unfit=np.nan).astype(float)
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}; drawn replies are kept and need not be drawn again") from None
    del model
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    of_edited = rewards[len(items) :]
    return Judged(name, rewards[: len(items)].reshape(len(samples), -1), of_edited.reshape(len(EDITS), -1))


def without_unfit(
    samples: Sequence[Sample],
    places: Sequence[tuple[int, int]],
    judged: dict[str, Judged],
    fits: Any,
) -> tuple[list[Sample], list[tuple[int, int]], dict[str, Judged], int]:
    """Everything without the prompts of which a conversation does not fit some model, and their number.

    Raises:
        DataError: nothing is left.
    """
    if not fits.any():
        raise DataError("every prompt has a reply that does not fit one of the models: too long, or refused")
    numbers = np.cumsum(fits) - 1
    edits = np.array([fits[number] for number, _ in places], bool)
    return (
        [prompt for prompt, fit in zip(samples, fits, strict=True) if fit],
        [(int(numbers[number]), reply) for number, reply in places if fits[number]],
        {name: Judged(name, own.rewards[fits], own.of_edited[:, edits]) for name, own in judged.items()},
        int((~fits).sum()),
    )


def ensemble(name: str, judged: Sequence[Judged], *, worst: bool = False) -> Judged:
    """The mean or the minimum of several judges, each normalised; a single one as it is."""
    if len(judged) == 1:
        return Judged(name, judged[0].rewards, judged[0].of_edited)
    scaled = [own.scaled() for own in judged]
    of = np.min if worst else np.mean
    return Judged(
        name, of([own.rewards for own in scaled], axis=0), of([own.of_edited for own in scaled], axis=0)
    )


def ensembles(proxies: Sequence[Judged]) -> list[Judged]:
    """What several proxies are together."""
    if len(proxies) == 1:
        return []
    return [ensemble(MEAN, proxies), ensemble(WORST, proxies, worst=True)]


def with_safety(
    safety: Judged, helpful: Judged, samples: Sequence[Sample], places: Sequence[tuple[int, int]]
) -> Judged:
    """Two models as one, as `handoff.combine` has it."""

    def both(safe: Array, useful: Array, is_safety: Array) -> Array:
        reward = combine(lambda *_, **__: safe.ravel().tolist(), lambda *_, **__: useful.ravel().tolist(),
                         whiten=False)  # fmt: skip
        nothing = [""] * safe.size
        return np.array(reward(nothing, nothing, is_safety=is_safety.ravel().tolist())).reshape(safe.shape)

    of_prompts = np.array([prompt.is_safety for prompt in samples], bool)
    of_edits = of_prompts[[number for number, _ in places]] if places else np.zeros(0, bool)
    return Judged(
        f"{helpful.name} with safety {safety.name}",
        both(safety.rewards, helpful.rewards, np.broadcast_to(of_prompts[:, None], safety.rewards.shape)),
        both(safety.of_edited, helpful.of_edited, np.broadcast_to(of_edits, safety.of_edited.shape)),
    )
