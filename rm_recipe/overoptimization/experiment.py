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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.evaluation.metrics import rank_correlation
from rm_recipe.evaluation.probes import EDITS
from rm_recipe.files import redact, whole_file, write_json
from rm_recipe.overoptimization.best_of_n import Array, curve, kl, mean_interval, spread, standardised
from rm_recipe.overoptimization.exploits import by_edit, by_feature, edited, examples, to_edit
from rm_recipe.overoptimization.page import verdict, write_overoptimization
from rm_recipe.overoptimization.replies import Sample, Sampling, read_prompts, read_samples, sample
from rm_recipe.recipe.reader import is_run_folder
from rm_recipe.rl import combine
from rm_recipe.scoring import RewardModel, find_model

FEWEST_REPLIES = 2
MEAN, WORST = "mean of the proxies", "worst of the proxies"
FOLDER, SAMPLES, SCORES, RESULT = "overoptimization", "samples.jsonl", "scores.jsonl", "overoptimization.json"


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
        sampling, prompts: how replies are drawn, and a file of prompts; or
        samples: a file of replies.
        max_prompts: as many are taken, the first ones.
        safety: a model with which each proxy, then the model of helpfulness, is combined (`rl.combine`).
        output: a folder, by default `overoptimization/` in the first proxy's run.
        overwrite: whether replies that were drawn otherwise may be replaced.

    Returns:
        the content of `overoptimization.json`.

    Raises:
        RecipeError: the arguments do not go together, or a model cannot be loaded.
        DataError: a file cannot be read, or no prompt with two replies is left.
        TrainingError: a model gives rewards that are not finite numbers; drawn replies are kept.
    """
    folder = check_models(proxies, gold, output)
    source = samples or folder / SAMPLES
    if samples:
        found, excluded = read_samples(samples, max_prompts)
    elif sampling and prompts:
        found, excluded = read_prompts(prompts, max_prompts)
        found, refused = sample(sampling, found, source, overwrite=overwrite)
        excluded += refused
    else:
        raise RecipeError("give --policy and --prompts, or --samples")
    scored = score_all([*proxies, *([safety] if safety else []), *gold], found, excluded)
    content = {
        "proxies": list(proxies),
        "gold": list(gold),
        "safety": safety,
        "sampling": asdict(sampling) if sampling and not samples else None,
        **measure(scored, proxies, gold, safety),
    }
    content["samples"] = {"file": str(source), **content["samples"], "excluded": dict(excluded)}
    write_scores(folder / SCORES, scored)
    write_json(folder / RESULT, content)
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


@dataclass
class Scored:
    """Replies and edited replies with the rewards that models give them.

    Attributes:
        samples: prompts with as many replies each, N.
        places: which replies were edited, as (prompt, reply).
        of: rewards by model, `(prompts * N + edits * places,)`: of all replies, then of the edited ones edit
            by edit; NaN for an edited reply that does not fit the model.
    """

    samples: list[Sample]
    places: list[tuple[int, int]]
    of: dict[str, Array]

    def replies(self, rewards: Array) -> Array:
        """The rewards of the replies, `(prompts, N)`."""
        n = len(self.samples[0].responses)
        return rewards[: len(self.samples) * n].reshape(-1, n)

    def changes(self, rewards: Array) -> Array:
        """By how many standard deviations within a prompt each edit changed the reward, `(edits, places)`."""
        replies = self.replies(rewards)
        before = np.array([replies[place] for place in self.places], float)
        return (rewards[replies.size :].reshape(len(EDITS), -1) - before) / (spread(replies) or np.inf)

    def owners(self) -> NDArray[np.int64]:
        """The number of the prompt that each reward belongs to."""
        of_replies = np.repeat(np.arange(len(self.samples)), len(self.samples[0].responses))
        return np.concatenate(
            [of_replies, np.tile([number for number, _ in self.places], len(EDITS))]
        ).astype(int)


def score_all(names: Sequence[str], found: Sequence[Sample], excluded: Counter[str]) -> Scored:
    """Score the same replies by each model; prompts that cannot be compared are counted in `excluded`.

    Raises:
        DataError: no prompt is left.
        TrainingError: some rewards are not finite.
    """
    samples = comparable(found)
    excluded += Counter({"fewer_replies": len(found) - len(samples)})
    scored = Scored(samples, to_edit(samples), {})
    items = [{"prompt": prompt.prompt, "response": reply} for prompt in samples for reply in prompt.responses]
    items += edited(samples, scored.places)
    for name in dict.fromkeys(names):
        scored.of[name] = score(name, items)
    fits = np.all([np.isfinite(scored.replies(own)).all(axis=1) for own in scored.of.values()], axis=0)
    if not fits.any():
        raise DataError("every prompt has a reply that does not fit one of the models: too long, or refused")
    excluded += Counter({"does_not_fit_a_model": int((~fits).sum())})
    kept, numbers = fits[scored.owners()], np.cumsum(fits) - 1
    return Scored(
        [prompt for prompt, fit in zip(samples, fits, strict=True) if fit],
        [(int(numbers[number]), reply) for number, reply in scored.places if fits[number]],
        {name: own[kept] for name, own in scored.of.items()},
    )


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
    same = []
    for prompt in samples:
        if len(prompt.responses) > n:
            chosen = np.sort(rng.choice(len(prompt.responses), n, replace=False)).tolist()
            same.append(replace(prompt, responses=[prompt.responses[k] for k in chosen], cut=None))
        elif len(prompt.responses) == n:
            same.append(prompt)
    return same


def score(name: str, items: Sequence[dict[str, Any]]) -> Array:
    """The rewards of a model, which is loaded for it and let go of: of two, one at a time is in memory."""
    model = RewardModel.from_pretrained(name)
    try:
        rewards = model.score(items, progress=True, unfit=np.nan).astype(float)
    except TrainingError as error:
        raise TrainingError(f"{name}: {error}; drawn replies are kept and need not be drawn again") from None
    del model
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return rewards


# --- several models as one ---------------------------------------------------------------------


def candidates(scored: Scored, proxies: Sequence[str], safety: str | None) -> dict[str, Array]:
    """What is optimised: each proxy by itself, and several as ensembles, by name.

    The ensembles are their mean and the worst of them (Coste et al., arXiv 2310.02743), each normalised.
    """
    found = {name: scored.of[name] for name in proxies}
    if safety:
        safe = scored.of[safety]
        found = {
            f"{name} with safety {safety}": with_safety(scored, safe, own) for name, own in found.items()
        }
    if len(found) > 1:
        rewards = list(found.values())
        found |= {MEAN: ensemble(scored, rewards), WORST: ensemble(scored, rewards, worst=True)}
    return found


def ensemble(scored: Scored, rewards: Sequence[Array], *, worst: bool = False) -> Array:
    """The mean or the minimum of several models; a single one as it is.

    Each is normalised to mean 0 and standard deviation 1 within a prompt. By that over all replies a model
    would have the less say the more its rewards differ between prompts, which means nothing.
    """
    if len(rewards) == 1:
        return rewards[0]
    replies = [scored.replies(own) for own in rewards]
    scaled = [(own - of.mean()) / (spread(of) or np.inf) for own, of in zip(rewards, replies, strict=True)]
    return np.asarray(np.min(scaled, axis=0) if worst else np.mean(scaled, axis=0))


def with_safety(scored: Scored, safe: Array, helpful: Array) -> Array:
    """Two models as one, as `rl.combine` has it."""
    reward = combine(lambda *_, **__: safe.tolist(), lambda *_, **__: helpful.tolist(), whiten=False)
    marked = np.array([prompt.is_safety for prompt in scored.samples])[scored.owners()]
    nothing = [""] * len(safe)
    return np.array(reward(nothing, nothing, is_safety=marked.tolist()))


# --- figures -----------------------------------------------------------------------------------


def measure(
    scored: Scored, proxies: Sequence[str], gold: Sequence[str], safety: str | None
) -> dict[str, Any]:
    """What follows from the rewards, as `overoptimization.json` has it."""
    samples = scored.samples
    of_gold = ensemble(scored, [scored.of[name] for name in gold])
    sizes = np.arange(1, len(samples[0].responses) + 1)
    cut = [prompt.cut for prompt in samples]
    return {
        "samples": {
            "n_prompts": len(samples),
            "n_replies": len(sizes),
            "empty_replies": sum(not reply.strip() for prompt in samples for reply in prompt.responses),
            "repeated_replies": sum(len(p.responses) - len(set(p.responses)) for p in samples),
            "cut_replies": None if None in cut else sum(n or 0 for n in cut),
        },
        "n": sizes.tolist(),
        "kl": kl(sizes).tolist(),
        "curves": {
            name: compare(scored, own, of_gold) for name, own in candidates(scored, proxies, safety).items()
        },
    }


def compare(scored: Scored, proxy: Array, gold: Array) -> dict[str, Any]:
    """What best-of-n by a proxy does, in standard deviations of the rewards of a prompt's replies."""
    proxy_replies, gold_replies = scored.replies(proxy), scored.replies(gold)
    by_proxy, by_gold = curve(proxy_replies, proxy_replies), curve(proxy_replies, gold_replies)
    own, theirs = standardised(proxy_replies), standardised(gold_replies)
    each = [rank_correlation(*pair) for pair in zip(own, theirs, strict=True)]
    kind, sentence = verdict(by_proxy, by_gold, len(scored.samples))
    return {
        "verdict": sentence,
        "kind": kind,
        "spread": {"proxy": spread(proxy_replies), "gold": spread(gold_replies)},
        "proxy": by_proxy,
        "gold": by_gold,
        "gap_at_n": by_proxy["gain"][-1] - by_gold["gain"][-1],
        "agreement": mean_interval([np.nan if value is None else value for value in each]),
        "excess": by_feature(scored.samples, own, theirs),
        "edits": by_edit(scored.changes(proxy), scored.changes(gold)),
        "examples": examples(scored.samples, own, theirs),
    }


def write_scores(target: Path, scored: Scored) -> None:
    """Write one line for each prompt: its replies and what each model gives them."""
    rewards = {redact(name): scored.replies(own).tolist() for name, own in scored.of.items()}
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(scored.samples):
            own = {name: values[number] for name, values in rewards.items()}
            line = {"prompt": prompt.prompt, "responses": prompt.responses, "rewards": own}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
