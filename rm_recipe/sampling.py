"""Replies to score: drawn from a policy, or given in a file, several to each prompt.

What is drawn depends on policy, prompt, settings and seed alone, not on the prompts before, and each prompt
is written when it is finished: what was interrupted goes on where it stood and ends the same.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from rm_recipe import sft
from rm_recipe.artifacts import whole_file
from rm_recipe.errors import DataError, RecipeError, one_line
from rm_recipe.json_files import JSON, NUMBER, decode, load_json_rows
from rm_recipe.messages import Excluded, Malformed, Message, as_messages, check_prompt, check_unicode
from rm_recipe.modeling import quietly
from rm_recipe.preferences import is_comparison_shape, parse_row
from rm_recipe.tokenization import load_tokenizer, positions
from rm_recipe.weights import check_safetensors

AT_ONCE = 64  # replies that are drawn in one batch


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        policy: a language model's folder or Hub id, or that of an SFT adapter.
        n: replies to each prompt.
        temperature, top_p, top_k: 1, 1 and 0 draw from the policy as it is. Anything else draws from
            another one, and KL divergences are from that.
        max_new_tokens: where a reply that has not ended is cut.
    """

    policy: str
    n: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    seed: int = 0

    def check(self) -> None:
        """Raises RecipeError for settings with which nothing can be drawn."""
        faults = [
            ("--n", self.n, "2 or more: of one reply none is the best", self.n >= 2),
            ("--temperature", self.temperature, "above 0: all replies would be equal", self.temperature > 0),
            ("--top-p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("--top-k", self.top_k, "0, for no limit, or more", self.top_k >= 0),
            ("--max-new-tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1),
        ]
        wrong = [f"'{name} {value}' must be {what}" for name, value, what, good in faults if not good]
        if wrong:
            raise RecipeError("; ".join(wrong))


@dataclass(frozen=True)
class Sample:
    """A prompt and its replies.

    Attributes:
        is_safety: whether the prompt is marked as one that may bring an unsafe reply (Llama 2).
        cut: how many replies were cut at `max_new_tokens`; None where that is not known.
    """

    prompt: list[Message]
    responses: list[str]
    is_safety: bool = False
    cut: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The line of a samples file."""
        line: dict[str, Any] = {"prompt": self.prompt, "responses": self.responses}
        line |= {"is_safety": True} if self.is_safety else {}
        return line | ({"cut": self.cut} if self.cut is not None else {})


# --- files -----------------------------------------------------------------------------------


def read_prompts(file: Path) -> list[Sample]:
    """The prompts of a .jsonl or .json file (.gz too), without replies, each once.

    A row has a `prompt` (a text or messages), or is a comparison of any shape that training takes.

    Raises:
        DataError: naming file and row.
    """
    found: dict[str, Sample] = {}
    for number, row in _rows(file):
        try:
            if row.get("prompt") is None and is_comparison_shape(row):
                prompt = parse_row(row).prompt
            else:
                prompt = _prompt(row)
        except Excluded as excluded:
            raise DataError(f"{file}, row {number}: {excluded.reason.replace('_', ' ')}") from None
        except Malformed as fault:
            raise DataError(f"{file}, row {number}: {fault}") from None
        found.setdefault(json.dumps(prompt), Sample(prompt, [], bool(row.get("is_safety"))))
    return list(found.values())


def read_samples(file: Path) -> list[Sample]:
    """Replies that are given, gathered by prompt.

    A row has a `prompt` and its `responses`, as `sample` writes them, or one `response`.

    Raises:
        DataError: naming file and row.
    """
    found: dict[str, Sample] = {}
    for number, row in _rows(file):
        texts = row["responses"] if row.get("responses") is not None else [row.get("response")]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{file}, row {number}: expected a 'prompt' and its 'responses', a list of texts, or one "
                "'response'"
            )
        try:
            prompt = _prompt(row)
            check_unicode(texts)
        except Excluded as excluded:
            raise DataError(f"{file}, row {number}: {excluded.reason.replace('_', ' ')}") from None
        except Malformed as fault:
            raise DataError(f"{file}, row {number}: {fault}") from None
        cut = row.get("cut")
        new = Sample(prompt, texts, bool(row.get("is_safety")), cut if isinstance(cut, int) else None)
        before = found.get(json.dumps(prompt))
        if before is not None:
            known = None if before.cut is None or new.cut is None else before.cut + new.cut
            new = replace(before, responses=[*before.responses, *texts], cut=known)
        found[json.dumps(prompt)] = new
    return list(found.values())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.is_file():
        raise DataError(f"{file}: {'no such file' if not file.exists() else 'not a file'}")
    try:
        rows = load_json_rows(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    for row in rows:
        try:
            yield row[NUMBER], decode(row[JSON])
        except ValueError as error:
            raise DataError(f"{file}, row {row[NUMBER]}: {error}") from None


def _prompt(row: dict[str, Any]) -> list[Message]:
    if row.get("prompt") is None:
        raise Malformed("prompt", "a text or a list of messages", None)
    prompt = as_messages(row["prompt"])
    check_prompt(prompt)
    check_unicode([message["content"] for message in prompt])
    return prompt


# --- drawing ---------------------------------------------------------------------------------


def sample(sampling: Sampling, prompts: Sequence[Sample], target: Path, *, overwrite: bool) -> list[Sample]:
    """Draws replies to each prompt, and writes them to a file as they come.

    What the file holds of the same settings already is taken from it.

    Args:
        target: a .jsonl file; beside it goes `target` with the ending .sampling.json, the settings.
        overwrite: whether replies of other settings that lie there may be replaced.

    Returns:
        the prompts with their replies, in order.

    Raises:
        RecipeError: the policy cannot be loaded or has no room for a prompt, or the file holds replies of
            other settings.
    """
    sampling.check()
    there = _already_there(sampling, target, overwrite)
    missing = [prompt for prompt in prompts if json.dumps(prompt.prompt) not in there]
    if missing:
        with _policy(sampling) as (model, tokenizer), target.open("a", encoding="utf-8") as file:
            texts = [_rendered(tokenizer, prompt, sampling, model.config) for prompt in missing]
            for prompt, ids in zip(tqdm(missing, desc="Drawing replies", unit="prompt"), texts, strict=True):
                drawn = _draw(model, tokenizer, sampling, prompt, ids)
                there[json.dumps(prompt.prompt)] = drawn
                file.write(json.dumps(drawn.as_dict(), ensure_ascii=False) + "\n")
                file.flush()
    return [replace(there[json.dumps(prompt.prompt)], is_safety=prompt.is_safety) for prompt in prompts]


def settings_file(target: Path) -> Path:
    """Where the settings stand with which a samples file was drawn."""
    return target.with_suffix(".sampling.json")


def _already_there(sampling: Sampling, target: Path, overwrite: bool) -> dict[str, Sample]:
    """What a file holds of these settings; a line that a kill left half-written is removed."""
    ours, beside = asdict(sampling), settings_file(target)
    theirs = None
    if beside.is_file() and target.is_file():
        try:
            theirs = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError:
            theirs = {}
    lines: list[str] = []
    if theirs == ours:
        lines = target.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    elif target.exists() and not overwrite:
        differing = [key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key]]
        raise RecipeError(
            f"{target} holds replies that were drawn otherwise ({', '.join(differing)} differ); --samples "
            "takes them as they are, --overwrite draws new ones in their place, --output takes another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(beside) as partial:
        partial.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
    with whole_file(target) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if not lines:
        return {}
    return {json.dumps(found.prompt): found for found in read_samples(target)}


@contextmanager
def _policy(sampling: Sampling) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """The language model, on the device that there is, and its tokenizer."""
    tokenizer = load_tokenizer(sampling.policy)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with sft.as_one_model(sampling.policy) as folder:
        check_safetensors(folder)
        try:
            with quietly():
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder, dtype="auto", trust_remote_code=False, use_safetensors=True,
                    output_loading_info=True,
                )  # fmt: skip
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RecipeError(
                f"'--policy {sampling.policy}' cannot be loaded as a language model: {one_line(error)}"
            ) from None
        if info["missing_keys"]:
            raise RecipeError(
                f"'--policy {sampling.policy}' is no language model: it has no "
                f"{', '.join(sorted(info['missing_keys'])[:3])}"
            )
        ends = model.generation_config.eos_token_id
        # In place of the model's own settings, of which generate would take what ours leave out.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens, eos_token_id=_ends(ends, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        yield model.to(device).eval(), tokenizer


def _ends(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the model's, and the one that its tokenizer calls EOS."""
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    return sorted(ends)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: Sample, sampling: Sampling, config: Any
) -> list[int]:
    """A prompt as the policy reads it, up to where its reply begins.

    Raises:
        RecipeError: the policy's template refuses it, or it leaves no room for a reply.
    """
    try:
        text = tokenizer.apply_chat_template(prompt.prompt, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        what = f"the policy's chat template takes no such prompt ({prompt.prompt[-1]['content'][:60]!r})"
        raise RecipeError(f"{what}: {error}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = positions(config)
    if limit is not None and len(ids) + sampling.max_new_tokens > limit:
        raise RecipeError(
            f"a prompt of {len(ids)} tokens and {sampling.max_new_tokens} new ones exceed the policy's "
            f"{limit} positions ({prompt.prompt[-1]['content'][:60]!r}): leave it out, or lower "
            "--max-new-tokens"
        )
    return ids


def _draw(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, prompt: Sample, ids: list[int]
) -> Sample:
    key = f"{sampling.seed} {json.dumps(prompt.prompt)}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
    responses: list[str] = []
    cut, ends = 0, set(model.generation_config.eos_token_id)
    inputs = torch.tensor([ids], device=model.device)
    while len(responses) < sampling.n:
        k = min(AT_ONCE, sampling.n - len(responses))
        with torch.inference_mode():
            output = model.generate(inputs, attention_mask=torch.ones_like(inputs), num_return_sequences=k)
        for tokens in output[:, len(ids) :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in ends), None)
            cut += end is None
            responses.append(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return replace(prompt, responses=responses, cut=cut)
