"""A training that is killed again and again and resumed each time, for `test_checkpoints`.

`python killed.py FOLDER RECIPE SEED TIMES WRITES`: kills at TIMES random moments and before each of the
WRITES, numbers of changes to the run folder (`all`: before every one). It forks from a process that has
imported everything, so a start costs milliseconds. Prints one JSON object.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from rm_recipe.recipe.reader import is_run_folder, read_recipe
from rm_recipe.training.train import train

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def run_of(recipe: Path, run: Path) -> None:
    """Trains, or goes on where a run is there, as `rm-recipe run` does."""
    parsed = read_recipe(recipe, ["--output_dir", str(run)])
    train(parsed, resume=is_run_folder(run))


def before_change(run: Path, number: int, count_into: Path | None = None) -> None:
    """Kills this process before so many changes to a folder have been made; or counts them."""
    counted = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal counted
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in CHANGES) or not str(arguments[0]).startswith(str(run)):
            return
        counted += 1
        if count_into is not None:
            count_into.write_text(str(counted))
        elif counted == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_a_fork(action, kill_after: float | None = None) -> tuple[bool, float]:
    """Whether a function ended well in a process of its own, and after how many seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = None
    while status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = code
        elif kill_after is not None and time.monotonic() - began > kill_after:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        else:
            time.sleep(0.001)
    assert status in (0, signal.SIGKILL), f"status {status}"
    return status == 0, time.monotonic() - began


def main() -> None:
    folder, recipe, seed, times, writes = sys.argv[1:]
    whole, killed = Path(folder) / "whole", Path(folder) / "killed"
    counter = Path(folder) / "changes"
    in_a_fork(lambda: run_of(recipe, folder / Path("warm-up")))  # fills the cache of tokenised data

    def counting() -> None:
        before_change(whole, -1, counter)
        run_of(recipe, whole)

    done, seconds = in_a_fork(counting)
    assert done
    changes, kills, states = int(counter.read_text()), [], []

    def finish() -> None:
        if not (killed / "run.json").is_file():
            assert in_a_fork(lambda: run_of(recipe, killed))[0]
        states.append(sorted(path.name for path in killed.iterdir()))
        shutil.copytree(killed, Path(folder) / f"finished-{len(states)}")
        shutil.rmtree(killed)

    numbers = range(1, changes + 1) if writes == "all" else [int(n) for n in writes.split(",") if n]
    for number in numbers:

        def until_change(number=number) -> None:
            before_change(killed, number)
            run_of(recipe, killed)

        ended, _ = in_a_fork(until_change)
        kills += [f"change {number}"] * (not ended)
        finish()
    rng = random.Random(int(seed))
    for survived in range(int(times)):
        ended, _ = in_a_fork(lambda: run_of(recipe, killed), kill_after=rng.uniform(0.1, 0.7) * seconds)
        kills += ["moment"] * (not ended)
        if (killed / "run.json").is_file() or survived % 3 == 2:  # else the same run is killed again
            finish()
    if killed.is_dir():
        finish()
    json.dump({"changes": changes, "seconds": seconds, "kills": kills, "states": states}, sys.stdout)


if __name__ == "__main__":
    main()
