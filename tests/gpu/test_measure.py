"""What `make gpu` measures, tried with small shapes where there is no GPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, make_rows, write_splits


@pytest.mark.slow
def test_the_measurements_run_and_are_written(tmp_path, tiny_llama, tiny_distilbert):
    for name, model in (("smollm2-135m-instruct", tiny_llama), ("all-minilm-l6-v2", tiny_distilbert)):
        shutil.copytree(model, tmp_path / "models" / name)
    write_splits(tmp_path / "data", make_rows(700, seed=1), make_rows(40, seed=2))
    command = [sys.executable, "tests/gpu/measure.py", "--tiny", "--only", "distilbert_hh", "plan", "scoring"]
    folders = ["--data", tmp_path / "data", "--models", tmp_path / "models", "--output", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, *map(str, folders)], check=True, cwd=REPOSITORY, env=environment)
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    speeds = results["distilbert_hh"]
    assert speeds["ours, 16"]["comparisons_per_s"] > 0
    assert speeds["stock, 32"]["losses"][0] == pytest.approx(speeds["ours, 32"]["losses"][0], abs=1e-3)
    assert (len(results["plan"]), len(results["scoring"])) == (6, 3)
    assert not [found for found in results.values() if "failed" in str(found)]
