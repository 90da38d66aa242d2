"""What is installed is the whole product, and asks for what it was tested with."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
TESTED = dict(
    line.split("==")
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    if "==" in line
)
# Of these something is used that is not public, so another release may break it.
BY_PRIVATE_NAMES = ("trl", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "evaluate")

FROM_ELSEWHERE = """
from pathlib import Path
import rm_recipe
from rm_recipe.recipe.reader import find_recipe, shipped
package = Path(rm_recipe.__file__).parent
assert find_recipe(Path("recipes/smollm2_offline.yaml")) == package / "recipes" / "smollm2_offline.yaml"
assert (shipped("accelerate_configs") / "cpu.yaml").is_file()
print(package)
"""


def test_an_installed_package_finds_recipes_and_accelerate_configs_outside_the_checkout(tmp_path):
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in wheel["packages"]:
        shutil.copytree(REPOSITORY / name, tmp_path / "site" / name, ignore=lambda *_: ["__pycache__"])
    for source, target in wheel["force-include"].items():
        shutil.copytree(REPOSITORY / source, tmp_path / "site" / target)
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", FROM_ELSEWHERE],
        cwd=tmp_path / "elsewhere",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == str(tmp_path / "site" / "rm_recipe"), result.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_recipe_and_accelerate_config(tmp_path):
    source = shutil.copytree(REPOSITORY, tmp_path / "source", ignore=lambda *_: [".git", ".venv", "outputs"])
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "accelerate_configs"):
        assert {f"rm_recipe/{folder}/{path.name}" for path in (REPOSITORY / folder).glob("*.yaml")} <= held


def test_what_is_asked_for_is_no_wider_than_what_is_tested():
    ranges = {re.split(r"[^\w-]", line)[0].lower(): line for line in PROJECT["project"]["dependencies"]}
    for name in BY_PRIVATE_NAMES:
        low = ranges[name].partition("~=")[2]
        assert low.count(".") == 2, f"{name}: of one minor release"
        assert TESTED[name].rpartition(".")[0] == low.rpartition(".")[0]
    assert ranges["torch"] == "torch>=2.11"
    assert PROJECT["project"]["requires-python"] == ">=3.11"
