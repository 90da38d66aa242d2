"""Training in several processes: what is sharded, and in which precision.

The engine is Accelerate's: DDP, FSDP2 or DeepSpeed, by the file in `accelerate_configs/`. What is here
keeps its silent choices from becoming ours.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from rm_recipe.errors import RecipeError

if TYPE_CHECKING:
    from trl import RewardConfig


def without_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What happens within takes no random number from what comes after."""
    there = [] if device.type in ("cpu", "mps") else [device]
    return torch.random.fork_rng(there, device_type=device.type if there else "cuda")


def check_sharding(training: "RewardConfig", quantised: bool = False) -> None:
    """Refuse FSDP or DeepSpeed that was asked for and would not be given.

    On a CPU, Accelerate (1.15) turns both into DDP without a word, and every process holds the whole model.

    Args:
        training: parsed, which has settled the device and the process group.
        quantised: whether the base is to be in 4 or 8 bits.

    Raises:
        RecipeError: naming what there is instead.
    """
    state, n = PartialState(), PartialState().num_processes
    on_gpus = state.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    given = {
        "FSDP": on_gpus and n > 1,
        "DeepSpeed": state.distributed_type == DistributedType.DEEPSPEED,
    }
    for name, key in (("FSDP", training.fsdp), ("DeepSpeed", training.deepspeed)):
        asked = key or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if asked and (quantised or not given[name]):
            reason = "a base in 4 or 8 bits is not sharded"
            if not given[name]:
                here = f"{'is' if n == 1 else 'are'} {n} process{'es' * (n > 1)} on {state.device.type}"
                reason = f"it shards a model over several GPUs, and here {here}"
            raise RecipeError(
                f"{name} was asked for and would not be given: {reason}; take another of accelerate_configs/"
            )


def keep_precision(accelerator: Any, training: "RewardConfig") -> bool:
    """Make FSDP2 and DeepSpeed leave every parameter in its own precision: base in bf16, head in fp32.

    Under a recipe's `bf16` Accelerate (1.15) has FSDP2 gather all parameters in bf16 and round what the model
    returns, and has DeepSpeed make the whole model bf16, the saved one too. Rewards would be bf16: around
    10, neighbours are 0.06 apart. Autocast then chooses the precision of the computation, as under DDP.

    Returns:
        whether the caller has to give that autocast (`autocast_of`), because Accelerate does not.
    """
    sharded = getattr(accelerator.state, "fsdp_plugin", None)
    if sharded is not None and sharded.fsdp_version == 2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        sharded.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        return True
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and (training.bf16 or training.fp16):
        # No "safe" modules: those would be sent in bf16, and their gradients summed in it.
        autocast = {"enabled": True, "dtype": "bfloat16" if training.bf16 else "float16"}
        deepspeed.deepspeed_config.update(
            bf16={"enabled": False},
            fp16={"enabled": False},
            torch_autocast={**autocast, "lower_precision_safe_modules": []},
        )
        return True
    return False


def autocast_of(training: "RewardConfig") -> torch.autocast:
    """The recipe's `bf16` or `fp16` as a context.

    Without a cache: that would keep copies of all trained weights, whole, until the step's end.
    """
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    enabled = bool(training.bf16 or training.fp16)
    return torch.autocast(training.device.type, dtype, enabled=enabled, cache_enabled=False)


def end(trainer: Any) -> None:
    """End the process group, and before it all else that holds it.

    DDP does. Freed as the last of its owners, it joins gloo's thread (torch 2.13) without giving up Python's
    lock, which that thread may need to let go of its last tensor: a process that has done everything would
    never end. `destroy_process_group` gives the lock up.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.end()


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within it, each process loads a model whole, also under DeepSpeed's ZeRO-3, which shards it later.

    transformers would shard it while loading: then it takes no `device_map`, and a head that is put in
    or drawn would be an empty tensor.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
