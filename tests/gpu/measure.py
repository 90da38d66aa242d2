"""Measures what the recipes do on this machine's GPU: `make gpu`, in under ten minutes.

    python tests/gpu/measure.py --output outputs/gpu [--data FOLDER] [--models FOLDER] [--only STEP ...]

Models have the shapes of the recipes' bases and random weights, on which neither speed nor memory depends.
Steps come in the order of their worth, and `gpu.json` is written after each measurement, so what is there
counts even where time runs out. `--tiny` makes small shapes, to try this file on a CPU.
"""

import argparse
import atexit
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    LlamaConfig,
)

from rm_recipe.model import memory
from rm_recipe.processes import is_out_of_memory
from rm_recipe.recipe.reader import Recipe, read_recipe
from rm_recipe.tools.benchmark import machine
from rm_recipe.tools.benchmark_worker import measure_scoring, measure_training
from rm_recipe.training.preflight import preflight
from rm_recipe.training.train import load_data, load_model, make_trainer

REPOSITORY = Path(__file__).parent.parent.parent
LORA, QLORA, ENCODER = "tinyllama_hh_lora", "tinyllama_hh_qlora", "distilbert_hh"
TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
TINYLLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 4}
TINY_LLAMA = {**TINYLLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_DISTILBERT = {"dim": 48, "hidden_dim": 64, "n_layers": 2}
CUDA = torch.cuda.is_available()


class Measure:
    """What all measurements share: where models, data and results are."""

    def __init__(self, output: Path, data: Path, models: Path, tiny: bool, minutes: float) -> None:
        self.output, self.data, self.models, self.tiny, self.minutes = output, data, models, tiny, minutes
        self.results: dict[str, Any] = {"machine": machine(), "tiny": tiny}
        self.began = time.monotonic()
        self.scratch = Path(tempfile.mkdtemp(prefix="rm-recipe-gpu-"))
        atexit.register(shutil.rmtree, self.scratch, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)

    def attempt(self, step: str, name: str, measurement: Callable[[], Any]) -> None:
        """Writes what it returns, None where memory is not enough, or how it fails; the rest goes on.

        Once time is up, nothing is measured any more.
        """
        if time.monotonic() - self.began > self.minutes * 60:
            return
        memory.free_unused()
        memory.reset_peak_memory()
        try:
            result = measurement()
        except Exception as error:
            result = None
            if not (is_out_of_memory(error) or "out of memory" in str(error)):
                traceback.print_exc()
                result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.results.setdefault(step, {})[name] = result
        (self.output / "gpu.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"[{time.monotonic() - self.began:4.0f} s] {step}, {name}: {json.dumps(result)}", flush=True)

    def base(self, name: str) -> Path:
        """A model folder of the shape of a recipe's base, with random weights."""
        folder = self.scratch / ("encoder" if name == ENCODER else "decoder")
        if not folder.exists():
            source = "all-minilm-l6-v2" if name == ENCODER else "smollm2-135m-instruct"
            tokenizer = AutoTokenizer.from_pretrained(self.models / source)
            if name == ENCODER:
                kind, config = AutoModelForMaskedLM, DistilBertConfig(**TINY_DISTILBERT if self.tiny else {})
            else:
                ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
                shape = TINY_LLAMA if self.tiny else TINYLLAMA
                kind, config = AutoModelForCausalLM, LlamaConfig(**shape, **ids, dtype="bfloat16")
            config.vocab_size = len(tokenizer)
            with torch.device("cuda" if CUDA else "cpu"):
                kind.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def recipe(self, name: str, batch: int | None = None, steps: int = 4, **keys: Any) -> Recipe:
        """A shipped recipe on this base and these data, with so many comparisons a micro-batch.

        Without gradient checkpointing, unless `keys` say otherwise; None leaves it to the plan.
        """
        path = REPOSITORY / "recipes" / f"{name}.yaml"
        as_shipped = read_recipe(path, check_inputs=False)
        shipped, shipped_data = as_shipped.training, as_shipped.data
        of_step = shipped.per_device_train_batch_size * shipped.gradient_accumulation_steps
        batch = batch or shipped.per_device_train_batch_size
        values = {
            "model_name_or_path": self.base(name),
            "dataset_name": self.data,
            "output_dir": self.scratch / "run",
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": of_step // batch,
            "comparisons_per_step": "null",  # the same, said otherwise
            "gradient_checkpointing": "false",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": "true",
            **keys,
        }
        there = [name for name in shipped_data.dataset_subsets or [] if (self.data / name).is_dir()]
        values["dataset_subsets"] = f"[{', '.join(there)}]"
        given = {key: value for key, value in values.items() if value is not None}
        return read_recipe(path, [word for key, value in given.items() for word in (f"--{key}", str(value))])


def run_tests(m: Measure) -> dict[str, Any]:
    """The tests that need a GPU, in eight processes; one that hangs does not keep the rest from its turn."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", "--tb=short", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    (m.output / "tests.log").write_text(done.stdout + done.stderr)
    return {"exit_code": done.returncode, "said": done.stdout.strip().splitlines()[-3:]}


def training(name: str, tried: tuple[tuple[str, int], ...], m: Measure) -> None:
    """Comparisons a second at several micro-batches; the comparisons of a step stay the recipe's."""
    for what, batch in tried:
        m.attempt(name, f"{what}, {batch}", partial(speeds, m, name, what, batch))


def speeds(m: Measure, name: str, what: str, batch: int) -> dict[str, Any]:
    """A training's figures as `benchmark.json` has them."""
    trainer, _, liger = what.partition(" with ")
    recipe = m.recipe(name, batch, steps=10 if batch >= 32 else 4, use_liger_kernel="true" if liger else None)
    result = measure_training(recipe, trainer)
    return {
        "comparisons_per_s": round(result["comparisons_per_s"], 2),
        "tokens_per_s": round(result["tokens_per_s"]),
        "tflops": round(result["tflops"], 1),
        "padding": round(result["padding_share"], 3),
        "peak_gb": round(result["peak_memory_bytes"] / 1e9, 2),
        "losses": [round(loss, 4) for loss in result["losses"]],
    }


def largest_batch(m: Measure, name: str, batch: int, checkpointing: bool) -> dict[str, Any]:
    """The plan's peak of the largest batch against the measured one."""
    recipe = m.recipe(name, batch, gradient_checkpointing=str(checkpointing).lower())
    tokenizer, train_split, test_split, _ = load_data(recipe)
    model, modules_to_save = load_model(recipe, tokenizer)
    trainer = make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split)
    shared, batches = trainer.sharing.used, train_split.longest(batch, trainer.sharing.used)
    parts = (model.config, recipe.model, recipe.training, modules_to_save, batches)
    plan = memory.plan(*parts, shared=shared, checkpointing=checkpointing, device=torch.device("cuda"))
    return {
        "planned_gb": round((plan.peak - memory.PROCESS) / 1e9, 2),
        "measured_gb": round(preflight(recipe, trainer)["peak_memory"] / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if CUDA else None,
    }


def plans(m: Measure) -> None:
    """The plan against what is measured, for each set-up."""
    tried = [(LORA, 4, False), (LORA, 4, True), (LORA, 16, False)]
    tried += [(QLORA, 4, False), (QLORA, 4, True), (ENCODER, 16, False)]
    for name, batch, checkpointing in tried:
        words = f"{name}, {batch}{', checkpointing' if checkpointing else ''}"
        m.attempt("plan", words, partial(largest_batch, m, name, batch, checkpointing))


def on_smaller_cards(m: Measure) -> None:
    """What the plan chooses for a card of so many GB, trained within as much of this one."""
    for name, sizes in ((LORA, (8, 16, 24)), (QLORA, (6, 12))):
        for size in sizes:
            m.attempt("smaller cards", f"{name}, {size} GB", partial(within, m, name, size * 1e9))


def within(m: Measure, name: str, card: float) -> dict[str, Any]:
    """A shipped recipe's preflight where the plan is told of a smaller card, and torch may have no more."""
    if CUDA:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(card - memory.PROCESS, total) / total)
    try:
        with mock.patch.object(memory, "device_memory", return_value=card):
            recipe = m.recipe(name, gradient_checkpointing=None)
            tokenizer, train_split, test_split, _ = load_data(recipe)
            model, modules_to_save = load_model(recipe, tokenizer)
            trainer = make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split)
        found = preflight(recipe, trainer)
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
    of_step = recipe.training.train_batch_size * recipe.training.gradient_accumulation_steps
    return {
        "micro_batch_tokens": recipe.values["micro_batch_tokens"],
        "checkpointing": recipe.values["gradient_checkpointing"],
        "peak_gb": round(found["peak_memory"] / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if CUDA else None,
        "comparisons_per_s": round(of_step * found["steps"] / found["seconds"], 1),
    }


def score(m: Measure) -> None:
    """Conversations a second, against a plain padded loop of so many comparisons."""
    for size in (8, 32, 64):
        m.attempt(
            "scoring",
            f"plain loop of {size}",
            lambda size=size: measure_scoring(m.recipe(LORA, per_device_eval_batch_size=size), 2),
        )


STEPS: dict[str, Callable[[Measure], None]] = {
    "tests": lambda m: m.attempt("tests", "pytest", partial(run_tests, m)),
    LORA: partial(
        training,
        LORA,
        (
            *(("ours", 64), ("ours with Liger", 64), ("stock", 16), ("ours", 16), ("ours with Liger", 16)),
            *(("ours", 4), ("stock with Liger", 16), ("stock", 32), ("stock", 4)),
        ),
    ),
    QLORA: partial(
        training, QLORA, (("ours", 64), ("ours with Liger", 64), ("stock", 16), ("ours", 4), ("stock", 4))
    ),
    ENCODER: partial(training, ENCODER, (("ours", 32), ("stock", 32), ("stock", 16), ("ours", 16))),
    "smaller cards": on_smaller_cards,
    "plan": plans,
    "scoring": score,
}


def main() -> None:
    """Runs the steps that the command line names, while there is time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--data", type=Path, default=Path("data/offline"), help="comparisons to measure on")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where the tokenizers are")
    parser.add_argument("--only", nargs="*", choices=STEPS, default=list(STEPS), help="these steps")
    parser.add_argument("--minutes", type=float, default=9, help="nothing begins later (default 9)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this file on a CPU")
    arguments = parser.parse_args()
    m = Measure(arguments.output, arguments.data, arguments.models, arguments.tiny, arguments.minutes)
    for name, step in STEPS.items():
        if name in arguments.only:
            step(m)


if __name__ == "__main__":
    main()
