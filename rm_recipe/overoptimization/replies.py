"""Prompts and replies to them, from files or drawn from a policy, several replies to each prompt."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from rm_recipe.data.comparison import Excluded, Malformed, Message, as_reply, check_unicode
from rm_recipe.data.formats import ALSO_READ, PROMPT_PARTS, parse_row, shapes_of
from rm_recipe.data.loading import read_rows, unit
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.model.lora import load_config, readable
from rm_recipe.model.reward_model import as_one_model, check_safetensors, quietly
from rm_recipe.model.tokenizer import load_tokenizer, positions
from rm_recipe.processes import this_device
from rm_recipe.scoring import find_model


@dataclass(frozen=True)
class Sample:
    """A prompt and its replies.

    Attributes:
        cut: how many replies were cut at `max_new_tokens`; None where that is not known.
    """

    prompt: list[Message]
    responses: list[str]
    cut: int | None = None

    @property
    def key(self) -> str:
        """What tells the prompt from others."""
        return json.dumps(self.prompt)


# Prompts, and how many are left out, by reason.
Found = tuple[list[Sample], Counter[str]]


def read_samples(file: Path, most: int | None = None, *, replies: bool = True) -> Found:
    """Read prompts and replies to them from a data file (`data.loading.read_rows`), gathered by prompt.

    A row has a `prompt` (a text or messages) and its `responses`, as `sample` writes them, or one `response`.

    Args:
        most: so many prompts are read, the first ones.
        replies: without them a row is a prompt alone, or a comparison of any shape that training takes.

    Returns:
        the prompts, and the count of the rows that are left out, by reason.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        try:
            new = _parse(row, replies)
        except Excluded as reason:
            excluded[reason.reason] += 1
            continue
        except Malformed as fault:
            raise DataError(f"{file}, {unit(file)} {number}: {fault}") from None
        called = any("tool_calls" in message for message in new.prompt)
        if row.get("tools") or called:  # which no policy is given
            excluded["tools"] += 1
            continue
        if before := found.get(new.key):
            new = Sample(new.prompt, before.responses + new.responses)
        found[new.key] = new
        if len(found) == most and not replies:  # replies to the first prompts may come later
            break
    if not found:
        raise DataError(f"{file} holds no prompt that can be used")
    return list(found.values())[:most], excluded


def _parse(row: dict[str, Any], replies: bool) -> Sample:
    """The prompt of a row, with its replies or without.

    Raises:
        Excluded: it is one that training would leave out.
        Malformed: it has not what is asked for.
    """
    as_it_is = len(shapes_of(row)) == 1 and not replies
    if row.get("prompt") is None and not as_it_is:
        raise Malformed("prompt", "a text or a list of messages", None)
    texts = row.get("responses", [row.get("response")]) if replies else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Malformed("responses", "a list of texts (or 'response' one text)", texts)
    # A prompt is read as that of a comparison is: for want of another one, of this one.
    asked = {name: row.get(name) for name in (*ALSO_READ, *PROMPT_PARTS["prompt"])}
    asked |= {"chosen": "yes", "rejected": "no"}
    prompt = parse_row(row if as_it_is else asked).prompt
    check_unicode(texts)
    cut = row["cut"] if isinstance(row.get("cut"), int) else None
    return Sample(prompt, [as_reply(row["prompt"], text) for text in texts], cut)


# --- replies drawn from a policy, several to each prompt ---------------------------------------
# What is drawn depends on policy, prompt, settings and seed alone, not on the prompts before.

AT_ONCE = 64  # replies that are drawn in one batch


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        policy: a language model's folder or Hub id, or that of an SFT adapter.
        n: replies to each prompt.
        temperature: 1 draws from the policy as it is. Anything else draws from another one, and KL
            divergences are from that.
        max_new_tokens: where a reply that has not ended is cut.
    """

    policy: str
    n: int = 32
    temperature: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


def sample(sampling: Sampling, prompts: Sequence[Sample], target: Path) -> Found:
    """Draw replies to each prompt, and write them to a .jsonl file as they come.

    Returns:
        the prompts with their replies, in order; and the count of those that the policy cannot read.

    Raises:
        RecipeError: the policy cannot be loaded, or there are replies already, which may have taken an hour.
        DataError: the policy can read no prompt.
    """
    if target.exists() and target.stat().st_size:  # whoever was interrupted before the first has none
        raise RecipeError(
            f"{target} holds replies already: --samples {target} takes them as they are; to draw others, "
            "give another --output or remove the file"
        )
    excluded: Counter[str] = Counter()
    drawn = []
    model, tokenizer = _policy(sampling)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for prompt in tqdm(prompts, desc="Drawing replies", unit="prompt"):
            try:
                ids = _encode(tokenizer, prompt, sampling, model)
            except Excluded as reason:
                excluded[reason.reason] += 1
                continue
            drawn.append(_draw(model, tokenizer, sampling, prompt, ids))
            file.write(json.dumps(asdict(drawn[-1]), ensure_ascii=False) + "\n")
            file.flush()  # for --samples, if this is interrupted
    if not drawn:
        raise DataError(f"the policy can read no prompt: {', '.join(excluded)}")
    return drawn, excluded


def _policy(sampling: Sampling) -> tuple[Any, PreTrainedTokenizerBase]:
    """The language model, on the device that there is, and its tokenizer."""
    tokenizer = load_tokenizer(find_model(sampling.policy), of_base=True)
    with as_one_model(sampling.policy) as folder, quietly():
        check_safetensors(folder)
        kinds = load_config(folder).architectures or []
        with readable(f"'--policy {sampling.policy}' cannot be loaded as a language model"):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
            faults = [f"is a {kind}" for kind in kinds if kind.endswith("Classification")]
            faults += [f"has no {key}" for key in sorted(info["missing_keys"])]
            if faults:
                raise ValueError(f"it {faults[0]}")
    # The tokens that end a reply are the model's, and the one that its tokenizer calls EOS.
    known = model.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    # In place of the model's own settings, of which generate would take what ours leave out.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends, default=0),
    )
    return model.to(this_device()).eval(), tokenizer


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
    if len(ids) + sampling.max_new_tokens > (positions(model) or float("inf")):
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
    for start in range(0, sampling.n, AT_ONCE):
        k = min(AT_ONCE, sampling.n - start)
        with torch.inference_mode():
            output = model.generate(inputs, attention_mask=torch.ones_like(inputs), num_return_sequences=k)
        for tokens in output[:, len(ids) :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in ends), None)
            cut += end is None
            responses.append(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return Sample(prompt.prompt, responses, cut)
