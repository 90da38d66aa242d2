"""One of two ranks that `test_distribution` launches: `train` under FSDP2 or DeepSpeed, on the CPU.

Accelerate gives these to GPUs only; here it is told that it has some. All else is as it would be:
Accelerate's preparation, the engine itself over gloo, Trainer's steps and our save. Before that, what the
model is like goes to `rank-N.pt` beside the run folder.
"""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training import train as verb
from rm_recipe.training.trainer import SharedPrefixRewardTrainer

found = {}


class Watching(SharedPrefixRewardTrainer):
    """Remembers the precision of the rewards."""

    def compute_loss(self, *args, **kwargs):
        loss, outputs = super().compute_loss(*args, **kwargs | {"return_outputs": True})
        found.setdefault("rewards", outputs["rewards"].dtype)
        return (loss, outputs) if kwargs.get("return_outputs") else loss


def look(recipe, trainer):
    """`save_model`, after a look at each parameter: precision, whether it is trained, share of it here."""
    model = trainer.model_wrapped
    found["engine"] = type(model).__name__
    found["parameters"] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_shape"):
            share = parameter.ds_tensor.numel() / parameter.ds_shape.numel()
        else:
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            share = own.numel() / parameter.numel()
        found["parameters"][name] = (parameter.dtype, parameter.requires_grad, share)
    torch.save(found, recipe.output_dir.parent / f"rank-{os.environ['RANK']}.pt")
    save(recipe, trainer)


if __name__ == "__main__":
    recipe = read_recipe(sys.argv[1], sys.argv[2:])
    fsdp = "ACCELERATE_USE_FSDP" in os.environ  # of `accelerate launch`
    kind = DistributedType.MULTI_GPU if fsdp else DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = kind
    verb.SharedPrefixRewardTrainer = Watching
    save, verb.save_model = verb.save_model, look
    verb.train(recipe)
