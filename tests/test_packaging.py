"""What is installed is the whole product, and asks for what it was tested with."""

import re
import subprocess
import sys
import tomllib
import zipfile

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


def test_what_is_installed_has_recipes_and_accelerate_configs_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for folder in ("recipes", "accelerate_configs"):
        held = {path.name for path in (tmp_path / "site" / "rm_recipe" / folder).glob("*.yaml")}
        assert held == {path.name for path in (REPOSITORY / folder).glob("*.yaml")}
    result = subprocess.run(
        [sys.executable, "-c", FROM_ELSEWHERE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == str(tmp_path / "site" / "rm_recipe"), result.stderr


def test_what_is_asked_for_is_no_wider_than_what_is_tested():
    ranges = {re.split(r"[^\w-]", line)[0].lower(): line for line in PROJECT["project"]["dependencies"]}
    for name in BY_PRIVATE_NAMES:
        low = ranges[name].partition("~=")[2]
        assert low.count(".") == 2, f"{name}: of one minor release"
        assert TESTED[name].rpartition(".")[0] == low.rpartition(".")[0]
    assert ranges["torch"] == "torch>=2.11"
    assert PROJECT["project"]["requires-python"] == ">=3.11"
