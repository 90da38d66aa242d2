"""Tiny random models, a tiny tokenizer and small preference files; no test needs the network."""

import atexit
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Caches of tiny data sets that no later run meets again do not belong into the user's.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rm-recipe-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import datasets
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

REPOSITORY = Path(__file__).parent.parent
HH_RLHF = REPOSITORY.parent / "shared" / "data" / "hh-rlhf"
needs_hh_rlhf = pytest.mark.skipif(
    not HH_RLHF.is_dir(), reason="the development copy of hh-rlhf is not beside the repository"
)
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
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a tokenizer, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), **{**TINY_DECODER, "max_position_embeddings": 512})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random DistilBERT with a BertTokenizer, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", ".", "?", "!", "user", "assistant", *WORDS]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    config = DistilBertConfig(
        vocab_size=len(tokens), dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    DistilBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base_of(
    kind: type, config: type[PretrainedConfig], sizes: dict[str, Any], **more: Any
) -> Callable[[int], Any]:
    """A function of the vocabulary's size: what to make the base from, and its configuration."""
    return lambda size: (kind, config(vocab_size=size, **sizes, **more))


# What a base checkpoint of each kind is, without a classification head.
TINY_BASES = {
    "llama": base_of(AutoModelForCausalLM, LlamaConfig, TINY_DECODER),
    "qwen2": base_of(AutoModelForCausalLM, Qwen2Config, TINY_DECODER, tie_word_embeddings=True),
    "mistral": base_of(AutoModelForCausalLM, MistralConfig, TINY_DECODER, sliding_window=128),
    "mistral-short": base_of(AutoModelForCausalLM, MistralConfig, TINY_DECODER, sliding_window=16),
    "gpt2": base_of(AutoModelForCausalLM, GPT2Config, TINY_GPT2),
    "bert": base_of(AutoModelForMaskedLM, BertConfig, TINY_ENCODER),
    "distilbert": base_of(AutoModelForMaskedLM, DistilBertConfig, TINY_DISTILBERT),
    "deberta": base_of(AutoModel, DebertaV2Config, TINY_DEBERTA),
}
TINY_ENCODERS = ("bert", "distilbert", "deberta")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_distilbert: Path) -> Callable[[str], Path]:
    """The folder of a two-layer random model of a kind of `TINY_BASES`, with a fitting tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            encoder = name in TINY_ENCODERS
            tokenizer = AutoTokenizer.from_pretrained(tiny_distilbert) if encoder else make_tokenizer()
            kind, config = TINY_BASES[name](len(tokenizer))
            torch.manual_seed(0)
            kind.from_config(config).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        return root / name

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

        tensors = saved_tensors(self.run / "model")
        return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}

    def started(self, name: str) -> torch.Tensor:
        """The start of a parameter of `saved`."""
        for key, value in self.start.items():
            plain = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
            plain = plain.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
            if plain.replace(".default.", ".") == name:
                return value
        raise KeyError(name)


def ready_trainer(recipe: Any) -> Any:
    """The trainer of a recipe as it is before the preflight."""
    from rm_recipe.training.train import load_data, load_model, make_trainer

    tokenizer, *splits, _ = load_data(recipe)
    return make_trainer(recipe, tokenizer, *load_model(recipe, tokenizer), *splits)


def train_watched(recipe: Path) -> Trained:
    """`rm_recipe.training.train.train`, keeping what it trained."""
    import rm_recipe.training.train
    from rm_recipe.recipe.reader import read_recipe

    make_trainer, kept = rm_recipe.training.train.make_trainer, []

    def watch(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        start = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
        kept.append((trainer.model, trainer.processing_class, start))
        return trainer

    parsed = read_recipe(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm_recipe.training.train, "make_trainer", watch)
        rm_recipe.training.train.train(parsed)
    return Trained(parsed.output_dir, *kept[0])


FRESH_PROCESS = """
import json, os, sys
answers, sys.stdout = sys.stdout, sys.stderr
from rm_recipe import RewardModel
for line in sys.stdin:
    folder, items = json.loads(line)
    try:
        answer = RewardModel.from_pretrained(folder).score(items).tolist()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def rewards_elsewhere() -> Iterator[Callable[[Path, list[dict[str, Any]]], list[float]]]:
    """Rewards by the model in a folder, in another process, the same one for all folders."""
    with subprocess.Popen(
        [sys.executable, "-c", FRESH_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(folder: Path, items: list[dict[str, Any]]) -> list[float]:
            print(json.dumps([str(folder), items]), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            if isinstance(answer, str):
                pytest.fail(f"in a fresh process: {answer}", pytrace=False)
            return answer

        yield ask
        process.stdin.close()


def make_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Comparisons that can be learnt: the chosen reply says `good`, the rejected one `bad`."""
    rng = random.Random(seed)

    def words(k: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(k))

    return [
        {
            "prompt": [{"role": "user", "content": f"{words(3)} {number} {words(rng.randrange(1, 6))}"}],
            "chosen": f"{words(rng.randrange(1, 4))} good good",
            "rejected": f"{words(rng.randrange(1, 4))} bad bad",
        }
        for number in range(seed * 1000, seed * 1000 + n)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 64 train and 40 test comparisons."""
    folder = tmp_path_factory.mktemp("data") / "preferences"
    write_jsonl(folder / "train.jsonl", make_rows(64, seed=1))
    write_jsonl(folder / "test.jsonl", make_rows(40, seed=2))
    return folder


def make_recipe(folder: Path, model: Path, data: Path, **keys: Any) -> Path:
    """Writes a recipe for a tiny model into a folder; keyword arguments win."""
    values = {"model_name_or_path": str(model), "dataset_name": str(data), "output_dir": str(folder / "run")}
    values |= {"use_peft": True, "lora_r": 4, "max_length": 128, "num_train_epochs": 2, "learning_rate": 1e-2}
    values |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "save_strategy": "no"}
    values |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 0, **keys}
    for key, idle in (("lora_r", keys.get("use_peft") is False), ("num_train_epochs", "max_steps" in keys)):
        if idle and key not in keys:
            del values[key]
    path = folder / "recipe.yaml"
    lines = (f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value != "omit")
    path.write_text("".join(lines))
    return path


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
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

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
    test = [*make_rows(4, seed=2), make_rows(6, seed=1)[5]]
    write_jsonl(tmp_path / "flawed" / "train.jsonl", rows)
    write_jsonl(tmp_path / "flawed" / "test.jsonl", test)
    return {"dataset_name": str(tmp_path / "flawed"), "max_length": 80}


def run_cli(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`rm-recipe ARGUMENTS` in a process of its own, with more variables in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "rm_recipe", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={**os.environ, "COLUMNS": "80", **variables},
    )


@contextmanager
def hf_datasets_without_cache() -> Iterator[None]:
    """Within it, nothing that `datasets` computed before is used again."""
    datasets.disable_caching()
    try:
        yield
    finally:
        datasets.enable_caching()
