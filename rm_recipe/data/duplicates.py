"""Comparisons that a split holds more than once: exactly, nearly, or with the opposite verdict.

Near duplicates are found by MinHash (Broder 1997; the sketches are datasketch's): two texts whose
sets of three-word sequences overlap by `SIMILAR` or more (Jaccard). Sketches lie in a cached column
and are compared band by band, so memory stays flat where a hash table of a million would not.
"""

import re
import sys
from typing import Any
from zlib import crc32

import datasets as hf_datasets
import datasketch
import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from rm_recipe.data import loading
from rm_recipe.data.dataset import Split, arrow_column
from rm_recipe.data.loading import normalise, normalised_prompt, text_key
from rm_recipe.data.passes import run_pass

SIMILAR = 0.8
SKETCH = 64  # numbers a sketch: Jaccard to within 0.05 (one standard error) at 0.8
BAND = 4  # numbers that have to agree before two sketches are compared: misses 2 in 10,000 at 0.8
CHUNK = 100_000

# Copied for each text: making one draws its random numbers anew. CRC-32 takes a tenth of the time of
# datasketch's own SHA-1 and spreads short texts as well.
_EMPTY = MinHash(num_perm=SKETCH, scheme="affine32", hashfunc=crc32)

# Chinese, Japanese and Korean write no spaces: there each character counts as a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")


def count_duplicates(split: Split, num_proc: int | None = None) -> dict[str, int]:
    """How many comparisons repeat an earlier one of the split.

    Returns:
        `exact`: same prompt and same responses, case and white space apart; `near`: other than
        those, a text like an earlier one's; `contradictory`: exact ones that prefer another
        response; `repeated_prompts`: any that has an earlier one's prompt.
    """
    columns = split.comparisons.select_columns(["prompt", "responses", "ranks"])
    features = {
        "key": hf_datasets.Value("int64"),
        "verdict": hf_datasets.Value("int64"),
        "sketch": hf_datasets.List(hf_datasets.Value("uint32"), length=SKETCH),
    }
    depends_on = [sys.modules[__name__], loading, datasketch.__version__]
    marked = run_pass(
        columns,
        _mark,
        "Looking for duplicates",
        features,
        depends_on,
        num_proc,
        remove_columns=columns.column_names,
    )
    exact, same_verdict = (_repeats(arrow_column(marked, name).to_numpy()) for name in ("key", "verdict"))
    near = _near(marked) & ~exact
    return {
        "exact": int(exact.sum()),
        "near": int(near.sum()),
        "contradictory": int((exact & ~same_verdict).sum()),
        "repeated_prompts": int(_repeats(split.column("prompt_key")).sum()),
    }


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    prompt = normalised_prompt(row["prompt"])
    responses = [normalise(response) for response in row["responses"]]
    minhash = _EMPTY.copy()
    minhash.update_batch(list(shingles(" ".join([*prompt, *sorted(responses)]))))
    ranked = [f"{rank} {response}" for rank, response in zip(row["ranks"], responses, strict=True)]
    return {
        "key": text_key([*prompt, *sorted(responses)]),
        "verdict": text_key([*prompt, *sorted(ranked)]),
        "sketch": minhash.hashvalues,
    }


def shingles(text: str) -> set[bytes]:
    """The three-word sequences of a text; the whole of a shorter one."""
    words = _WORD.findall(text)
    if len(words) < 3:
        return {text.encode("utf-8", "surrogatepass")}
    threes = zip(words, words[1:], words[2:], strict=False)
    return {" ".join(three).encode("utf-8", "surrogatepass") for three in threes}


def _repeats(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Which keys have been there before."""
    repeats = np.ones(len(keys), bool)
    repeats[np.unique(keys, return_index=True)[1]] = False
    return repeats


def _near(sketches: hf_datasets.Dataset) -> NDArray[np.bool_]:
    """Which sketches are like an earlier one.

    Each is compared with the first and with the last before it of those that share a band with it.
    """
    n = len(sketches)
    near = np.zeros(n, bool)
    for start in range(0, SKETCH, BAND):
        parts = sketches.with_format("arrow").iter(CHUNK)
        keys = np.concatenate([_band_keys(_matrix(part)[:, start : start + BAND]) for part in parts])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        later = order[1:][same]  # has another of its band before it
        group_start = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(n), 0))
        for earlier in (order[:-1][same], order[group_start][1:][same]):
            for chunk in np.array_split(np.flatnonzero(~near[later]), 1 + len(later) // CHUNK):
                a, b = (sketches.with_format("arrow")[rows[chunk]] for rows in (later, earlier))
                near[later[chunk]] |= np.mean(_matrix(a) == _matrix(b), axis=1) >= SIMILAR
    return near


def _matrix(rows: Any) -> NDArray[np.uint32]:
    """The sketches of an arrow table; `(n, SKETCH)`."""
    return np.asarray(rows["sketch"].combine_chunks().flatten().to_numpy()).reshape(-1, SKETCH)


def _band_keys(bands: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A number for each row of a band; `(n, BAND)` to `(n,)`."""
    odd = np.random.default_rng(0).integers(1, 2**63, bands.shape[1], np.uint64) * 2 + 1
    return np.asarray((bands.astype(np.uint64) * odd).sum(axis=1), np.uint64)
