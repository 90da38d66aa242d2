"""Keys together, and with this machine: what contradicts, what is not there, and what follows.

What a key may be by itself is in `schema.py`. A term of the tables here is `key=value|value`, or `key`,
which holds where that has a value other than false, 0 and null.
"""

import math
import os
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

from rm_recipe.errors import one_line
from rm_recipe.files import pickle_fault
from rm_recipe.recipe import schema

# The first term excludes each of the others: why.
EXCLUSIVE = """
load_in_4bit load_in_8bit: a base is quantised once
use_dora load_in_8bit: DoRA reads weights that bitsandbytes does not give in 8 bits
datasets dataset_name dataset_subsets dataset_revision: each entry of 'datasets' has its own
lora_dropout disable_dropout=true: TRL switches dropout off; set 'disable_dropout: false'
neftune_noise_alpha prefix_sharing=auto: the noise is scaled by a row's length; set 'prefix_sharing: off'
warmup_steps lr_scheduler_type=constant|reduce_lr_on_plateau|greedy: that schedule has no warm-up
lr_scheduler_kwargs lr_scheduler_type=constant|constant_with_warmup: that schedule takes none
comparisons_per_step gradient_accumulation_steps: the second follows; on the command line null leaves it out
fp16 use_cpu=true: a CPU computes in bf16 or fp32; leave 'fp16' out
use_liger_kernel use_cpu=true: its kernels are a GPU's; leave 'use_liger_kernel' out
activation_offloading use_cpu=true: on a CPU activations are where it would move them
attn_implementation=flex_attention use_cpu=true: it cannot train on a CPU; leave 'attn_implementation' out
gradient_checkpointing activation_checkpointing=false: they are one thing, by two names
activation_checkpointing gradient_checkpointing=false: they are one thing, by two names
load_best_model_at_end eval_strategy=no save_strategy=no: the best is known by evaluating what is saved
early_stopping_patience eval_strategy=no save_strategy=no|best: the best is known by evaluating what is saved
early_stopping_patience load_best_model_at_end=false: it keeps the best
save_strategy=best eval_strategy=no: the best is known by evaluating
fsdp load_in_4bit load_in_8bit per_device_train_batch_size=auto: they need the whole model on each GPU
deepspeed load_in_4bit load_in_8bit per_device_train_batch_size=auto: they need the whole model on each GPU
"""
# A term that is refused without another.
NEEDS = schema.table("""
load_in_4bit load_in_8bit: use_peft
push_to_hub: hub_model_id
per_device_train_batch_size=auto: comparisons_per_step
margin_map: margin_column
save_strategy=best: metric_for_best_model
dataloader_persistent_workers dataloader_prefetch_factor: dataloader_num_workers
dataloader_multiprocessing_context: dataloader_num_workers
""")
# Keys that do nothing where none of the terms is in the recipe; beside `use_peft: false` they may stay.
_BEST = "load_best_model_at_end early_stopping_patience"
_BY_METRIC = "save_strategy=best lr_scheduler_type=reduce_lr_on_plateau|greedy"
IDLE = schema.table(f"""
lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save: use_peft
use_rslora use_dora: use_peft
bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage: load_in_4bit
eval_steps eval_delay: eval_strategy {_BEST}
metric_for_best_model greater_is_better: {_BEST} {_BY_METRIC}
optim_target_modules: optim=galore_adamw|galore_adamw_8bit|galore_adafactor|apollo_adamw
run_name project trackio_space_id trackio_bucket_id trackio_static_space_id: report_to
hub_model_id hub_private_repo: push_to_hub
""")
# What the rules take keys for that are not in the recipe.
USUAL = {"disable_dropout": True, "prefix_sharing": "auto", "eval_strategy": "no", "save_strategy": "steps"}
USUAL |= {"optim": "adamw_torch_fused"}
SHARDING = ("FSDP", "DeepSpeed")
BEST_EVERY = 0.1  # of all steps, after which the best checkpoint is looked for where the recipe says nothing
EARLY_STOPPING = {  # what `early_stopping_patience` sets
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_accuracy",
    "restore_callback_states_from_checkpoint": True,  # how many evaluations were no better
}


# --- what contradicts, or would do nothing -----------------------------------------------------


def relation_faults(values: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """Find what is missing, in contradiction, or would do nothing.

    Args:
        values: the parsed ones.
        given: has the faulty keys too.
    """
    device = device_of(values)
    known = USUAL | best_values(values) | values | {"use_cpu": device == "cpu"}
    known |= {name.lower(): is_asked_for(name, values.get(name.lower())) for name in SHARDING}

    def holds(term: str) -> bool:
        key, _, wanted = term.partition("=")
        return schema.shown(known.get(key)) in wanted.split("|") if wanted else bool(known.get(key))

    def said(term: str) -> str:
        key, _, wanted = term.partition("=")
        value = schema.shown(known[key]) if wanted and holds(term) else wanted.replace("|", " or ")
        return f"'{key}: {value}'" if value else f"'{key}'"

    if not given.get("model_name_or_path"):
        yield "'model_name_or_path' is missing: the base model's folder or Hub id"
    if not given.get("dataset_name") and not given.get("datasets"):
        yield "'dataset_name' is missing: a file, a folder or a Hub id"
    for row, why in (line.split(": ", 1) for line in EXCLUSIVE.strip().splitlines()):
        first, *others = row.split()
        for other in filter(holds, others if holds(first) else ()):
            yield f"{said(first)} and {said(other)} exclude each other: {why}"
    for term, needed in NEEDS.items():
        if holds(term) and not holds(needed):
            yield f"{said(term)} needs {said(needed)}: set that, too"
    for key, alternatives in IDLE.items():
        terms = alternatives.split()
        asked = any(holds(term) if "=" in term else term in values for term in terms)
        if values.get(key) is not None and not asked:
            yield f"'{key}' does nothing without {said(terms[0])}: set that, or leave '{key}' out"
    if values.get("bf16") and device != "cpu" and not has_bf16(device):
        yield "'bf16: true': this GPU has no bfloat16; leave 'bf16' out and fp16 is used"
    by_steps = all(map(holds, ("eval_strategy=steps", "save_strategy=steps")))
    if any(map(holds, _BEST.split())) and by_steps and known["eval_steps"] != known["save_steps"]:
        fault = f"'eval_steps: {known['eval_steps']}' must equal 'save_steps: {known['save_steps']}'"
        yield f"{fault}, or leave it out: the best checkpoint is one that is evaluated and saved"
    made, of_step = batch_values(values), values.get("comparisons_per_step")
    if made and of_step != math.prod(made.values()) * int(os.environ.get("WORLD_SIZE", "1")):
        yield f"'comparisons_per_step: {of_step}' is no multiple of what all processes' batches hold"
    yield from split_faults(values)


def is_asked_for(name: str, key: Any) -> bool:
    """Whether the CPU or one of `SHARDING` is asked for: by its key, or by `accelerate launch`."""
    said = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower()
    return bool(key) or said in ("1", "on", "true", "yes")


def split_faults(values: dict[str, Any]) -> Iterator[str]:
    """Find splits that are not apart, and mixtures that are not whole."""
    get, entries = values.get, values.get("datasets") or []
    for number, entry in enumerate(entries, 1):
        if not entry.get("path"):
            yield f"'datasets', entry {number} has no 'path': a file, a folder or a Hub id"
    if len({bool(entry.get("fraction")) for entry in entries}) > 1:
        yield "'datasets': give a 'fraction' to every entry, or to none"
    train = get("dataset_train_split", schema.DataArguments.dataset_train_split)
    test = get("dataset_test_split", schema.DataArguments.dataset_test_split)
    if get("test_split_size") is None and test in {entry.get("split", "train") for entry in entries}:
        yield f"'datasets': 'split: {test}' is what is held out ('dataset_test_split')"
    if train == test:
        yield f"'dataset_test_split: {test}' must differ from 'dataset_train_split'"
    if get("test_split_size") is not None and test != schema.DataArguments.dataset_test_split:
        yield f"'dataset_test_split: {test}' does nothing beside 'test_split_size': leave one of them out"
    if get("dataset_subsets") and Path(get("dataset_name") or "").is_file():
        yield f"'dataset_subsets' are folders, and '{get('dataset_name')}' is a file"


# --- what is not there, or cannot be made ------------------------------------------------------


def input_faults(values: dict[str, Any]) -> Iterator[str]:
    """Find local models, data sets and templates that are named and not there, or not to be used."""
    base, template = values.get("model_name_or_path") or "", values.get("chat_template_path") or ""
    named = [("model_name_or_path", base), ("dataset_name", values.get("dataset_name"))]
    named += [("path", entry.get("path")) for entry in values.get("datasets") or []]
    for key, name in [*named, ("chat_template_path", template)]:
        hint = " yet; run `rm-recipe prepare offline`" if name in schema.OFFLINE else ""
        if name and not Path(name).exists() and (hint or schema.looks_local(name)):
            yield f"'{key}: {name}' does not exist{hint}"
    if base and Path(base).exists():
        files = [file for file in schema.MODEL_FILES if (Path(base) / file).is_file()]
        if not files:
            yield f"'model_name_or_path: {base}' holds no model: no {' or '.join(schema.MODEL_FILES)}"
        elif fault := pickle_fault(base, adapter="adapter_config.json" in files):
            yield fault
    if Path(template).is_file() and not template.endswith(schema.TEMPLATE_FORMATS):
        fault = f"a template's file ends in {' or '.join(schema.TEMPLATE_FORMATS)}"
        yield f"'chat_template_path: {template}': {fault}; a folder or a Hub id means that tokenizer's"


def making_faults(training: Any) -> Iterator[str]:
    """Find what cannot be made here of a recipe whose every key is right, by making it."""
    import torch
    from transformers import get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    schedule, options = training.lr_scheduler_type, training.lr_scheduler_kwargs or None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    makers: dict[str, Callable[[], Any]] = {
        "report_to": lambda: [kind() for kind in get_reporting_integration_callbacks(training.report_to)],
        f"lr_scheduler_type: {schedule.value}": lambda: get_scheduler(schedule, optimizer, 0, 10, options),
        f"optim: {training.optim.value}": lambda: try_optimizer(training),
    }
    for key, make in makers.items():
        try:
            make()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            yield f"'{key}': {one_line(error)}"


def try_optimizer(training: Any) -> None:
    """Make the optimizer, unless it is made of a model's layers.

    Raises:
        ImportError, RuntimeError, TypeError, ValueError: it cannot be made, or takes no `optim_args`.
    """
    import torch
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
    plain = copy(training)
    plain.optim_args = None
    if training.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
        raise ValueError(f"'optim_args: {training.optim_args}' changes nothing of it; leave it out")
    if not training.optim.value.startswith(("galore", "apollo")):
        kind([torch.nn.Parameter(torch.zeros(1))], **options)


# --- what follows, for the keys that a recipe leaves open ---------------------------------------


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from a recipe's values and from the device, before RewardConfig is made.

    That one defaults to bf16 and raises on a machine without a bf16 GPU. A frozen base is loaded in the
    precision that it is computed in; a base that is trained in full keeps its weights in fp32.
    """
    device, stops_early = device_of(values), values.get("early_stopping_patience")
    found = (EARLY_STOPPING if stops_early else {}) | best_values(values) | values
    bf16, fp16 = values.get("bf16"), bool(values.get("fp16"))
    if bf16 is None and not fp16:
        bf16 = has_bf16(device)
        fp16 = not bf16 and device not in ("cpu", "mps")  # which have no gradient scaler
    found |= {"use_cpu": device == "cpu", "bf16": bool(bf16), "fp16": fp16}
    found |= batch_values(values)
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if not values.get("use_peft"):
        found["dtype"] = "float32"
    elif "dtype" not in values or (quantised and values["dtype"] == "auto"):  # it computes in this one
        found["dtype"] = "bfloat16" if bf16 else "float16" if fp16 else "float32"
    if values.get("disable_dropout", True):  # by TRL, whatever `lora_dropout` says
        found["lora_dropout"] = 0.0
    if values.get("report_to", "") is None:
        found["report_to"] = "none"
    # A GPU is fed by a process of its own; on a CPU that would take a core from the training.
    feeding = {"dataloader_num_workers": int(device == "cuda")}
    feeding["dataloader_pin_memory"] = device not in ("cpu", "mps")  # whose memory is the machine's
    return feeding | {"disable_tqdm": False} | found


def best_values(values: dict[str, Any]) -> dict[str, Any]:
    """What keeping the best checkpoint needs of Trainer: to look where it saves, and nowhere else."""
    if not any(map(values.get, _BEST.split())):
        return {}
    saved = values.get("save_strategy")
    strategy = values.get("eval_strategy") or ("steps" if saved in (None, "best", "no") else saved)
    found = {"eval_strategy": strategy, "save_strategy": strategy}
    if strategy == "steps":
        # Trainer would look at every `logging_steps`, save at every 500, and know no best checkpoint.
        often = values.get("save_steps") or values.get("eval_steps") or BEST_EVERY
        found |= {"eval_steps": often, "save_steps": often}
    return found


def batch_values(values: dict[str, Any]) -> dict[str, int]:
    """How many comparisons are a batch, and how many batches a step, where `comparisons_per_step` decides."""
    of_step, processes = values.get("comparisons_per_step"), int(os.environ.get("WORLD_SIZE", "1"))
    if not of_step:
        return {}
    batch = values.get("per_device_train_batch_size", "auto")
    batch = max(of_step // processes, 1) if batch == "auto" else batch  # divided where it does not fit
    accumulation = max(of_step // (batch * processes), 1)
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


def device_of(values: dict[str, Any]) -> str:
    """The type of the device that a recipe is trained on here."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = is_asked_for("CPU", values.get("use_cpu"))
    return "cpu" if accelerator is None or on_cpu else str(accelerator.type)


def has_bf16(device: str) -> bool:
    """Whether bf16 is native; torch also says yes where it is emulated, as on a T4, and slower than fp32."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available())
