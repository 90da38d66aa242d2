"""A training that is killed again and again and resumed each time, for `test_checkpoints`.

`python killed.py FOLDER RECIPE TIMES CHANGE`: kills at TIMES random moments, and before a CHANGE to the run
folder, by its number (`all`: before each). It forks from a process that has imported everything, so a start
costs milliseconds. In FOLDER it leaves `whole`, a run that was not killed, and `finished-N`, those that were;
the last line that it prints is a JSON object.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rm_recipe.recipe.reader import is_run_folder, read_recipe
from rm_recipe.training.train import train

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def run_of(recipe: Path, run: Path, at_change: Callable[[int], None] = lambda _: None) -> None:
    """Trains, or goes on where a run is there, as `rm-recipe run` does; names each change before it."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(run)):
            at_change(next(numbers))

    sys.addaudithook(hook)
    train(read_recipe(recipe, ["--output_dir", str(run)]), resume=is_run_folder(run))


def in_a_fork(*arguments, seconds: float | None = None) -> bool:
    """Whether `run_of` ended well in a process of its own, which is killed after so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=run_of, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"status {process.exitcode}"
    return process.exitcode == 0


def main() -> None:
    folder, recipe, times, change = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    whole, killed, counted = folder / "whole", folder / "killed", folder / "changes"
    in_a_fork(recipe, folder / "warm-up")  # fills the cache of tokenised data
    began = time.monotonic()
    assert in_a_fork(recipe, whole, lambda number: counted.write_text(str(number)))
    seconds, changes = time.monotonic() - began, int(counted.read_text())
    kills, names = [], itertools.count(1)

    def finish() -> None:
        if not (killed / "run.json").is_file():
            assert in_a_fork(recipe, killed)
        killed.rename(folder / f"finished-{next(names)}")

    def kill_at(wanted: int) -> Callable[[int], None]:
        return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == wanted else None

    for number in range(1, changes + 1) if change == "all" else [int(change)]:
        if not in_a_fork(recipe, killed, kill_at(number)):
            kills.append(f"change {number}")
        finish()
    rng = random.Random(0)
    for number in range(times):
        if not in_a_fork(recipe, killed, seconds=rng.uniform(0.1, 0.7) * seconds):
            kills.append("moment")
        if (killed / "run.json").is_file() or number % 3 == 2:  # else the same run is killed again
            finish()
    if killed.is_dir():
        finish()
    print(json.dumps({"changes": changes, "kills": kills}))


if __name__ == "__main__":
    main()
