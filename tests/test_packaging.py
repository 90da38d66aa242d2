"""What is installed is the whole product, and asks for what it was tested with."""

import re
import subprocess
import sys
import tomllib
import zipfile

from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
TESTED = dict(line.split("==") for line in PINNED if "==" in line)
# Of these something is used that is not public, so another release may break it.
BY_PRIVATE_NAMES = ("trl", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "evaluate")

FROM_ELSEWHERE = """
from pathlib import Path
from rm_recipe.recipe.reader import find_recipe, shipped
print(find_recipe(Path("recipes/smollm2_offline.yaml")).parent, shipped("accelerate_configs"))
"""


def test_what_is_installed_has_recipes_and_accelerate_configs_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    folders = [tmp_path / "site" / "rm_recipe" / name for name in ("recipes", "accelerate_configs")]
    for folder in folders:
        held = {path.name for path in folder.glob("*.yaml")}
        assert held == {path.name for path in (REPOSITORY / folder.name).glob("*.yaml")} != set()
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    command = [sys.executable, "-c", FROM_ELSEWHERE]
    found = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).split()
    assert found == [str(folder) for folder in folders]


def test_what_is_asked_for_is_no_wider_than_what_is_tested():
    ranges = {re.split(r"[^\w-]", line)[0].lower(): line for line in PROJECT["project"]["dependencies"]}
    for name in BY_PRIVATE_NAMES:
        low = ranges[name].partition("~=")[2]
        assert low.count(".") == 2, f"{name}: of one minor release"
        assert TESTED[name].rpartition(".")[0] == low.rpartition(".")[0]
    assert ranges["torch"] == "torch>=2.11"
    assert PROJECT["project"]["requires-python"] == ">=3.11"
