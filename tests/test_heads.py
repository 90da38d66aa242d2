"""A head that did not reach the disk, or did not move, is noticed."""

import pytest
import torch
from safetensors.torch import save_file

from rm_recipe.errors import TrainingError
from rm_recipe.heads import check_saved_head


def test_a_saved_head_that_is_missing_or_did_not_move_is_noticed(tmp_path):
    start = {"score.weight": torch.ones(1, 2)}
    save_file({"base_model.model.other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="score.weight is missing"):
        check_saved_head(tmp_path, start)
    save_file({"base_model.model.score.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="score.weight did not move"):
        check_saved_head(tmp_path, start)
