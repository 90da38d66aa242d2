"""Measures what the recipes do on this machine's GPU: `make gpu`, in under ten minutes.

    python tests/gpu/measure.py --output outputs/gpu [--data FOLDER] [--models FOLDER] [--only STEP ...] [--tiny]

Models have the shapes of the recipes' bases and random weights, on which neither speed nor memory depends.
Steps come in the order of their worth; `gpu.json` is written after each measurement, so what is there counts
even where time runs out.
"""

import argparse
import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    LlamaConfig,
)

from rm_recipe import scoring
from rm_recipe.data.comparison import Encoded
from rm_recipe.model import memory
from rm_recipe.model.memory import fit, peak_memory, reset_peak_memory
from rm_recipe.model.shared_prefix import padded_rows
from rm_recipe.processes import is_out_of_memory
from rm_recipe.recipe.reader import Recipe, read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.tools.benchmark import machine
from rm_recipe.tools.benchmark_worker import measure_training
from rm_recipe.training.preflight import preflight
from rm_recipe.training.train import load_data, load_model, make_trainer, settle_step

REPOSITORY = Path(__file__).parent.parent.parent
LORA, QLORA, ENCODER = "tinyllama_hh_lora", "tinyllama_hh_qlora", "distilbert_hh"
TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}  # fmt: skip
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
TINY_DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
STEPS = 4  # of a training; the first warms up
SCORED = 699  # held-out comparisons
CARDS = (8, 12, 16, 24)  # GB


class Measure:
    """What all measurements share: where models, data and results are."""

    def __init__(self, output: Path, data: Path, models: Path, tiny: bool) -> None:
        self.output, self.data, self.models, self.tiny = output, data, models, tiny
        self.results: dict[str, Any] = {"machine": machine(), "tiny": tiny}
        self.began = time.monotonic()
        self.scratch = Path(tempfile.mkdtemp(prefix="rm-recipe-gpu-"))
        atexit.register(shutil.rmtree, self.scratch, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)

    def write(self, step: str, name: str, result: Any) -> None:
        self.results.setdefault(step, {})[name] = result
        (self.output / "gpu.json").write_text(json.dumps(self.results, indent=1, default=float) + "\n")
        print(
            f"[{time.monotonic() - self.began:4.0f} s] {step}, {name}: {json.dumps(result, default=float)[:600]}",
            flush=True,
        )

    def attempt(self, step: str, name: str, measurement: Callable[[], Any]) -> Any:
        """Writes what it returns, None where memory is not enough, or how it fails; the rest goes on."""
        clean()
        try:
            result = measurement()
        except Exception as error:  # one measurement that fails must not cost the others
            if not is_out_of_memory(error) and "out of memory" not in str(error):
                traceback.print_exc()
                result = {"failed": f"{type(error).__name__}: {error}"[:500]}
            else:
                result = None
        self.write(step, name, result)
        return result

    def base(self, recipe: str) -> Path:
        """A model folder of the shape of a recipe's base, with random weights."""
        folder = self.scratch / ("encoder" if recipe == ENCODER else "decoder")
        if (folder / "config.json").exists():
            return folder
        source = self.models / ("all-minilm-l6-v2" if recipe == ENCODER else "smollm2-135m-instruct")
        tokenizer = AutoTokenizer.from_pretrained(source)
        if recipe == ENCODER:
            shape = TINY_DISTILBERT if self.tiny else {}
            config: Any = DistilBertConfig(vocab_size=len(tokenizer), **shape)
            kind: Any = AutoModelForMaskedLM
        else:
            shape = TINY_LLAMA if self.tiny else TINYLLAMA
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            config, kind = LlamaConfig(vocab_size=len(tokenizer), **shape, **ids), AutoModelForCausalLM
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind.from_config(config, dtype=torch.float32 if recipe == ENCODER else torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def recipe(self, name: str, batch: int = 0, steps: int = STEPS, **keys: Any) -> Recipe:
        """A shipped recipe on this base and these data, with so many comparisons a micro-batch."""
        path = REPOSITORY / "recipes" / f"{name}.yaml"
        shipped = read_recipe(path, self.common(name), check_inputs=False).training
        of_step = shipped.per_device_train_batch_size * shipped.gradient_accumulation_steps
        if batch:
            keys |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": of_step // batch}
        keys["max_steps"] = steps
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        return read_recipe(path, [*self.common(name), *words])

    def common(self, name: str) -> list[str]:
        keys = {
            "model_name_or_path": self.base(name), "dataset_name": self.data, "leakage": "drop",
            "output_dir": self.scratch / "run", "save_strategy": "no",
            "logging_strategy": "no", "disable_tqdm": "true", "report_to": "[]",
        }  # fmt: skip
        if not (self.data / "helpful-base").is_dir():
            keys["dataset_subsets"] = "null"
        return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def clean() -> None:
    """Gives back what the measurement before has left on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak_memory()


def speeds(result: dict[str, Any]) -> dict[str, Any]:
    """A training's figures: tokens are real ones, FLOPs those of a model that computes no padding."""
    each = result["tokens"] / result["seconds"]
    return {
        "comparisons_per_s": round(result["comparisons"] / result["seconds"], 2),
        "tokens_per_s": round(each),
        "tflops": round(each * result["flop_per_token"] / 1e12, 1),
        "padding": round(result["padding"] / (result["tokens"] + result["padding"]), 3),
        "peak_gb": round(result["peak_memory_bytes"] / 1e9, 2),
        "losses": [round(loss, 4) for loss in result["losses"]],
    }


# --- the steps -------------------------------------------------------------------------------


def tests(m: Measure) -> None:
    """The tests that need a GPU, in four processes."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", "-p", "no:cacheprovider",
                   "--tb=short", "--durations=8", "tests/gpu"]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ, timeout=150
        )
        (m.output / "tests.log").write_text(done.stdout + done.stderr)
        print(done.stdout[-5000:], flush=True)
        return {"exit_code": done.returncode, "said": done.stdout.strip().splitlines()[-1:]}

    m.attempt("tests", "pytest", run)


def training(m: Measure, name: str, ours: tuple[int, ...], stock: tuple[int, ...]) -> None:
    """Comparisons a second at several micro-batches; the comparisons of a step stay the recipe's."""
    for what, batches in (("ours", ours), ("stock", stock)):
        for batch in batches:
            keys = {"gradient_checkpointing": "false"}
            m.attempt(
                name, f"{what}, {batch}",
                lambda what=what, batch=batch: speeds(measure_training(m.recipe(name, batch, 10 if what == "ours" and batch >= 16 else STEPS, **keys), what)),
            )  # fmt: skip


def ready(m: Measure, recipe: Recipe) -> tuple[Any, Any, list[str], Any, Any]:
    """The trainer of a recipe, its new modules, and the comparisons."""
    tokenizer, train_split, test_split, _ = load_data(recipe)
    model, new_modules = load_model(recipe, tokenizer)
    sharing = settle_step(recipe, model, new_modules, train_split)
    trainer = make_trainer(recipe, tokenizer, model, new_modules, train_split, test_split, sharing)
    return trainer, sharing, new_modules, train_split, test_split


def planned(m: Measure, name: str, batch: int, checkpointing: bool) -> dict[str, Any]:
    """The plan's peak of the largest batch against the measured one."""
    recipe = m.recipe(name, batch, gradient_checkpointing=str(checkpointing).lower())
    trainer, sharing, new_modules, train_split, test_split = ready(m, recipe)
    largest = train_split.longest(batch, sharing.used)
    base = trainer.model.get_base_model() if recipe.model.use_peft else trainer.model
    began = time.monotonic()
    plan = memory.plan(
        base.config, recipe.model, recipe.training, new_modules, largest,
        shared=sharing.used, checkpointing=checkpointing, device=torch.device("cuda"),
    )  # fmt: skip
    took = time.monotonic() - began
    reset_peak_memory()
    loaded = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    shown = preflight(recipe, trainer, new_modules, train_split, test_split)
    assert shown is not None
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return {
        "plan_gb": round(plan.peak / 1e9, 2), "without_process_gb": round((plan.peak - memory.PROCESS) / 1e9, 2),
        "measured_gb": round(shown.peak_memory / 1e9, 2), "reserved_gb": round(reserved / 1e9, 2),
        "loaded_gb": round(loaded / 1e9, 2), "planned_weights_gb": round(plan.weights / 1e9, 2),
        "tokens": int(train_split.sizes(sharing.used)[train_split.largest(batch, sharing.used)].sum()),
        "plan_seconds": round(took, 1), "said": str(shown),
    }  # fmt: skip


def plans(m: Measure) -> None:
    """The plan against what is measured, for each set-up."""
    for name, batch, checkpointing in (
        (LORA, 4, False), (LORA, 4, True), (LORA, 16, False), (QLORA, 4, False), (QLORA, 4, True),
        (ENCODER, 16, False),
    ):  # fmt: skip
        m.attempt("plan", f"{name}, {batch}{', checkpointing' if checkpointing else ''}",
                  lambda name=name, batch=batch, c=checkpointing: planned(m, name, batch, c))  # fmt: skip


def score(m: Measure) -> None:
    """Conversations a second by token budgets, against plain padded loops."""
    recipe = m.recipe(LORA)
    tokenizer, train_split, test_split, _ = load_data(recipe)
    model, _ = load_model(recipe, tokenizer)
    judge = RewardModel(model.to(recipe.training.device).eval(), tokenizer)
    comparisons = [Encoded(c.prefix, c.rests) for c in test_split.encoded()[:SCORED]]

    def timed(scorer: Callable[[], Any]) -> dict[str, Any]:
        scorer()
        reset_peak_memory()
        synchronize()
        began = time.perf_counter()
        scorer()
        synchronize()
        seconds = time.perf_counter() - began
        return {
            "conversations_per_s": round(2 * len(comparisons) / seconds, 1),
            "peak_gb": round(peak_memory() / 1e9, 2),
        }

    def plain(size: int) -> Any:
        rewards = []
        for start in range(0, len(comparisons), size):
            batch = padded_rows(comparisons[start : start + size], tokenizer.pad_token_id)
            with torch.inference_mode():
                logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
            rewards.append(logits.float().squeeze(-1).cpu().numpy())
        return np.concatenate(rewards)

    for tokens in (4096, 16384, 65536):
        scoring.TOKENS_PER_BATCH = tokens
        m.attempt(
            "scoring", f"ours, {tokens} tokens", lambda: timed(lambda: judge.score_encoded(comparisons))
        )
    for size in (8, 32, 64):
        m.attempt("scoring", f"plain, {size}", lambda size=size: timed(lambda: plain(size)))


def cards(m: Measure) -> None:
    """What fits smaller cards by the plan, run with no more memory than they have."""
    if not torch.cuda.is_available():
        return
    total = torch.cuda.mem_get_info()[1]
    for name in (LORA, QLORA):
        for size in CARDS:

            def run(name: str = name, size: int = size) -> dict[str, Any]:
                recipe = m.recipe(name)
                trainer, sharing, new_modules, train_split, _ = ready(m, recipe)
                for key in ("gradient_checkpointing", "activation_checkpointing"):
                    recipe.values.pop(key, None)
                recipe.training.gradient_checkpointing = recipe.training.activation_checkpointing = False
                base = trainer.model.get_base_model()
                found = fit(
                    base.config, recipe, new_modules, lambda n: train_split.longest(n, sharing.used),
                    shared=sharing.used, device=torch.device("cuda"), memory_bytes=size * 1e9,
                )  # fmt: skip
                config, batch = base.config, 1
                while batch * 2 <= min(found.largest, 64):
                    batch *= 2
                del trainer, base, config
                clean()
                torch.cuda.set_per_process_memory_fraction(size * 1e9 / total)
                try:
                    again = m.recipe(name, batch, gradient_checkpointing=str(found.checkpointing).lower())
                    trainer, sharing, new_modules, train_split, test_split = ready(m, again)
                    shown = preflight(again, trainer, new_modules, train_split, test_split)
                    seconds = train_split.sizes(sharing.used).mean() * 64
                    return {
                        "batch": batch, "checkpointing": found.checkpointing, "largest": found.largest,
                        "plan_gb": round(found.plan.peak / 1e9, 2), "peak_gb": round(shown.peak_memory / 1e9, 2),
                        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2), "said": str(shown),
                        "tokens_of_64": int(seconds),
                    }  # fmt: skip
                finally:
                    torch.cuda.set_per_process_memory_fraction(1.0)

            m.attempt("cards", f"{name}, {size} GB", run)


def attention(m: Measure) -> None:
    """One layer's attention, forwards and backwards, by kernel and row length; 16,384 tokens each."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    if not torch.cuda.is_available():
        return
    flex = torch.compile(flex_attention, dynamic=False)
    everything = 16384
    for length in (512, 1024, 2048, 4096):
        rows = everything // length
        q, k, v = (
            torch.randn(rows, heads, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (32, 4, 4)
        )
        comparison = (torch.arange(length, device="cuda") // 256).expand(rows, length).contiguous()
        position = torch.arange(length, device="cuda") % 256
        response = (((position > 128).long() + (position > 192).long()).expand(rows, length)).contiguous()

        def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
            same = comparison[b, i] == comparison[b, j]
            return same & (i >= j) & ((response[b, j] == 0) | (response[b, i] == response[b, j]))

        causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
        same = comparison[:, :, None] == comparison[:, None, :]
        own = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
        mask = (causal & same & own)[:, None]

        def by_mask() -> torch.Tensor:
            kk, vv = (x[:, :, None].expand(-1, -1, 8, -1, -1).reshape(rows, 32, length, 64) for x in (k, v))
            return scaled_dot_product_attention(q, kk, vv, attn_mask=mask)

        def causal_flash() -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def by_blocks() -> torch.Tensor:
            return flex(q, k, v, block_mask=blocks, enable_gqa=True)

        def timed(kernel: Callable[[], torch.Tensor]) -> dict[str, Any]:
            gradient = torch.randn_like(q)
            for _ in range(3):
                kernel().backward(gradient)
            synchronize()
            began = time.perf_counter()
            for _ in range(20):
                kernel().backward(gradient)
            synchronize()
            return {"ms": round((time.perf_counter() - began) / 20 * 1e3, 3)}

        m.attempt("attention", f"{length}, sdpa with a mask", lambda: timed(by_mask))
        m.attempt("attention", f"{length}, sdpa causal (flash)", lambda: timed(causal_flash))
        began = time.perf_counter()
        blocks = create_block_mask(sees, rows, None, length, length, device="cuda")
        synchronize()
        m.write("attention", f"{length}, block mask", {"ms": round((time.perf_counter() - began) * 1e3, 1)})
        m.attempt("attention", f"{length}, flex", lambda: timed(by_blocks))


def profiles(m: Measure) -> None:
    """Where the time of a micro-batch goes: the kernels, and what the CPU does meanwhile."""
    for name, batch in ((LORA, 16), (QLORA, 16)):

        def run(name: str = name, batch: int = batch) -> dict[str, Any]:
            recipe = m.recipe(name, batch, gradient_checkpointing="false")
            trainer, *_ = ready(m, recipe)
            loader = iter(trainer.get_train_dataloader())
            began = time.perf_counter()
            batches = [next(loader) for _ in range(4)]
            collating = (time.perf_counter() - began) / 4
            trainer.model.train()
            for inputs in batches[:2]:
                whole_step(trainer, dict(inputs))
            synchronize()
            began = time.perf_counter()
            whole_step(trainer, dict(batches[2]))
            synchronize()
            seconds = time.perf_counter() - began
            kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            with profile(activities=kinds) as seen:
                whole_step(trainer, dict(batches[3]))
                synchronize()
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            averages = seen.key_averages()
            (m.output / f"profile_{name}.txt").write_text(
                averages.table(sort_by=by, row_limit=45, max_name_column_width=80)
            )
            return {
                "seconds": round(seconds, 4), "collating": round(collating, 4),
                "tokens": [int(inputs["num_tokens"]) for inputs in batches],
                "rows": [list(inputs["input_ids"].shape) for inputs in batches],
                "kernels_s": round(sum(e.self_device_time_total for e in averages) / 1e6, 4),
                "launches": sum(e.count for e in averages if e.key.startswith("cudaLaunchKernel")),
            }  # fmt: skip

        m.attempt("profile", f"{name}, {batch}", run)


def whole_step(trainer: Any, inputs: dict[str, Any]) -> None:
    """Forward and backward of a micro-batch, as in training."""
    from rm_recipe.training.distributed import autocast_of

    with autocast_of(trainer.args):
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    loss.backward()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def steps() -> Iterator[tuple[str, Callable[[Measure], None]]]:
    """What is measured, most worth first."""
    yield "tests", tests
    yield LORA, lambda m: training(m, LORA, (4, 16, 64), (4, 16, 32))
    yield QLORA, lambda m: training(m, QLORA, (4, 64), (4, 16))
    yield ENCODER, lambda m: training(m, ENCODER, (16, 32), (16, 32))
    yield "scoring", score
    yield "plan", plans
    yield "cards", cards
    yield "profile", profiles
    yield "attention", attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--data", type=Path, default=Path("data/offline"), help="comparisons to measure on")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where the tokenizers are")
    parser.add_argument("--only", nargs="*", help="these steps, all by default")
    parser.add_argument("--minutes", type=float, default=9.5, help="no step begins later")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try this file on a CPU")
    arguments = parser.parse_args()
    m = Measure(arguments.output, arguments.data, arguments.models, arguments.tiny)
    for name, step in steps():
        if arguments.only and name not in arguments.only:
            continue
        if time.monotonic() - m.began > arguments.minutes * 60:
            m.write(name, "left out", "time is up")
            continue
        try:
            step(m)
        except Exception:
            traceback.print_exc()
        clean()


if __name__ == "__main__":
    main()
