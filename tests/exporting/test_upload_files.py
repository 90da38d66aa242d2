"""Only what a proof vouches for is uploaded, and only after an evaluation that passed."""

import pytest
from made_up_export import MODEL_FILES, REFUSED, failed_gate, make_export, no_card, no_gate, write

from rm_recipe.errors import RecipeError
from rm_recipe.exporting.push import File, adapter_files, export_files, is_repo_id

EXTRAS = {"README.md", "proof.json", "evaluation.json", "reliability.png"}


@pytest.fixture
def export(tmp_path):
    return make_export(tmp_path)


def test_an_exports_files_are_those_of_its_proof_and_four_more(export):
    files = export_files(export, "ann/judge", allow_failed_gate=False)
    assert files.keys() == MODEL_FILES | EXTRAS
    assert 'model = "ann/judge"' in files["README.md"].content.decode()
    (export / "reliability.png").unlink()
    (export / "model-00009-of-00009.safetensors").write_bytes(b"not proven")
    files = export_files(export, "ann/judge", allow_failed_gate=False)
    assert files.keys() == MODEL_FILES | EXTRAS - {"reliability.png"}


def test_weights_stay_on_the_disk_and_the_rest_is_sent_as_it_was_checked(export):
    files = export_files(export, "ann/judge", allow_failed_gate=False)
    assert files["model.safetensors"].content == export / "model.safetensors"
    before = (export / "config.json").read_bytes()
    write(export / "config.json", "changed meanwhile")
    assert files["config.json"] == File(before, files["config.json"].sha256)


def test_an_adapters_files_are_the_runs(export):
    files = adapter_files(export, "ann/judge", allow_failed_gate=False)
    weights = export.parent / "model" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"].content == weights
    assert not {"proof.json", "model.safetensors", "training_args.bin"} & files.keys()
    assert "reliability.png" in files  # which its card shows
    (export / "reliability.png").unlink()
    assert "reliability.png" not in adapter_files(export, "ann/judge", allow_failed_gate=False)


def test_an_adapter_that_was_trained_on_since_is_refused(export):
    weights = export.parent / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RecipeError, match="is not the adapter that .* was proven against; export anew"):
        adapter_files(export, "ann/judge", allow_failed_gate=False)


@pytest.mark.parametrize("find", [export_files, adapter_files])
@pytest.mark.parametrize(("spoil", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_an_export_that_is_not_in_order_is_refused(export, find, spoil, words):
    spoil(export)
    with pytest.raises(RecipeError) as caught:
        find(export, "ann/judge", allow_failed_gate=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "RUN" not in str(caught.value)  # its name is known here


@pytest.mark.parametrize("spoil", [failed_gate, no_gate])
def test_a_failed_gate_can_be_allowed(export, spoil):
    spoil(export)
    assert export_files(export, "ann/judge", allow_failed_gate=True)


def test_an_export_elsewhere_says_run_for_its_run(export, tmp_path):
    moved = export.rename(tmp_path / "moved")
    no_card(moved)
    with pytest.raises(RecipeError, match="`rm-recipe export RUN --overwrite`"):
        export_files(moved, "ann/judge", allow_failed_gate=False)


def test_a_repository_id_is_told_from_a_path():
    assert is_repo_id("ann/judge")
    assert is_repo_id("gpt2")
    assert not any(is_repo_id(name) for name in ("", "/models/x", "./x", "a/b/c", "ann/a b"))
