"""Prompts and replies to them, from files or drawn from a policy, several replies to each prompt."""

import hashlib
import json
from collections import Counter
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

from rm_recipe.data.comparison import (
    Excluded,
    Malformed,
    Message,
    as_messages,
    as_reply,
    check_prompt,
    check_unicode,
    in_context,
)
from rm_recipe.data.formats import parse_row, shapes_of
from rm_recipe.data.loading import read_rows, unit
from rm_recipe.errors import DataError, RecipeError, one_line
from rm_recipe.evaluation.evaluate import weights_of
from rm_recipe.files import read_json, redacted, whole_file, write_json
from rm_recipe.model.reward_model import as_one_model, quietly
from rm_recipe.model.source import check_safetensors, load_config
from rm_recipe.model.tokenizer import load_tokenizer, positions
from rm_recipe.processes import this_device


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

    @property
    def key(self) -> str:
        """What tells the prompt from others."""
        return json.dumps(self.prompt)


def read_prompts(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """Read the prompts of a .jsonl or .json file (.gz too), without replies, each once.

    A row has a `prompt` (a text or messages), or is a comparison of any shape that training takes.

    Args:
        most: so many are read, the first ones.

    Returns:
        the prompts, and the count of the rows that are none, by reason.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    return _read(file, most, replies=False)


def read_samples(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """Read replies that are given, gathered by prompt; as `read_prompts`.

    A row has a `prompt` and its `responses`, as `sample` writes them, or one `response`.
    """
    return _read(file, most, replies=True)


def _read(file: Path, most: int | None, *, replies: bool) -> tuple[list[Sample], Counter[str]]:
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        try:
            new = _parse(row, replies=replies)
        except Excluded as reason:
            excluded[reason.reason] += 1
            continue
        except Malformed as fault:
            raise DataError(f"{file}, {unit(file)} {number}: {fault}") from None
        if row.get("tools") or any(
            "tool_calls" in message for message in new.prompt
        ):  # no policy is given them
            excluded["tools"] += 1
            continue
        before = found.get(new.key)
        if before is not None:
            cut = None if before.cut is None or new.cut is None else before.cut + new.cut
            new = replace(before, responses=before.responses + new.responses, cut=cut)
        found[new.key] = new
        if len(found) == most and not replies:  # replies to the first prompts may come later
            break
    if not found:
        raise DataError(f"{file} holds no prompt that can be used")
    return list(found.values())[:most], excluded


def _parse(row: dict[str, Any], *, replies: bool) -> Sample:
    """The prompt of a row, with its replies or without.

    Raises:
        Excluded: it is one that training would leave out.
        Malformed: it has not what is asked for.
    """
    is_safety = bool(row.get("is_safety"))
    if row.get("prompt") is None:
        if replies or not shapes_of(row):
            raise Malformed("prompt", "a text or a list of messages", None)
        return Sample(parse_row(row).prompt, [], is_safety)
    texts: Any = row["responses"] if row.get("responses") is not None else [row.get("response")]
    if replies and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise Malformed("responses", "a list of texts (or 'response' one text)", texts)
    prompt = in_context(as_messages(row["prompt"]), row)
    check_prompt(prompt)
    check_unicode([message["content"] for message in prompt])
    if not replies:
        return Sample(prompt, [], is_safety)
    check_unicode(texts)
    cut = row["cut"] if isinstance(row.get("cut"), int) else None
    return Sample(prompt, [as_reply(row["prompt"], text) for text in texts], is_safety, cut)


# --- replies drawn from a policy, several to each prompt ---------------------------------------
# What is drawn depends on policy, prompt, settings and seed alone, not on the prompts before, and each prompt
# is written when it is finished: what was interrupted goes on where it stood and ends the same.

AT_ONCE = 64  # replies that are drawn in one batch
GENERATION = ("temperature", "top_p", "top_k", "max_new_tokens")  # settings that `generate` knows


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
        faults = {
            f"'--n {self.n}' must be 2 or more: of one reply none is the best": self.n < 2,
            f"'--temperature {self.temperature}' must be above 0": self.temperature <= 0,
            f"'--top-p {self.top_p}' must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"'--top-k {self.top_k}' must be 0, for no limit, or more": self.top_k < 0,
            f"'--max-new-tokens {self.max_new_tokens}' must be 1 or more": self.max_new_tokens < 1,
        }
        if any(faults.values()):
            raise RecipeError("; ".join(fault for fault, found in faults.items() if found))


def sample(
    sampling: Sampling, prompts: Sequence[Sample], target: Path, *, overwrite: bool
) -> tuple[list[Sample], Counter[str]]:
    """Draw replies to each prompt, and write them to a file as they come.

    What the file holds already, of the same settings and the same weights, is taken from it.

    Args:
        target: a .jsonl file; beside it goes one with the ending .sampling.json, the settings.
        overwrite: draw all anew, in the place of what is there.

    Returns:
        the prompts with their replies, in order; and the count of those that the policy cannot read.

    Raises:
        RecipeError: the policy cannot be loaded, or the file holds replies of other settings; what is there
            stays.
        DataError: the policy can read no prompt.
    """
    sampling.check()
    settings = redacted({**asdict(sampling), "weights": weights_of(sampling.policy)})
    excluded: Counter[str] = Counter()
    drawn, encoded = [], {}
    with _policy(sampling) as (model, tokenizer):
        for prompt in prompts:
            try:
                encoded[prompt.key] = _encode(tokenizer, prompt, sampling, model)
            except Excluded as reason:
                excluded[reason.reason] += 1
        if not encoded:
            raise DataError(f"the policy can read no prompt: {', '.join(excluded)}")
        there = _already_there(settings, target, overwrite)
        readable = [prompt for prompt in prompts if prompt.key in encoded]
        with target.open("a", encoding="utf-8") as file:
            for prompt in tqdm(readable, desc="Drawing replies", unit="prompt"):
                known = there.get(prompt.key)
                if known is None:
                    known = _draw(model, tokenizer, sampling, prompt, encoded[prompt.key])
                    file.write(json.dumps(asdict(known), ensure_ascii=False) + "\n")
                    file.flush()
                drawn.append(replace(known, is_safety=prompt.is_safety))
    return drawn, excluded


def _already_there(settings: dict[str, Any], target: Path, overwrite: bool) -> dict[str, Sample]:
    """What a file holds of these settings; a line that a kill left half-written is removed.

    Raises:
        RecipeError: it holds replies of others.
    """
    beside, lines = target.with_suffix(".sampling.json"), ""
    if target.is_file() and not overwrite:
        theirs = read_json(beside) if beside.is_file() else {}
        differing = [key for key in settings if theirs.get(key) != settings[key]]
        if differing:
            raise RecipeError(
                f"{target} has replies that were drawn otherwise ({', '.join(differing)} differ): --samples "
                "takes them as they are, --overwrite draws new ones, --output takes another folder"
            )
        whole, newline, _ = target.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        lines = whole + newline
    with whole_file(target) as partial:  # before the settings, which would make old replies new ones
        partial.write_text(lines, encoding="utf-8")
    write_json(beside, settings)
    return {one.key: one for one in read_samples(target)[0]} if lines else {}


@contextmanager
def _policy(sampling: Sampling) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """The language model, on the device that there is, and its tokenizer."""
    tokenizer = load_tokenizer(sampling.policy, of_base=True)
    with as_one_model(sampling.policy) as folder:
        check_safetensors(folder)
        try:
            kinds = load_config(folder).architectures or []
            if any(kind.endswith("Classification") for kind in kinds):
                raise ValueError(f"it is a {', '.join(kinds)}")
            with quietly():
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder, dtype="auto", use_safetensors=True, output_loading_info=True
                )
            if info["missing_keys"]:
                raise ValueError(f"it has no {', '.join(sorted(info['missing_keys'])[:3])}")
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise RecipeError(
                f"'--policy {sampling.policy}' cannot be loaded as a language model: {one_line(error)}"
            ) from None
        # The tokens that end a reply are the model's, and the one that its tokenizer calls EOS.
        known = model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
        settings = {key: value for key, value in asdict(sampling).items() if key in GENERATION}
        settings |= {"eos_token_id": sorted(ends), "pad_token_id": min(ends, default=0)}  # one that it has
        # In place of the model's own settings, of which generate would take what ours leave out.
        model.generation_config = GenerationConfig(do_sample=True, **settings)
        yield model.to(this_device()).eval(), tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Sample, sampling: Sampling, model: Any) -> list[int]:
    """A prompt as the policy reads it, up to where its reply begins.

    Raises:
        Excluded: `refused_by_policys_template`, or `too_long_for_policy` with the reply.
    """
    try:
        text = tokenizer.apply_chat_template(prompt.prompt, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):
        raise Excluded("refused_by_policys_template") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = positions(model)
    if limit is not None and len(ids) + sampling.max_new_tokens > limit:
        raise Excluded("too_long_for_policy")
    return ids


def _draw(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, prompt: Sample, ids: list[int]
) -> Sample:
    key = f"{sampling.seed} {prompt.key}".encode()
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
