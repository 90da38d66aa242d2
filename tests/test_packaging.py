"""What is installed is the whole product, and asks for what it was tested with."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, run_cli

from rm_recipe.model import memory
from rm_recipe.recipe.reader import SHIPPED

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
TESTED = dict(line.split("==") for line in PINNED if "==" in line)
# Of these something is used that is not public, so another release may break it.
BY_PRIVATE_NAMES = ("trl", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "evaluate")
POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"}
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
COPIED = " ".join(re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)).split()

FROM_ELSEWHERE = """
from pathlib import Path
from rm_recipe.recipe.reader import find_recipe, shipped
print(*map(find_recipe, map(Path, ("recipes/smollm2_offline.yaml", "smollm2_offline"))))
print(shipped("accelerate_configs"))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that has what the wheel holds, as pip puts it into `site-packages`.

    It is made of the files that the Dockerfile copies, so those are enough.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_installed(installed, folder, *arguments):
    """What Python prints that is started in a folder and knows the wheel's content alone."""
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    return subprocess.check_output([sys.executable, *arguments], cwd=folder, env=environment, text=True)


def test_what_is_installed_has_recipes_and_accelerate_configs_outside_the_checkout(installed, tmp_path):
    folders = [installed / "rm_recipe" / name for name in SHIPPED]
    for folder in folders:
        held = {path.name for path in folder.glob("*.yaml")}
        assert held == {path.name for path in (REPOSITORY / folder.name).glob("*.yaml")} != set()
    found = run_installed(installed, tmp_path, "-c", FROM_ELSEWHERE).split()
    assert found == [str(folders[0] / "smollm2_offline.yaml")] * 2 + [str(folders[1])]


def test_init_writes_what_is_shipped_and_leaves_what_a_user_has_changed(installed, tmp_path):
    init = ("-m", "rm_recipe", "init")
    *said, last = run_installed(installed, tmp_path, *init).splitlines()
    assert last == "next: rm-recipe run smollm2_offline"
    there = {f"{name}/{path.name}" for name in SHIPPED for path in (REPOSITORY / name).glob("*.yaml")}
    assert {*said} == {f"{path}: written" for path in there}
    for path in there:
        assert (tmp_path / path).read_bytes() == (REPOSITORY / path).read_bytes()
    mine, gone = tmp_path / "recipes" / "smollm2_offline.yaml", tmp_path / "accelerate_configs" / "cpu.yaml"
    mine.write_text("seed: 1\n")
    gone.unlink()
    *said, _ = run_installed(installed, tmp_path, *init).splitlines()
    changes = [line for line in said if not line.endswith("there already")]
    kept = "recipes/smollm2_offline.yaml: kept, as it differs from what is shipped"
    assert changes == [kept, "accelerate_configs/cpu.yaml: written"]
    assert mine.read_text() == "seed: 1\n"
    own = run_installed(installed, tmp_path, "-c", FROM_ELSEWHERE).split()
    assert own[:2] == ["recipes/smollm2_offline.yaml"] * 2  # which a name means from now on


def test_init_names_a_file_that_is_in_the_way(tmp_path):
    (tmp_path / "recipes").write_text("dinner\n")
    result = run_cli("init", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "rm-recipe: recipes cannot be made: File exists; run this in another folder\n"
    assert (tmp_path / "recipes").read_text() == "dinner\n"


def test_the_container_has_a_pinned_base_no_root_and_of_the_folder_only_what_it_copies():
    assert re.search(r"^FROM python:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[-1]) > 0
    seen = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in seen
    assert {line[1:] for line in seen if line.startswith("!")} == {*COPIED}


def test_every_module_can_be_imported_where_there_is_no_posix():
    """What Windows lacks is imported inside functions alone, where its absence is seen to."""
    for path in (REPOSITORY / "rm_recipe").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX & {*names}, path


def test_where_there_is_no_resource_module_peak_memory_is_what_psutil_says(monkeypatch):
    """As on Windows, which has neither that nor /proc."""
    taken = SimpleNamespace(rss=10, peak_wset=20)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: taken))
    monkeypatch.setattr(memory, "Path", lambda _: REPOSITORY / "nothing")
    monkeypatch.setattr(memory, "_counts_memory", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_memory() == 20


def test_what_is_asked_for_is_no_wider_than_what_is_tested():
    ranges = {re.split(r"[^\w-]", line)[0].lower(): line for line in PROJECT["project"]["dependencies"]}
    for name in BY_PRIVATE_NAMES:
        low = ranges[name].partition("~=")[2]
        assert low.count(".") == 2, f"{name}: of one minor release"
        assert TESTED[name].rpartition(".")[0] == low.rpartition(".")[0]
    assert ranges["torch"] == "torch>=2.11"
    assert PROJECT["project"]["requires-python"] == ">=3.11"
