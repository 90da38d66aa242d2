"""`rm-recipe overoptimization PROXY --gold GOLD`: what optimising against a reward model will do.

Reward over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760), seen by best-of-n before a GPU is spent
on PPO: replies of a policy, or given ones, are scored by the model that a policy would be trained against,
the proxy, and by one that stands for people, gold: larger, trained on more or other comparisons, or the mean
of several. The best of n by the proxy gets better by the proxy for ever, and by gold for a while.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.biases import rank_correlation
from rm_recipe.files import whole_file, write_json
from rm_recipe.overoptimization.best_of_n import Array, curve, kl, mean_interval, spread, standardised
from rm_recipe.overoptimization.exploits import by_edit, by_feature, examples
from rm_recipe.overoptimization.judges import Judged, ensemble, ensembles, judge_all, with_safety
from rm_recipe.overoptimization.overoptimization_text import verdict
from rm_recipe.overoptimization.page import write_overoptimization
from rm_recipe.overoptimization.replies import Sample, read_prompts, read_samples
from rm_recipe.overoptimization.sampling import Sampling, sample
from rm_recipe.recipe.reader import is_run_folder
from rm_recipe.redaction import redact
from rm_recipe.scoring import find_model

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
            (`handoff.combine`).
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
