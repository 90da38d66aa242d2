"""One of two ranks that `test_reward_trainer` launches: its first step, written into a folder."""

import os
import sys
from pathlib import Path

import torch
from test_reward_trainer import first_step

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(first_step(folder, batch_size=2), folder / f"rank-{os.environ['RANK']}.pt")
