"""What optimising against a reward model will do, seen before a GPU is spent on PPO.

    rm-recipe overoptimization PROXY --gold GOLD (--policy MODEL --prompts FILE | --samples FILE)

Reward over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760) by best-of-n: replies of a policy, or
given ones, are scored by the model that a policy would be trained against, the proxy, and by one that stands
for people, gold: larger, trained on more or other comparisons, or the mean of several. The best of n by the
proxy gets better by the proxy for ever, and by gold for a while.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rm_recipe.data.comparison import Array
from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.files import write_json
from rm_recipe.overoptimization import exploits
from rm_recipe.overoptimization.best_of_n import gain_curve, kl, spread, standardised
from rm_recipe.overoptimization.page import verdict, write_overoptimization
from rm_recipe.overoptimization.replies import Sample, Sampling, read_samples, sample
from rm_recipe.recipe.reader import is_run_folder
from rm_recipe.scoring import RewardModel, find_model


def overoptimization(
    proxies: Sequence[str],
    gold: Sequence[str],
    file: Path,
    *,
    sampling: Sampling | None = None,
    max_prompts: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Score replies by proxies and gold, and write what best-of-n by each proxy does to gold.

    Args:
        proxies, gold: run folders, exports or one-label models; of several gold models the mean counts.
        file: holds replies, or with `sampling`, which says how replies are drawn, prompts.
        max_prompts: so many prompts are read, the first ones.
        output: where `overoptimization.json` goes, which is returned; by default into the proxy's run.

    Raises:
        RecipeError, DataError, TrainingError: arguments, files or rewards are wrong; drawn replies are kept.
    """
    for name in [*proxies, *gold]:  # before the time that drawing takes
        find_model(name)
    folder = output or default_output(proxies[0])
    found, excluded = read_samples(file, max_prompts, replies=sampling is None)
    if sampling:
        file = folder / "samples.jsonl"
        found, refused = sample(sampling, found, file)
        excluded += refused
    scored, rewards = score_all([*proxies, *gold], found, excluded)
    sizes = np.arange(1, len(scored[0].responses) + 1)
    content = {
        "proxies": list(proxies),
        "gold": list(gold),
        "sampling": asdict(sampling) if sampling else None,
        "samples": {"file": str(file), "excluded": dict(+excluded), **counts(scored)},
        "n": sizes.tolist(),
        "kl": kl(sizes).tolist(),
        "curves": compare_all(scored, rewards, proxies, gold),
    }
    write_json(folder / "overoptimization.json", content)
    write_overoptimization(folder, content)
    return content


def default_output(proxy: str) -> Path:
    """`overoptimization/` in the run of a proxy, which may be named by its export."""
    run = next(filter(is_run_folder, (Path(proxy), Path(proxy).parent)), None)
    if run is None:
        raise RecipeError(f"{proxy} is no run folder; say with --output where the result goes")
    return run / "overoptimization"


# --- what reward models say of the same replies ------------------------------------------------
# Rewards are of the texts of `with_edits`, `(prompts, N + 1 + edits)`, NaN where one does not fit the model.


def score_all(
    names: Sequence[str], found: Sequence[Sample], excluded: Counter[str]
) -> tuple[list[Sample], dict[str, Array]]:
    """Score the same replies by each model.

    Args:
        excluded: counts the prompts that cannot be compared.

    Returns:
        the other prompts, and the rewards by model.

    Raises:
        DataError: fewer than two prompts are left.
        TrainingError: some rewards are not finite.
    """
    samples = comparable(found)
    rewards = {name: score(name, samples) for name in dict.fromkeys(names)}
    fits = np.all([np.isfinite(own).all(axis=1) for own in rewards.values()], axis=0)
    excluded.update(fewer_replies=len(found) - len(samples), does_not_fit_a_model=int((~fits).sum()))
    if fits.sum() < 2:
        left_out = ", ".join(f"{reason} {count}" for reason, count in (+excluded).items()) or "none"
        raise DataError(f"{fits.sum()} prompts are too few to compare models on (left out: {left_out})")
    kept = [prompt for prompt, fit in zip(samples, fits, strict=True) if fit]
    return kept, {name: own[fits] for name, own in rewards.items()}


def comparable(samples: Sequence[Sample]) -> list[Sample]:
    """Prompts with as many replies each, N: what keeps most replies.

    Of more than that, N are taken by lot: files may be sorted.

    Raises:
        DataError: no prompt has two.
    """
    sizes, lot = [len(one.responses) for one in samples], random.Random(0)
    n = max(range(2, max(sizes) + 1), key=lambda n: n * sum(size >= n for size in sizes), default=0)
    if not n:
        raise DataError("no prompt has two replies: of one reply none is the best")
    return [
        one if len(one.responses) == n else Sample(one.prompt, lot.sample(one.responses, n))
        for one in samples
        if len(one.responses) >= n
    ]


def score(name: str, samples: Sequence[Sample]) -> Array:
    """The rewards of a model, which is loaded for it and let go of: of two, one at a time is in memory."""
    model = RewardModel.from_pretrained(name)
    items = [{"prompt": one.prompt, "response": text} for one in samples for text in exploits.with_edits(one)]
    try:
        return model.score(items, progress=True, unfit=np.nan).astype(float).reshape(len(samples), -1)
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}; --samples takes replies that are drawn already") from None


# --- several models as one ---------------------------------------------------------------------


def compare_all(
    samples: Sequence[Sample], rewards: dict[str, Array], proxies: Sequence[str], gold: Sequence[str]
) -> dict[str, Any]:
    """What best-of-n does by each proxy by itself, and by several as ensembles, by name.

    The ensembles are their mean and the worst of them (Coste et al., arXiv 2310.02743), each normalised.
    """
    scaled = {name: normalised(own, len(samples[0].responses)) for name, own in rewards.items()}
    by_proxy = {name: scaled[name] for name in proxies}
    if len(by_proxy) > 1:
        alone = list(by_proxy.values())
        by_proxy["mean of the proxies"] = np.mean(alone, axis=0)
        by_proxy["worst of the proxies"] = np.min(alone, axis=0)
    together = np.mean([scaled[name] for name in gold], axis=0)
    return {name: compare(samples, own, together) for name, own in by_proxy.items()}


def normalised(rewards: Array, n: int) -> Array:
    """Rewards with mean 0 and standard deviation 1 within a prompt's n replies.

    By the deviation over all replies a model would have the less say among several the more its rewards
    differ between prompts, which means nothing.
    """
    return np.asarray((rewards - rewards[:, :n].mean()) / (spread(rewards[:, :n]) or np.inf))


# --- figures -----------------------------------------------------------------------------------


def counts(samples: Sequence[Sample]) -> dict[str, int | None]:
    """How many prompts and replies were scored, and how many of those are empty, said again, or were cut."""
    cut = [prompt.cut for prompt in samples]
    return {
        "n_prompts": len(samples),
        "n_replies": len(samples[0].responses),
        "empty_replies": sum(not reply.strip() for prompt in samples for reply in prompt.responses),
        "repeated_replies": sum(len(p.responses) - len(set(p.responses)) for p in samples),
        "cut_replies": None if None in cut else sum(n or 0 for n in cut),
    }


def compare(samples: Sequence[Sample], proxy: Array, gold: Array) -> dict[str, Any]:
    """What best-of-n by a proxy does, in standard deviations of the rewards of a prompt's replies."""
    n = len(samples[0].responses)
    own, theirs = standardised(proxy[:, :n]), standardised(gold[:, :n])
    by_proxy, by_gold = gain_curve(own, own), gain_curve(own, theirs)
    kind, sentence = verdict(by_proxy, by_gold, len(samples))
    return {
        "verdict": sentence,
        "kind": kind,
        "proxy": by_proxy,
        "gold": by_gold,
        "agreement": exploits.mean_correlation(own, theirs),
        "excess": exploits.by_feature(samples, own, theirs),
        "edits": exploits.by_edit(proxy, gold, n),
        "examples": exploits.examples(samples, own, theirs),
    }
