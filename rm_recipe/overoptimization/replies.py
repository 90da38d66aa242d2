"""Prompts and replies to them, from files, several replies to each prompt."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from rm_recipe.data.formats import is_comparison_shape, parse_row
from rm_recipe.data.loading import read_rows, unit
from rm_recipe.data.messages import (
    Excluded,
    Malformed,
    Message,
    as_messages,
    as_reply,
    check_prompt,
    check_unicode,
    in_context,
)
from rm_recipe.errors import DataError, RecipeError, one_line
from rm_recipe.files import read_json, redacted, whole_file, write_json
from rm_recipe.model import reward_model
from rm_recipe.model.reward_model import quietly
from rm_recipe.model.source import check_safetensors, load_config
from rm_recipe.model.tokenizer import load_tokenizer, positions
from rm_recipe.processes import this_device
from rm_recipe.recipe.schema import looks_local


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


def read_prompts(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """The prompts of a .jsonl or .json file (.gz too), without replies, each once; and what was left out.

    A row has a `prompt` (a text or messages), or is a comparison of any shape that training takes.

    Args:
        most: so many are read, the first ones.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        with _row(file, number, excluded):
            if row.get("prompt") is None and is_comparison_shape(row):
                prompt = parse_row(row).prompt
            else:
                prompt = _prompt(row)
            found.setdefault(json.dumps(prompt), Sample(prompt, [], bool(row.get("is_safety"))))
        if len(found) == most:
            break
    return _some(file, found), excluded


def read_samples(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """Replies that are given, gathered by prompt; and what was left out.

    A row has a `prompt` and its `responses`, as `sample` writes them, or one `response`.

    Args:
        most: so many prompts are taken, the first ones.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        texts = row["responses"] if row.get("responses") is not None else [row.get("response")]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{file}, {unit(file)} {number}: expected a 'prompt' and its 'responses', a list of texts, "
                "or one 'response'"
            )
        with _row(file, number, excluded):
            prompt = _prompt(row)
            check_unicode(texts)
            replies = [as_reply(row["prompt"], str(text)) for text in texts]
            cut = row.get("cut")
            new = Sample(prompt, replies, bool(row.get("is_safety")), cut if isinstance(cut, int) else None)
            before = found.get(json.dumps(prompt))
            if before is not None:
                known = None if before.cut is None or new.cut is None else before.cut + new.cut
                new = replace(before, responses=[*before.responses, *replies], cut=known)
            found[json.dumps(prompt)] = new
    return _some(file, found)[:most], excluded


@contextmanager
def _row(file: Path, number: int, excluded: Counter[str]) -> Iterator[None]:
    """Within it, a row that is no prompt is counted, and a fault of the file is named."""
    try:
        yield
    except Excluded as reason:
        excluded[reason.reason] += 1
    except Malformed as fault:
        raise DataError(f"{file}, {unit(file)} {number}: {fault}") from None


def _some(file: Path, found: dict[str, Sample]) -> list[Sample]:
    if not found:
        raise DataError(f"{file} holds no prompt that can be used")
    return list(found.values())


def _prompt(row: dict[str, Any]) -> list[Message]:
    if row.get("prompt") is None:
        raise Malformed("prompt", "a text or a list of messages", None)
    prompt = in_context(as_messages(row["prompt"]), row)
    check_prompt(prompt)
    check_unicode([message["content"] for message in prompt])
    return prompt


# --- replies drawn from a policy, several to each prompt ---------------------------------------
# What is drawn depends on policy, prompt, settings and seed alone, not on the prompts before, and each prompt
# is written when it is finished: what was interrupted goes on where it stood and ends the same.

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


def sample(
    sampling: Sampling, prompts: Sequence[Sample], target: Path, *, overwrite: bool
) -> tuple[list[Sample], Counter[str]]:
    """Draws replies to each prompt, and writes them to a file as they come.

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
    if looks_local(sampling.policy) and not Path(sampling.policy).exists():
        raise RecipeError(f"'--policy {sampling.policy}' does not exist")
    excluded: Counter[str] = Counter()
    with _policy(sampling) as (model, tokenizer):
        texts: dict[str, list[int]] = {}
        for prompt in prompts:
            try:
                texts[json.dumps(prompt.prompt)] = _rendered(tokenizer, prompt, sampling, model)
            except Excluded as reason:
                excluded[reason.reason] += 1
        if not texts:
            raise DataError(f"the policy can read no prompt: {', '.join(excluded)}")
        there = _already_there({**asdict(sampling), "weights": fingerprint(model)}, target, overwrite)
        readable = [prompt for prompt in prompts if json.dumps(prompt.prompt) in texts]
        missing = [prompt for prompt in readable if json.dumps(prompt.prompt) not in there]
        with target.open("a", encoding="utf-8") as file:
            for prompt in tqdm(missing, desc="Drawing replies", unit="prompt", disable=not missing):
                key = json.dumps(prompt.prompt)
                there[key] = _draw(model, tokenizer, sampling, prompt, texts[key])
                file.write(json.dumps(there[key].as_dict(), ensure_ascii=False) + "\n")
                file.flush()
    drawn = [replace(there[json.dumps(prompt.prompt)], is_safety=prompt.is_safety) for prompt in readable]
    return drawn, excluded


def settings_file(target: Path) -> Path:
    """Where the settings stand with which a samples file was drawn."""
    return target.with_suffix(".sampling.json")


def fingerprint(model: Any) -> str:
    """A hash of a model's weights: one that is trained on has others under the same name."""
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _already_there(settings: dict[str, Any], target: Path, overwrite: bool) -> dict[str, Sample]:
    """What a file holds of these settings; a line that a kill left half-written is removed.

    Raises:
        RecipeError: it holds replies of others.
    """
    ours, beside = redacted(settings), settings_file(target)
    theirs: dict[str, Any] = {}
    if beside.is_file() and target.is_file():
        with suppress(RecipeError):
            theirs = read_json(beside)
    lines: list[str] = []
    if theirs == ours and not overwrite:
        lines = target.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    elif target.exists() and target.stat().st_size and not overwrite:
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        raise RecipeError(
            f"{target} holds replies that were drawn otherwise ({', '.join(differing)} differ); --samples "
            "takes them as they are, --overwrite draws new ones in their place, --output takes another folder"
        )
    with whole_file(target) as partial:  # before the settings, which would make old replies new ones
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(beside, ours)
    return {json.dumps(one.prompt): one for one in read_samples(target)[0]} if lines else {}


@contextmanager
def _policy(sampling: Sampling) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """The language model, on the device that there is, and its tokenizer."""
    tokenizer = load_tokenizer(sampling.policy, of_base=True)
    device = this_device()
    with reward_model.as_one_model(sampling.policy) as folder:
        check_safetensors(folder)
        kinds = load_config(folder).architectures or []
        if any(kind.endswith("Classification") for kind in kinds):
            raise RecipeError(f"'--policy {sampling.policy}' is no language model but a {', '.join(kinds)}")
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
        ends = _ends(model.generation_config.eos_token_id, tokenizer)
        # In place of the model's own settings, of which generate would take what ours leave out.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens, eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,  # one that the model has; what follows an end is cut
        )  # fmt: skip
        yield model.to(device).eval(), tokenizer


def _ends(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the model's, and the one that its tokenizer calls EOS."""
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    return sorted(ends)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: Sample, sampling: Sampling, model: Any
) -> list[int]:
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
    key = f"{sampling.seed} {json.dumps(prompt.prompt)}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
    responses: list[str] = []
    cut, ends = 0, set(model.generation_config.eos_token_id or [])
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
