"""The notebook of the course runs from top to bottom; its committed outputs are whole and fit to show."""

import json
import re

import pytest
from conftest import REPOSITORY, make_recipe
from test_docs import LINKS

from rm_recipe.data.augmentation import EDITS, UNSEEN
from rm_recipe.recipe.reader import read_recipe

NOTEBOOK = REPOSITORY / "notebooks" / "week2.ipynb"
FIGURE = r"accuracy ([01]\.\d+), 95 % interval ([01]\.\d+) to ([01]\.\d+), n = (\d+)"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook, cell_says):
    """What the code cell with these words printed."""
    [cell] = [cell for cell in code_cells(notebook) if cell_says in "".join(cell["source"])]
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.fixture(scope="module")
def committed():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


# --- as it is run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_llama, tiny_data):
    """The folder that it was run in, with other settings in its settings cell, and what became of it."""
    for module in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(module, reason="`make setup` installs what runs notebooks")
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("student")
    recipe = make_recipe(folder, tiny_llama, tiny_data, num_train_epochs=1)
    settings = {"RECIPE": str(recipe), "POLICY": str(tiny_llama)}
    settings |= {"COMPARISONS": 64, "HELD_OUT": 30, "RUN": "run"}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = code_cells(notebook)[0]
    assert re.findall(r"^(\w+) = ", "".join(first["source"]), re.MULTILINE) == [*settings]
    first["source"] = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return folder, notebook


def test_it_ends_in_an_export_that_was_proven_and_two_steps_of_a_policy(ran):
    folder, notebook = ran
    assert json.loads((folder / "run" / "export" / "proof.json").read_text())["passed"]
    rewards = re.findall(r"step \d: mean reward (-?\d+\.\d+)", printed(notebook, "trainer.state.log_history"))
    assert len(rewards) == 2


def test_the_accuracy_that_it_prints_is_the_evaluations(ran):
    folder, notebook = ran
    held_out = json.loads((folder / "run" / "evaluation.json").read_text())["datasets"]["held_out"]
    [(accuracy, low, high, n)] = re.findall(FIGURE, printed(notebook, "accuracy_ci95"))
    shown = [f"{value:.3f}" for value in (held_out["accuracy"], *held_out["accuracy_ci95"])]
    assert ([accuracy, low, high], int(n)) == (shown, 30)
    assert float(low) > 0.5  # the tiny data can be learnt


def test_its_tables_have_a_row_for_every_edit_and_every_reply_kept(ran):
    _, notebook = ran
    for cell in ("judge.score([", '["consistency"]'):
        assert all(f"{name} " in printed(notebook, cell) for name in EDITS | UNSEEN), cell
    kept = re.findall(r"\n *(\d+) +(-?\d+\.\d+) +(\d+\.\d)%", printed(notebook, "best_of_n(proxy"))
    rewards = [float(reward) for _, reward, _ in kept]
    assert [int(n) for n, _, _ in kept] == [1, 2, 4, 8, 16, 32]
    assert rewards == sorted(rewards)
    assert rewards[0] < rewards[-1]
    assert kept[0][2] == "50.0"  # before anything is chosen


# --- as it is committed --------------------------------------------------------------------------


def test_the_committed_outputs_are_of_one_run_from_top_to_bottom_that_worked(committed):
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # no error
    [(accuracy, low, high, n)] = re.findall(FIGURE, printed(committed, "accuracy_ci95"))
    assert 0.5 < float(low) < float(accuracy) < float(high) < 1
    assert f"HELD_OUT = {n} " in "".join(cells[0]["source"])


def test_what_it_names_is_there(committed):
    """Recipes, which take the keys that it gives them, and pages."""
    text = "\n".join("".join(cell["source"]) for cell in committed["cells"])
    given = [word for key in re.findall(r"--max_\w+_samples", text) for word in (key, "8")]
    found = {*re.findall(r"recipes/\w+\.yaml", text)}
    assert len(found) == 2  # offline, and for a T4
    for name in found:
        read_recipe(REPOSITORY / name, given, check_inputs=False)
    for target in LINKS.findall(text):
        assert "://" in target or (NOTEBOOK.parent / target).is_file(), target


def test_the_committed_outputs_are_small_and_name_neither_machine_nor_time(committed):
    for cell in code_cells(committed):
        text = json.dumps(cell["outputs"])
        assert len(text) < 100_000
        assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|opt|work|content)/|\\u001b|\\r", text)
        assert cell["metadata"] == {}
