"""One of two ranks that `test_distribution` launches: what holds the process group when it is destroyed."""

import gc
import os
import sys
from pathlib import Path

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

if __name__ == "__main__":
    recipe = read_recipe(sys.argv[1])
    destroy = torch.distributed.destroy_process_group

    def count(*args):
        """`destroy_process_group`, after writing down how many DDP wrappers there are."""
        alive = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        Path(recipe.output_dir.parent / f"rank-{os.environ['RANK']}.txt").write_text(str(alive))
        destroy(*args)

    torch.distributed.destroy_process_group = count
    train(recipe)
