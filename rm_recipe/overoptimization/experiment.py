"""`rm-recipe overoptimization PROXY --gold GOLD`: what optimising against a reward model will do.

Reward over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760), seen by best-of-n before a GPU is spent
on PPO: replies of a policy, or given ones, are scored by the model that a policy would be trained against,
the proxy, and by one that stands for people, gold: larger, trained on more or other comparisons, or the mean
of several. The best of n by the proxy gets better by the proxy for ever, and by gold for a while.
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

# --- what reward models say of the same replies ------------------------------------------------

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
    """Two models as one, as `rl.combine` has it."""

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


# --- the verb ----------------------------------------------------------------------------------

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
    """Scores replies by proxies and gold, and writes what best-of-n by each proxy does to gold.

    Several proxies are looked at each by itself, and as ensembles: their mean, and the worst of them (Coste
    et al., arXiv 2310.02743), each of them normalised.

    Args:
        proxies, gold: run folders, exports or one-label models; of several gold models the mean counts, each
            normalised.
        sampling, prompts: how replies are drawn, and a file of prompts; or
        samples: a file of replies.
        max_prompts: as many are taken, the first ones.
        safety: a model with which each proxy, then the model of helpfulness, is combined as in Llama 2
            (`rl.combine`).
        output: a folder, by default `overoptimization/` in the first proxy's run.
        overwrite: whether replies that were drawn otherwise may be replaced.

    Returns:
        the content of `overoptimization.json`.

    Raises:
        RecipeError: the arguments do not go together, or a model cannot be loaded.
        DataError: a file cannot be read, or no prompt with two replies is left.
        TrainingError: a model gives rewards that are not finite numbers; drawn replies are kept.
    """
    check_different(proxies, gold)
    folder = output or default_output(proxies[0])
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; --output names a folder")
    if samples is not None:
        found, excluded = read_samples(samples, max_prompts)
    elif sampling is not None and prompts is not None:
        sampling.check()
        found, excluded = read_prompts(prompts, max_prompts)
        found, refused = sample(sampling, found, folder / SAMPLES, overwrite=overwrite)
        excluded += refused
    else:
        raise RecipeError("give --policy and --prompts, or --samples")
    kept, places, judged, left_out = judge_all([*proxies, *filter(None, [safety]), *gold], found)
    of_proxies = [judged[name] for name in proxies]
    if safety:
        of_proxies = [with_safety(judged[safety], own, kept, places) for own in of_proxies]
    of_gold = ensemble("gold", [judged[name] for name in gold])
    sizes = np.arange(1, len(kept[0].responses) + 1)
    content = {
        "proxies": list(proxies),
        "gold": list(gold),
        "safety": safety,
        "sampling": asdict(sampling) if samples is None and sampling else None,
        "samples": {
            "file": str(samples or folder / SAMPLES),
            "n_prompts": len(kept),
            "n_replies": len(sizes),
            "excluded": dict(excluded + left_out),
            **counts(kept),
        },
        "n": sizes.tolist(),
        "kl": kl(sizes).tolist(),
        "curves": {
            own.name: compare(kept, own, of_gold, places) for own in [*of_proxies, *ensembles(of_proxies)]
        },
    }
    write_scores(folder / SCORES, kept, judged)
    write_json(folder / RESULT, content)
    write_overoptimization(folder, content)
    return content


# --- arguments -------------------------------------------------------------------------------


def check_different(proxies: Sequence[str], gold: Sequence[str]) -> None:
    """Refuses a model that is both, or is named twice.

    Raises:
        RecipeError: naming it.
    """
    seen: dict[str, str] = {}
    for kind, names in (("proxy", proxies), ("--gold", gold)):
        for name in names:
            place = str(Path(find_model(name)).resolve())
            if place in seen:
                both = "is named twice" if seen[place] == kind else "is the proxy and --gold"
                raise RecipeError(f"{name} {both}: what one model does to itself says nothing")
            seen[place] = kind


def default_output(proxy: str) -> Path:
    """`overoptimization/` in the run of a proxy, which may be named by its export."""
    for place in (Path(proxy), Path(proxy).parent):
        if is_run_folder(place):
            return place / FOLDER
    raise RecipeError(f"{proxy} is no run folder; say with --output where the result goes")


# --- replies ---------------------------------------------------------------------------------


def counts(samples: Sequence[Sample]) -> dict[str, int | None]:
    """Empty replies, which count like any other; those that were said before; and those that were cut."""
    cut = [prompt.cut for prompt in samples]
    return {
        "empty_replies": sum(not reply.strip() for prompt in samples for reply in prompt.responses),
        "repeated_replies": sum(len(p.responses) - len(set(p.responses)) for p in samples),
        "cut_replies": None if None in cut else sum(n or 0 for n in cut),
    }


# --- figures ---------------------------------------------------------------------------------


def compare(
    samples: Sequence[Sample], proxy: Judged, gold: Judged, places: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What best-of-n by a proxy does, in standard deviations of the rewards of a prompt's replies."""
    by_proxy, by_gold = curve(proxy.rewards, proxy.rewards), curve(proxy.rewards, gold.rewards)
    own, theirs = standardised(proxy.rewards), standardised(gold.rewards)
    each = [rank_correlation(*pair) for pair in zip(own, theirs, strict=True)]
    kind, sentence = verdict(by_proxy, by_gold)
    return {
        "verdict": sentence,
        "kind": kind,
        "spread": {"proxy": spread(proxy.rewards), "gold": spread(gold.rewards)},
        "proxy": by_proxy.as_dict(),
        "gold": by_gold.as_dict(),
        "gap_at_n": float(by_proxy.gain[-1] - by_gold.gain[-1]),
        "agreement": mean_interval([np.nan if value is None else value for value in each]),
        "excess": by_feature(samples, own, theirs),
        "edits": by_edit(changes(proxy, places), changes(gold, places)),
        "examples": examples(samples, own, theirs),
    }


def changes(judged: Judged, places: Sequence[tuple[int, int]]) -> Array:
    """By how many standard deviations within a prompt each edit changed the reward, `(edits, replies)`."""
    before = np.array([judged.rewards[place] for place in places], float)
    return np.asarray((judged.of_edited - before) / (spread(judged.rewards) or np.inf))


def write_scores(target: Path, samples: Sequence[Sample], judged: dict[str, Judged]) -> None:
    """One line for each prompt: its replies and what each model gives them."""
    with whole_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(samples):
            rewards = {redact(name): own.rewards[number].tolist() for name, own in judged.items()}
            line = {"prompt": prompt.prompt, "responses": prompt.responses, "rewards": rewards}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
