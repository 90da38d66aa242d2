"""Tiny random models, a tiny tokenizer and small preference files; no test needs the network."""

import atexit
import gc
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Caches of tiny data sets that no later run meets again do not belong into the user's.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rm-recipe-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerFast,
)


def pytest_collection_finish() -> None:
    """Keeps what was imported out of `gc.collect()`, of which a training makes four: half of its time."""
    gc.collect()
    gc.freeze()


settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

REPOSITORY = Path(__file__).parent.parent
HH_RLHF = REPOSITORY.parent / "shared" / "data" / "hh-rlhf"
needs_hh_rlhf = pytest.mark.skipif(not HH_RLHF.is_dir(), reason="no hh-rlhf beside the repository")
WORDS = "the a good bad cat dog sat ran on mat far away yes no maybe hello how are you fine thanks".split()

# TinyLlama's template, in our words: a speaker's tag, the text, EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Sizes of one layer of a tiny decoder or encoder.
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
TINY_DECODER = {**TINY, **ENDS, "num_key_value_heads": 2, "max_position_embeddings": 256}
TINY_GPT2 = {**ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
TINY_ENCODER = {**TINY, "max_position_embeddings": 128}
TINY_DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
RELATIVE = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
RELATIVE |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
TINY_DEBERTA = {**TINY_ENCODER, **RELATIVE, "pooler_hidden_size": 32, "type_vocab_size": 0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that, like TinyLlama's, adds BOS by itself and pads with EOS."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings = {"vocab_size": 400, "special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer = trainers.BpeTrainer(**settings, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, chat_template=CHAT_TEMPLATE)


def base_of(auto: Any, model_type: str, sizes: dict[str, Any], **more: Any) -> Callable[[int], Any]:
    """A function of the vocabulary's size: what to make the base from, and its configuration."""
    return lambda size: (auto, AutoConfig.for_model(model_type, vocab_size=size, **sizes, **more))


# What a base checkpoint of each kind is, without a classification head.
TINY_BASES = {
    "llama": base_of(AutoModelForCausalLM, "llama", TINY_DECODER),
    "qwen2": base_of(AutoModelForCausalLM, "qwen2", TINY_DECODER, tie_word_embeddings=True),
    "mistral": base_of(AutoModelForCausalLM, "mistral", TINY_DECODER, sliding_window=128),
    "mistral-short": base_of(AutoModelForCausalLM, "mistral", TINY_DECODER, sliding_window=16),
    "gpt2": base_of(AutoModelForCausalLM, "gpt2", TINY_GPT2),
    "bert": base_of(AutoModelForMaskedLM, "bert", TINY_ENCODER),
    "distilbert": base_of(AutoModelForMaskedLM, "distilbert", TINY_DISTILBERT),
    "deberta": base_of(AutoModel, "deberta-v2", TINY_DEBERTA),
}
TINY_ENCODERS = ("bert", "distilbert", "deberta")


def save_base(folder: Path, base: Callable[[int], Any], tokenizer: Any) -> Path:
    """A random model of the kind, with its tokenizer, as a model folder."""
    auto, config = base(len(tokenizer))
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a tokenizer, as a model folder."""
    base = base_of(AutoModelForCausalLM, "llama", TINY_DECODER | {"max_position_embeddings": 512})
    return save_base(tmp_path_factory.mktemp("models") / "tiny-llama", base, make_tokenizer())


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random DistilBERT with a BertTokenizer, as a model folder."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", ".", "?", "!", "user", "assistant", *WORDS]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    base = base_of(AutoModelForMaskedLM, "distilbert", TINY_DISTILBERT | {"max_position_embeddings": 64})
    return save_base(tmp_path_factory.mktemp("models") / "tiny-distilbert", base, tokenizer)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_distilbert: Path) -> Callable[[str], Path]:
    """The folder of a two-layer random model of a kind of `TINY_BASES`, with a fitting tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def folder(name: str) -> Path:
        encoder = name in TINY_ENCODERS
        tokenizer = AutoTokenizer.from_pretrained(tiny_distilbert) if encoder else make_tokenizer()
        return save_base(root / name, TINY_BASES[name], tokenizer)

    return folder


def save_classifier(
    folder: Path, base: Path, dtype: torch.dtype = torch.float32, labels: int = 1, **settings: Any
) -> Path:
    """A model whose head is random, as a model folder that says how it was trained."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id, model.config.rm_recipe = tokenizer.pad_token_id, settings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run with adapters has saved."""
    return load_file(run / "model" / "adapter_model.safetensors")


def logged(run: Path, key: str) -> list[float]:
    """A figure of a run's log, in order."""
    return [entry[key] for entry in json.loads((run / "run.json").read_text())["log"] if key in entry]


@dataclass
class Trained:
    """A finished run, its model still in memory, and the model's state dict as training met it."""

    run: Path
    model: Any
    tokenizer: Any
    start: dict[str, torch.Tensor]

    def rewards(self, items: list[dict[str, Any]]) -> list[float]:
        """Of the model in memory."""
        from rm_recipe import RewardModel

        return RewardModel(self.model.eval(), self.tokenizer).score(items).tolist()

    def saved(self) -> dict[str, torch.Tensor]:
        """What the run's file holds, by the names that the classifier itself gives."""
        from rm_recipe.model.head import saved_tensors

        found = saved_tensors(self.run / "model").items()
        return {key.removeprefix("base_model.model."): value for key, value in found}

    def started(self, name: str) -> torch.Tensor:
        """The start of a parameter of `saved`."""
        of_peft = r"^base_model\.model|\.modules_to_save\.default|(?<=_vector)\.default\.weight|\.default"
        return {re.sub(of_peft, "", key).removeprefix("."): own for key, own in self.start.items()}[name]


def ready_trainer(recipe: Any) -> Any:
    """The trainer of a recipe as it is before the preflight."""
    from rm_recipe.training.train import load_data, load_model, make_trainer

    tokenizer, *splits, _ = load_data(recipe)
    return make_trainer(recipe, tokenizer, *load_model(recipe, tokenizer), *splits)


@contextmanager
def each_trainer(look: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, a function is shown each trainer of `train` before it is used."""
    import rm_recipe.training.train as module

    make_trainer = module.make_trainer

    def make_and_show(*args: Any) -> Any:
        trainer = make_trainer(*args)
        look(trainer)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_trainer", make_and_show)
        yield


def train_watched(recipe: Path) -> Trained:
    """`rm_recipe.training.train.train`, keeping what it trained."""
    from rm_recipe.recipe.reader import read_recipe
    from rm_recipe.training.train import train

    parsed, kept = read_recipe(recipe), []

    def keep(trainer: Any) -> None:
        start = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
        kept.extend([trainer.model, trainer.processing_class, start])

    with each_trainer(keep):
        train(parsed)
    return Trained(parsed.output_dir, *kept)


@contextmanager
def filling_up(size: int) -> Iterator[Callable[..., None]]:
    """A function after which, within it, no file may grow further: what a full disk does, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda *_, **__: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FRESH_PROCESS = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr
from rm_recipe import RewardModel
for line in sys.stdin:
    folder, items = json.loads(line)
    rewards = RewardModel.from_pretrained(folder).score(items).tolist()
    print(json.dumps(rewards), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def rewards_elsewhere() -> Iterator[Callable[[Path, list[dict[str, Any]]], list[float]]]:
    """Rewards by the model in a folder, in another process, the same one for all folders."""
    command, pipe = [sys.executable, "-c", FRESH_PROCESS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(folder: Path, items: list[dict[str, Any]]) -> list[float]:
            print(json.dumps([str(folder), items]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())  # empty if it has failed: see standard error

        yield ask
        process.stdin.close()


def some_words(rng: random.Random, k: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(k))


def make_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Comparisons that can be learnt: the chosen reply says `good`, the rejected one `bad`."""
    rng, rows = random.Random(seed), []
    for number in range(seed * 1000, seed * 1000 + n):
        text = f"{some_words(rng, 3)} {number} {some_words(rng, rng.randrange(1, 6))}"
        chosen, rejected = (f"{some_words(rng, rng.randrange(1, 4))} {w} {w}" for w in ("good", "bad"))
        rows.append({"prompt": [{"role": "user", "content": text}], "chosen": chosen, "rejected": rejected})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def set_keys(path: Path, **keys: Any) -> None:
    """Of a file that holds a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def write_splits(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    """The folder, with its two files."""
    write_jsonl(folder / "train.jsonl", train)
    return write_jsonl(folder / "test.jsonl", test).parent


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 64 train and 40 test comparisons."""
    folder = tmp_path_factory.mktemp("data") / "preferences"
    return write_splits(folder, make_rows(64, seed=1), make_rows(40, seed=2))


def make_recipe(folder: Path, model: Path, data: Path, **keys: Any) -> Path:
    """Writes a recipe for a tiny model into a folder; keyword arguments win."""
    values = {"model_name_or_path": str(model), "dataset_name": str(data), "output_dir": str(folder / "run")}
    values |= {"use_peft": True, "lora_r": 4, "max_length": 128, "num_train_epochs": 2, "learning_rate": 1e-2}
    values |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "save_strategy": "no"}
    values |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 0, **keys}
    for key, idle in (("lora_r", keys.get("use_peft") is False), ("num_train_epochs", "max_steps" in keys)):
        if idle and key not in keys:
            del values[key]
    lines = (f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value != "omit")
    (folder / "recipe.yaml").write_text("".join(lines))
    return folder / "recipe.yaml"


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_llama: Path, tiny_data: Path) -> Callable[..., Path]:
    """`make_recipe` for the tiny Llama, in the test's folder."""
    return partial(make_recipe, tmp_path, tiny_llama, tiny_data)


@pytest.fixture(autouse=True)
def as_on_the_command_line() -> Iterator[None]:
    """What the package logs is printed, as by `cli.main`; log levels and handlers are put back."""
    from rm_recipe import cli

    logger = logging.getLogger("rm_recipe")
    before = logger.handlers, logger.level, logger.propagate
    cli.print_what_is_logged()
    logger.propagate = True  # for `caplog`
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """As if whoever started the tests ignored no signal, which `nohup` and `&` in a script do."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def flawed(tmp_path):
    """A folder of comparisons with one of each flaw."""
    words = partial(some_words, random.Random(0))
    turns = [{"role": role, "content": words(20)} for role in ("user", "assistant") * 3][:5]
    rows = [
        *make_rows(6, seed=1),
        {"prompt": "hello", "chosen": "", "rejected": "bad"},  # 7
        {"prompt": "hello", "chosen": "same", "rejected": "same "},  # 8
        {"prompt": "thanks", "chosen": words(90), "rejected": "bad"},  # 9: no truncation helps
        {"prompt": turns, "chosen": "good", "rejected": "bad"},  # 10: dropping turns helps
        {"prompt": words(90), "chosen": "good", "rejected": "bad"},  # 11: only cutting tokens would
        *make_rows(2, seed=1),  # the first two again
    ]
    folder = write_splits(tmp_path / "flawed", rows, [*make_rows(4, seed=2), make_rows(6, seed=1)[5]])
    return {"dataset_name": str(folder), "max_length": 80}


def run_cli(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`rm-recipe ARGUMENTS` in a process of its own, with more variables in its environment."""
    command = [sys.executable, "-m", "rm_recipe", *arguments]
    environment = {**os.environ, "COLUMNS": "80", **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=environment)
