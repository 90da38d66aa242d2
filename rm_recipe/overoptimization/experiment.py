"""What optimising against a reward model will do, seen before a GPU is spent on PPO.

    rm-recipe overoptimization PROXY --gold GOLD (--policy MODEL --prompts FILE | --samples FILE)

Reward over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760) by best-of-n: replies of a policy, or
given ones, are scored by the model that a policy would be trained against, the proxy, and by one that stands
for people, gold: larger, trained on more or other comparisons, or the mean of several. The best of n by the
proxy gets better by the proxy for ever, and by gold for a while.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rm_recipe.data.comparison import Array
from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.files import redacted, whole_file, write_json
from rm_recipe.overoptimization import exploits
from rm_recipe.overoptimization.best_of_n import curve, kl, spread, standardised
from rm_recipe.overoptimization.page import verdict, write_overoptimization
from rm_recipe.overoptimization.replies import Sample, Sampling, read_samples, sample
from rm_recipe.recipe.reader import is_run_folder
from rm_recipe.rl import combine
from rm_recipe.scoring import RewardModel, find_model

MEAN, WORST = "mean of the proxies", "worst of the proxies"
FOLDER, SAMPLES, SCORES = "overoptimization", "samples.jsonl", "scores.jsonl"


def overoptimization(
    proxies: Sequence[str],
    gold: Sequence[str],
    file: Path,
    *,
    sampling: Sampling | None = None,
    max_prompts: int | None = None,
    safety: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score replies by proxies and gold, and write what best-of-n by each proxy does to gold.

    Args:
        proxies, gold: run folders, exports or one-label models; of several gold models the mean counts.
        file: holds replies, or with `sampling`, which says how replies are drawn, prompts.
        max_prompts: so many prompts are read, the first ones.
        safety: a model with which each proxy, then the model of helpfulness, is combined (`rl.combine`).
        output: where `overoptimization.json` goes, which is returned; by default into the proxy's run.
        overwrite: whether replies that were drawn otherwise may be replaced.

    Raises:
        RecipeError, DataError, TrainingError: arguments, files or rewards are wrong; drawn replies are kept.
    """
    folder = check_models(proxies, gold, output)
    found, excluded = read_samples(file, max_prompts, replies=sampling is None)
    if sampling:
        file = folder / SAMPLES
        found, refused = sample(sampling, found, file, overwrite=overwrite)
        excluded += refused
    scored, rewards = score_all([*proxies, *([safety] if safety else []), *gold], found, excluded)
    by_proxy = {name: rewards[name] for name in proxies}
    if safety:
        together = {name: with_safety(scored, rewards[safety], own) for name, own in by_proxy.items()}
        by_proxy = {f"{name} with safety {safety}": own for name, own in together.items()}
    sizes = np.arange(1, len(scored[0].responses) + 1)
    content = {
        "proxies": list(proxies),
        "gold": list(gold),
        "safety": safety,
        "sampling": asdict(sampling) if sampling else None,
        "samples": {"file": str(file), "excluded": dict(excluded), **counts(scored)},
        "n": sizes.tolist(),
        "kl": kl(sizes).tolist(),
        "curves": compare_all(scored, by_proxy, [rewards[name] for name in gold]),
    }
    write_scores(folder / SCORES, scored, rewards)
    write_json(folder / "overoptimization.json", content)
    write_overoptimization(folder, content)
    return content


def check_models(proxies: Sequence[str], gold: Sequence[str], output: Path | None) -> Path:
    """The folder that the result goes into.

    Raises:
        RecipeError: a model is named twice, there is no such model, or no such folder can be made.
    """
    names = [*proxies, *gold]
    if len({Path(find_model(name)).resolve() for name in names}) < len(names):
        raise RecipeError(f"of {', '.join(names)} one is named twice: what it does to itself says nothing")
    folder = output or default_output(proxies[0])
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; --output names a folder")
    return folder


def default_output(proxy: str) -> Path:
    """`overoptimization/` in the run of a proxy, which may be named by its export."""
    run = next(filter(is_run_folder, (Path(proxy), Path(proxy).parent)), None)
    if run is None:
        raise RecipeError(f"{proxy} is no run folder; say with --output where the result goes")
    return run / FOLDER


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
        DataError: no prompt is left.
        TrainingError: some rewards are not finite.
    """
    samples = comparable(found)
    n = len(samples[0].responses)
    rewards = {name: score(name, samples) for name in dict.fromkeys(names)}
    fits = np.all([np.isfinite(own[:, :n]).all(axis=1) for own in rewards.values()], axis=0)
    if not fits.any():
        raise DataError("every prompt has a reply that does not fit one of the models: too long, or refused")
    fewer, unfit = len(found) - len(samples), int((~fits).sum())
    excluded += Counter({"fewer_replies": fewer, "does_not_fit_a_model": unfit})
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
        one if len(one.responses) == n else replace(one, responses=lot.sample(one.responses, n), cut=None)
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
        raise TrainingError(f"{name}: {error}; drawn replies are kept and need not be drawn again") from None


# --- several models as one ---------------------------------------------------------------------


def compare_all(samples: Sequence[Sample], proxies: dict[str, Array], gold: list[Array]) -> dict[str, Any]:
    """What best-of-n does by each proxy by itself, and by several as ensembles, by name.

    The ensembles are their mean and the worst of them (Coste et al., arXiv 2310.02743), each normalised.
    """
    n = len(samples[0].responses)
    if len(proxies) > 1:
        scaled = [normalised(own, n) for own in proxies.values()]
        proxies = {**proxies, MEAN: np.mean(scaled, axis=0), WORST: np.min(scaled, axis=0)}
    together = gold[0] if len(gold) == 1 else np.mean([normalised(own, n) for own in gold], axis=0)
    return {name: compare(samples, own, together) for name, own in proxies.items()}


def normalised(rewards: Array, n: int) -> Array:
    """Rewards with mean 0 and standard deviation 1 within a prompt's n replies.

    By the deviation over all replies a model would have the less say among several the more its rewards
    differ between prompts, which means nothing.
    """
    return np.asarray((rewards - rewards[:, :n].mean()) / (spread(rewards[:, :n]) or np.inf))


def with_safety(samples: Sequence[Sample], safe: Array, helpful: Array) -> Array:
    """Each proxy, then the model of helpfulness, with a model of safety, as `rl.combine` has it."""
    # The rewards themselves, in the place of prompts and completions.
    choose = combine(lambda safe, _: safe, lambda _, helpful: helpful, whiten=False)
    marked = np.repeat([prompt.is_safety for prompt in samples], safe.shape[1])
    return np.reshape(choose(safe.ravel(), helpful.ravel(), is_safety=marked), safe.shape)


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
    by_proxy, by_gold = curve(own, own), curve(own, theirs)
    kind, sentence = verdict(by_proxy, by_gold, len(samples))
    return {
        "verdict": sentence,
        "kind": kind,
        "spread": {"proxy": spread(proxy[:, :n]), "gold": spread(gold[:, :n])},
        "proxy": by_proxy,
        "gold": by_gold,
        "gap_at_n": by_proxy["gain"][-1] - by_gold["gain"][-1],
        "agreement": exploits.mean_correlation(own, theirs),
        "excess": exploits.by_feature(samples, own, theirs),
        "edits": exploits.by_edit(exploits.changes(samples, proxy), exploits.changes(samples, gold)),
        "examples": exploits.examples(samples, own, theirs),
    }


def write_scores(target: Path, samples: Sequence[Sample], rewards: dict[str, Array]) -> None:
    """Write one line for each prompt: its replies and what each model gives them."""
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for number, one in enumerate(samples):
            own = {name: of[number, : len(one.responses)].tolist() for name, of in rewards.items()}
            line = {"prompt": one.prompt, "responses": one.responses, "rewards": redacted(own)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
