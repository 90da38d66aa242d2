"""What optimising against a reward model will do, seen before a GPU is spent on PPO.

    rm-recipe overoptimization PROXY --gold GOLD (--policy MODEL --prompts FILE | --samples FILE)

Reward over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760) by best-of-n: replies of a policy, or
given ones, are scored by the model that a policy would be trained against, the proxy, and by one that stands
for people, gold: larger, trained on more or other comparisons, or the mean of several. The best of n by the
proxy gets better by the proxy for ever, and by gold for a while.
"""

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.evaluation.probes import EDITS
from rm_recipe.files import redact, whole_file, write_json
from rm_recipe.overoptimization.best_of_n import Array, curve, kl, spread, standardised
from rm_recipe.overoptimization.exploits import (
    by_edit,
    by_feature,
    changes,
    examples,
    mean_correlation,
    with_edits,
)
from rm_recipe.overoptimization.page import verdict, write_overoptimization
from rm_recipe.overoptimization.replies import Sample, Sampling, read_prompts, read_samples, sample
from rm_recipe.recipe.reader import is_run_folder
from rm_recipe.rl import combine
from rm_recipe.scoring import RewardModel, find_model

FEWEST_REPLIES = 2
MEAN, WORST = "mean of the proxies", "worst of the proxies"
FOLDER, SAMPLES, SCORES = "overoptimization", "samples.jsonl", "scores.jsonl"


def overoptimization(
    proxies: Sequence[str],
    gold: Sequence[str],
    *,
    sampling: Sampling | None = None,
    prompts: Path | None = None,
    max_prompts: int | None = None,
    samples: Path | None = None,
    safety: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score replies by proxies and gold, and write what best-of-n by each proxy does to gold.

    Args:
        proxies, gold: run folders, exports or one-label models; of several gold models the mean counts.
        sampling, prompts: how replies are drawn, and a file of prompts; or `samples`, a file of replies.
        safety: a model with which each proxy, then the model of helpfulness, is combined (`rl.combine`).
        output: where `overoptimization.json` goes, which is returned; by default into the proxy's run.
        overwrite: whether replies that were drawn otherwise may be replaced.

    Raises:
        RecipeError, DataError, TrainingError: arguments, files or rewards are wrong; drawn replies are kept.
    """
    folder = check_models(proxies, gold, output)
    if samples:
        found, excluded = read_samples(samples, max_prompts)
    elif sampling and prompts:
        found, excluded = read_prompts(prompts, max_prompts)
        found, refused = sample(sampling, found, folder / SAMPLES, overwrite=overwrite)
        excluded += refused
    else:
        raise RecipeError("give --policy and --prompts, or --samples")
    scored, rewards = score_all([*proxies, *([safety] if safety else []), *gold], found, excluded)
    sizes = np.arange(1, len(scored[0].responses) + 1)
    of_gold = ensemble([rewards[name] for name in gold], len(sizes))
    content = {
        "proxies": list(proxies),
        "gold": list(gold),
        "safety": safety,
        "sampling": asdict(sampling) if sampling and not samples else None,
        "samples": {"file": str(samples or folder / SAMPLES), "excluded": dict(excluded), **counts(scored)},
        "n": sizes.tolist(),
        "kl": kl(sizes).tolist(),
        "curves": {
            name: compare(scored, own, of_gold)
            for name, own in candidates(scored, rewards, proxies, safety).items()
        },
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
    seen = set()
    for name in [*proxies, *gold]:
        place = str(Path(find_model(name)).resolve())
        if place in seen:
            raise RecipeError(f"{name} is named twice: what one model does to itself says nothing")
        seen.add(place)
    folder = output or default_output(proxies[0])
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; --output names a folder")
    return folder


def default_output(proxy: str) -> Path:
    """`overoptimization/` in the run of a proxy, which may be named by its export."""
    for place in (Path(proxy), Path(proxy).parent):
        if is_run_folder(place):
            return place / FOLDER
    raise RecipeError(f"{proxy} is no run folder; say with --output where the result goes")


# --- what reward models say of the same replies ------------------------------------------------
# Rewards are `(prompts, N + edits)`: of each prompt's N replies, then of the edits of one of them, NaN where
# there are none or they do not fit the model.


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
    excluded += Counter({"fewer_replies": len(found) - len(samples)})
    texts, n = with_edits(samples), len(samples[0].responses)
    rewards = {name: score(name, samples, texts) for name in dict.fromkeys(names)}
    fits = np.all([np.isfinite(own[:, :n]).all(axis=1) for own in rewards.values()], axis=0)
    if not fits.any():
        raise DataError("every prompt has a reply that does not fit one of the models: too long, or refused")
    excluded += Counter({"does_not_fit_a_model": int((~fits).sum())})
    kept = [prompt for prompt, fit in zip(samples, fits, strict=True) if fit]
    return kept, {name: own[fits] for name, own in rewards.items()}


def comparable(samples: Sequence[Sample]) -> list[Sample]:
    """Prompts with as many replies each, N: what keeps most replies.

    Of more than that, N are taken by lot: files may be sorted.

    Raises:
        DataError: no prompt has two.
    """
    sizes = np.array([len(prompt.responses) for prompt in samples])
    possible = sorted({int(size) for size in sizes if size >= FEWEST_REPLIES})
    if not possible:
        raise DataError("no prompt has two replies: of one reply none is the best")
    n = max(possible, key=lambda size: size * int((sizes >= size).sum()))
    rng = np.random.default_rng(0)
    same = [prompt for prompt in samples if len(prompt.responses) >= n]
    for number, prompt in enumerate(same):
        if len(prompt.responses) > n:
            chosen = np.sort(rng.choice(len(prompt.responses), n, replace=False))
            same[number] = replace(prompt, responses=[prompt.responses[k] for k in chosen], cut=None)
    return same


def score(name: str, samples: Sequence[Sample], texts: Sequence[list[str]]) -> Array:
    """The rewards of a model, which is loaded for it and let go of: of two, one at a time is in memory."""
    model = RewardModel.from_pretrained(name)
    pairs = [(prompt, text) for prompt, own in zip(samples, texts, strict=True) for text in own]
    items = [{"prompt": prompt.prompt, "response": text} for prompt, text in pairs]
    try:
        found = iter(model.score(items, progress=True, unfit=np.nan).tolist())
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}; drawn replies are kept and need not be drawn again") from None
    del model
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    rewards = np.full((len(samples), len(samples[0].responses) + len(EDITS)), np.nan)
    for row, own in zip(rewards, texts, strict=True):
        row[: len(own)] = [next(found) for _ in own]
    return rewards


# --- several models as one ---------------------------------------------------------------------


def candidates(
    samples: Sequence[Sample], rewards: dict[str, Array], proxies: Sequence[str], safety: str | None
) -> dict[str, Array]:
    """What is optimised: each proxy by itself, and several as ensembles, by name.

    The ensembles are their mean and the worst of them (Coste et al., arXiv 2310.02743), each normalised. With
    a model of safety each proxy is combined first, as `rl.combine` has it.
    """
    found = {name: rewards[name] for name in proxies}
    if safety:
        together = {name: with_safety(samples, rewards[safety], own) for name, own in found.items()}
        found = {f"{name} with safety {safety}": own for name, own in together.items()}
    if len(found) > 1:
        every, n = list(found.values()), len(samples[0].responses)
        found |= {MEAN: ensemble(every, n), WORST: ensemble(every, n, worst=True)}
    return found


def ensemble(rewards: Sequence[Array], n: int, *, worst: bool = False) -> Array:
    """The mean or the minimum of several models' rewards; those of a single one as they are.

    Each is normalised to mean 0 and standard deviation 1 within a prompt's n replies. By that over all
    replies a model would have the less say the more its rewards differ between prompts, which means nothing.
    """
    if len(rewards) == 1:
        return rewards[0]
    scaled = [(own - own[:, :n].mean()) / (spread(own[:, :n]) or np.inf) for own in rewards]
    return np.asarray(np.min(scaled, axis=0) if worst else np.mean(scaled, axis=0))


def with_safety(samples: Sequence[Sample], safe: Array, helpful: Array) -> Array:
    """Two models as one."""
    models = [lambda *_, own=own, **__: own.ravel().tolist() for own in (safe, helpful)]
    reward, nothing = combine(*models, whiten=False), [""] * safe.size
    marked = np.repeat([prompt.is_safety for prompt in samples], safe.shape[1])
    return np.reshape(reward(nothing, nothing, is_safety=marked.tolist()), safe.shape)


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
    by_proxy, by_gold = curve(proxy[:, :n], proxy[:, :n]), curve(proxy[:, :n], gold[:, :n])
    own, theirs = standardised(proxy[:, :n]), standardised(gold[:, :n])
    kind, sentence = verdict(by_proxy, by_gold, len(samples))
    return {
        "verdict": sentence,
        "kind": kind,
        "spread": {"proxy": spread(proxy[:, :n]), "gold": spread(gold[:, :n])},
        "proxy": by_proxy,
        "gold": by_gold,
        "gap_at_n": by_proxy["gain"][-1] - by_gold["gain"][-1],
        "agreement": mean_correlation(own, theirs),
        "excess": by_feature(samples, own, theirs),
        "edits": by_edit(changes(samples, proxy), changes(samples, gold)),
        "examples": examples(samples, own, theirs),
    }


def write_scores(target: Path, samples: Sequence[Sample], rewards: dict[str, Array]) -> None:
    """Write one line for each prompt: its replies and what each model gives them."""
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(samples):
            n = len(prompt.responses)
            own = {redact(name): of[number, :n].tolist() for name, of in rewards.items()}
            line = {"prompt": prompt.prompt, "responses": prompt.responses, "rewards": own}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
