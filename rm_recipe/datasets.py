"""Where comparisons come from: files, folders and the Hub, through the `datasets` library.

A split is loaded memory-mapped, every row parsed into a comparison or counted under the reason
why it is none, sampled by the seed, and tokenised. Parsed and tokenised sets are cached by
content: the data, the settings and the source of the code that made them.
"""

import inspect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets as hf_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rm_recipe import batching, preferences, tokenization
from rm_recipe.batching import Encoded
from rm_recipe.errors import DataError
from rm_recipe.preferences import Comparison, Excluded, parse_row
from rm_recipe.recipe import Recipe
from rm_recipe.recipe_keys import DataArguments, looks_local

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class Split:
    """Comparisons of one split, and what became of the rows that are not among them.

    Attributes:
        comparisons: columns `prompt`, `responses`, `subset`, and after tokenising `prefix`, `rests`.
        rows: rows of the source; `rows == len(comparisons) + sum(excluded.values())`.
        excluded: number of rows by reason.
    """

    comparisons: hf_datasets.Dataset
    rows: int
    excluded: Counter[str]

    def __getitem__(self, index: int) -> Comparison:
        row = self.comparisons[index]
        return Comparison(row["prompt"], row["responses"], row["subset"])

    def encoded(self) -> list[Encoded]:
        """The tokenised comparisons, in order."""
        columns = (self.comparisons["prefix"][:], self.comparisons["rests"][:])
        return [Encoded(prefix, rests) for prefix, rests in zip(*columns, strict=True)]


def load_splits(recipe: Recipe) -> tuple[Split, Split]:
    """The recipe's train and held-out comparisons, sampled, leaked prompts dealt with.

    Raises:
        DataError: a source cannot be read, a split is missing or holds no comparison, or prompts
            are shared between the two and `leakage` is `error`.
    """
    data, seed = recipe.data, recipe.training.seed
    train = load_split(data, data.dataset_train_split)
    test = load_split(data, data.dataset_test_split)
    # Against all that is held out, so that no other sample of it meets what was trained on.
    train = _without_leakage(data, train, test)
    return sample(train, data.max_train_samples, seed), sample(test, data.max_eval_samples, seed)


def load_held_out_split(recipe: Recipe) -> Split:
    """The recipe's held-out comparisons."""
    data = recipe.data
    split = load_split(data, data.dataset_test_split)
    return sample(split, data.max_eval_samples, recipe.training.seed)


def load_split(data: DataArguments, split: str) -> Split:
    """One split, parsed: every row a comparison or counted.

    Raises:
        DataError: see `load_splits`.
    """
    assert data.dataset_name is not None
    subsets: list[str | None] = list(data.dataset_subsets or []) or [None]
    parts = [
        _parse(_load(data.dataset_name, split, subset, data.dataset_revision), subset) for subset in subsets
    ]
    parsed = hf_datasets.concatenate_datasets(parts)
    result = _keep(Split(parsed, len(parsed), Counter()))
    if not len(result.comparisons):
        counts = _counts(result.excluded)
        raise DataError(f"{data.dataset_name}, split '{split}': no comparison in it ({counts})")
    return result


def sample(split: Split, size: int | None, seed: int) -> Split:
    """The first `size` comparisons of a shuffle seeded with `seed`; the rest count as `not_sampled`."""
    if size is None or size >= len(split.comparisons):
        return split
    chosen = split.comparisons.shuffle(seed=seed).select(range(size))
    left_out = Counter(not_sampled=len(split.comparisons) - size)
    return Split(chosen, split.rows, split.excluded + left_out)


def tokenize(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    num_proc: int | None = None,
) -> Split:
    """Adds the columns `prefix` (token ids) and `rests` (a list of token ids for each response).

    What does not fit `max_length` is truncated or counted as `tokenization.encode` says.

    Raises:
        DataError: nothing is left.
    """
    fingerprint = Hasher.hash(
        [
            split.comparisons._fingerprint,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            (max_length, truncation),
            [inspect.getsource(module) for module in (tokenization, batching, preferences)],
        ]
    )

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        comparison = Comparison(row["prompt"], row["responses"])
        try:
            encoded = tokenization.encode(tokenizer, comparison, max_length, truncation)
        except Excluded as excluded:
            return {"prefix": [], "rests": [], "excluded": excluded.reason}
        return {"prefix": encoded.prefix, "rests": encoded.rests, "excluded": ""}

    encoded = split.comparisons.map(
        encode,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        desc="Tokenising",
        features=hf_datasets.Features(
            {
                **split.comparisons.features,
                "prefix": hf_datasets.List(hf_datasets.Value("int32")),
                "rests": hf_datasets.List(hf_datasets.List(hf_datasets.Value("int32"))),
                "excluded": hf_datasets.Value("string"),
            }
        ),
    )
    result = _keep(Split(encoded, split.rows, split.excluded))
    if not len(result.comparisons):
        raise DataError(f"no comparison is left after tokenising: {_counts(result.excluded)}")
    return result


# --- loading ---------------------------------------------------------------------------------


def _load(name: str, split: str, subset: str | None, revision: str | None) -> hf_datasets.Dataset:
    path = Path(name)
    if path.is_file():
        return _load_files(path, {split: str(path)}, split)
    if path.is_dir():
        return _load_files(path, {split: str(_split_file(path / (subset or ""), split))}, split)
    if looks_local(name):
        raise DataError(f"'{name}' does not exist")
    try:
        return hf_datasets.load_dataset(name, data_dir=subset, revision=revision, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"data set '{name}' cannot be loaded from the Hub: {reason}") from None


def _split_file(folder: Path, split: str) -> Path:
    """The one file of a local folder that holds the split, named as on the Hub: train.jsonl.gz."""
    if not folder.is_dir():
        raise DataError(f"'{folder}' does not exist; check 'dataset_subsets'")
    names = [f"{split}{suffix}{gz}" for suffix in FORMATS for gz in ("", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise DataError(f"'{folder}' has {what} for the split '{split}': one of {', '.join(names)}")
    return found[0]


def _load_files(path: Path, files: dict[str, str], split: str) -> hf_datasets.Dataset:
    suffix = Path(files[split].removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise DataError(f"'{path}' is no data file; expected .jsonl, .json or .parquet (.gz too)")
    try:
        return hf_datasets.load_dataset(FORMATS[suffix], data_files=files, split=split)
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise DataError(f"'{files[split]}' cannot be read as {suffix}: {reason}") from None


# --- parsing ---------------------------------------------------------------------------------


def _parse(rows: hf_datasets.Dataset, subset: str | None) -> hf_datasets.Dataset:
    """Columns `prompt`, `responses`, `subset`, `excluded` in place of the source's own."""
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"the data set has no column {' or '.join(sorted(missing))}; it has "
            f"{', '.join(rows.column_names) or 'none'}"
        )
    fingerprint = Hasher.hash([rows._fingerprint, subset, inspect.getsource(preferences)])

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        """The comparison's columns, or empty ones and the reason."""
        try:
            comparison = parse_row({**row, "subset": row.get("subset") or subset})
        except Excluded as excluded:
            return {"prompt": [], "responses": [], "subset": "", "excluded": excluded.reason}
        return {
            "prompt": comparison.prompt,
            "responses": comparison.responses,
            "subset": comparison.subset,
            "excluded": "",
        }

    text = hf_datasets.Value("string")
    return rows.map(
        parse,
        remove_columns=rows.column_names,
        new_fingerprint=fingerprint,
        desc="Parsing",
        features=hf_datasets.Features(
            {
                "prompt": hf_datasets.List({"role": text, "content": text}),
                "responses": hf_datasets.List(text),
                "subset": text,
                "excluded": text,
            }
        ),
    )


def _counts(excluded: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in excluded.items()) or "no rows"


def _keep(split: Split) -> Split:
    """Moves the rows that carry a reason out of the comparisons and into the counts."""
    reasons = split.comparisons["excluded"][:]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    comparisons = split.comparisons.select(kept).remove_columns("excluded")
    return Split(comparisons, split.rows, split.excluded + Counter(filter(None, reasons)))


def _without_leakage(data: DataArguments, train: Split, test: Split) -> Split:
    if data.leakage == "allow":
        return train
    held_out = {_prompt_key(prompt) for prompt in test.comparisons["prompt"]}
    clean = [
        index
        for index, prompt in enumerate(train.comparisons["prompt"])
        if _prompt_key(prompt) not in held_out
    ]
    leaked = len(train.comparisons) - len(clean)
    if leaked and data.leakage == "error":
        raise DataError(
            f"{leaked} of {len(train.comparisons)} train comparisons have a prompt that is also "
            "held out, so held-out accuracy would be too high; set 'leakage: drop' to leave them "
            "out of training, or 'leakage: allow'"
        )
    if not leaked:
        return train
    left_out = Counter(leaked_prompt=leaked)
    return Split(train.comparisons.select(clean), train.rows, train.excluded + left_out)


def _prompt_key(prompt: list[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], " ".join(m["content"].split()).casefold()) for m in prompt)
