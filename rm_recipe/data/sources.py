"""Where rows come from: files, folders, the Hub and mixtures, all through the `datasets` library."""

import errno
import glob
import gzip
import shutil
from pathlib import Path

import datasets as hf_datasets
import pyarrow.parquet as pq
from trl.scripts.utils import DatasetConfig

from rm_recipe.data.formats import is_comparison_shape
from rm_recipe.data.json_files import (
    JSON,
    content_hash,
    decode,
    load_json_rows,
    numbered_rows,
    refuse_pointer,
)
from rm_recipe.errors import DataError
from rm_recipe.files import whole_file
from rm_recipe.recipe.schema import DATA_FORMATS, DataArguments, looks_local


class MissingSplitError(DataError):
    """A data set has no such split; `others` are the splits that it has."""

    def __init__(self, message: str, others: list[str]) -> None:
        super().__init__(message)
        self.others = others


def sources_of(data: DataArguments) -> list[DatasetConfig]:
    """What `dataset_name` and `dataset_subsets`, or TRL's `datasets`, name; `split` is the train split."""
    if data.datasets:
        return [DatasetConfig(**entry) for entry in data.datasets]
    assert data.dataset_name is not None
    subsets: list[str | None] = list(data.dataset_subsets or []) or [None]
    return [
        DatasetConfig(path=data.dataset_name, data_dir=subset, split=data.dataset_train_split)
        for subset in subsets
    ]


def label(source: DatasetConfig, of_mixture: bool) -> str:
    """The subset's name in reports: the folder or configuration, in a mixture also the set itself."""
    part = str(source.data_dir or source.name or "")
    if not of_mixture:
        return part
    path = Path(source.path)
    name = f"{path.parent.name}/{path.name}" if path.is_file() else path.name
    return "/".join(filter(None, [name, part]))


def load_rows(source: DatasetConfig, split: str, revision: str | None = None) -> hf_datasets.Dataset:
    """The rows of one split, memory-mapped: their own columns, or `json_files`' two.

    Raises:
        MissingSplitError: the set has others.
        DataError: it cannot be read; for a local file with the line.
    """
    file = find_file(source, split)
    try:
        if file is None:
            return hf_datasets.load_dataset(
                path=source.path,
                name=source.name,
                data_dir=source.data_dir,
                data_files=source.data_files,
                revision=revision,
                split=split,
            )
        return _load_parquet(file) if data_format(file) == ".parquet" else load_json_rows(file)
    except DataError:
        raise
    except Exception as error:
        raise _as_data_error(error, source, file, split) from None


def _load_parquet(file: Path) -> hf_datasets.Dataset:
    refuse_pointer(file)
    content = content_hash(file)
    unpacked = _unpacked(file, content)
    if not pq.read_metadata(unpacked).num_rows:
        raise DataError(f"'{file}' is empty: it holds no rows")
    # As the configuration's name, the content decides what the cache holds, not the time of change.
    name, files = f"content-{content[:32]}", {"train": glob.escape(str(unpacked))}
    return hf_datasets.load_dataset("parquet", name=name, data_files=files, split="train")


def has_split(source: DatasetConfig, split: str, revision: str | None = None) -> bool:
    """Whether the set has that split; False where it has one split only, another one.

    Raises:
        DataError: it has several, and not this one, or it cannot be read.
    """
    path = Path(source.path)
    if path.is_file() or (path.is_dir() and source.data_files is not None):
        return False  # a file is one split, whatever it is called
    try:
        if find_file(source, split) is None:  # on the Hub, which says so only when it is asked for it
            load_rows(source, split, revision)
    except MissingSplitError as missing:
        if len(missing.others) > 1:
            raise
        return False
    return True


def find_file(source: DatasetConfig, split: str) -> Path | None:
    """The local file that holds a split; None for a set on the Hub.

    Raises:
        DataError: the path was meant to be local and holds no such file.
    """
    path = Path(source.path)
    if path.is_dir():
        path = path / (source.data_dir or "")
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise DataError(f"'{path}' {what}; check 'dataset_subsets'")
        if source.data_files is None:
            return _split_file(path, split)
        if not isinstance(source.data_files, str):
            raise DataError(f"'{path}': 'data_files' of a local folder is one file's name")
        path = path / source.data_files
        if path.is_dir():
            raise DataError(f"'{path}' is a folder; 'data_files' of a local folder is one file's name")
    elif path.is_file() and (source.data_dir or source.data_files):
        raise DataError(f"'{path}' is a file and has no subsets or files; name the folder that has them")
    if not path.is_file():
        if looks_local(source.path) or Path(source.path).exists():
            raise DataError(f"'{path}' does not exist")
        return None
    if data_format(path) not in DATA_FORMATS:
        raise DataError(f"'{path}' is no data file; expected .jsonl, .json or .parquet (.gz too)")
    return path


def data_format(file: Path) -> str:
    """`.jsonl`, `.json`, `.parquet` or another ending, `.gz` apart."""
    return Path(file.name.removesuffix(".gz")).suffix


def _split_file(folder: Path, split: str) -> Path:
    """The one file of a local folder that holds the split, named as on the Hub: train.jsonl.gz."""
    endings = [f"{suffix}{gz}" for suffix in DATA_FORMATS for gz in ("", ".gz")]
    found = [folder / f"{split}{ending}" for ending in endings if (folder / f"{split}{ending}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"'{folder}' has {len(found)} files for the split '{split}'")
    there = sorted(folder.iterdir())
    others = [
        path.name.removesuffix(end)
        for path in there
        for end in endings
        if path.name.endswith(end) and path.is_file() and _may_be_split(path)
    ]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in there]
    raise MissingSplitError(
        f"'{folder}' has no file for the split '{split}' "
        f"({', '.join(split + ending for ending in endings)}); it has {', '.join(names) or 'no files'}",
        others,
    )


def _may_be_split(file: Path) -> bool:
    """Whether a data file holds rows: a .json beside them may say something about the data set instead."""
    if data_format(file) != ".json":
        return True
    try:
        row = next(numbered_rows(file))[JSON]
    except DataError:  # damaged, but meant to hold some
        return True
    try:
        return is_comparison_shape(decode(row))
    except ValueError:  # one object over several lines
        return False


def _unpacked(file: Path, content: str) -> Path:
    """The file, or of a .parquet.gz a copy without gzip."""
    if file.suffix != ".gz":
        return file
    copy = Path(hf_datasets.config.EXTRACTED_DATASETS_PATH) / f"{content}.parquet"
    if not copy.is_file():
        with whole_file(copy) as partial, gzip.open(file) as packed, partial.open("wb") as target:
            shutil.copyfileobj(packed, target)
    return copy


def _as_data_error(error: Exception, source: DatasetConfig, file: Path | None, split: str) -> Exception:
    cause = error.__cause__ or error
    # The machine's faults, not the data's; that the file itself may not be read is a fault of input.
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if full or isinstance(cause, MemoryError):
        return cause if isinstance(cause, Exception) else error
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if file is not None:
        return DataError(f"'{file}' cannot be read: {reason}")
    if isinstance(error, ValueError) and str(error).startswith("Unknown split"):
        others = str(error).partition("[")[2].rpartition("]")[0]
        message = f"data set '{source.path}' has no split '{split}'; it has {others}"
        return MissingSplitError(message, [name.strip(" '\"") for name in others.split(",")])
    return DataError(f"data set '{source.path}' cannot be loaded from the Hub: {reason}")
