"""The proof that an export scores as what was evaluated: `proof.json`.

The same held-out conversations are scored at every step from the evaluated model to the files, and each step
has to agree with the one before. A step that only rewrites numbers (de-quantising, the merge in fp32, writing
and reading, another batch or padding) has to agree to fp32's own rounding. A step that rounds may move
rewards by what rounding was measured to do to this very model.
"""

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rm_recipe.data.chat_template import ppo_fault
from rm_recipe.data.comparison import Encoded, pairwise_agreement
from rm_recipe.data.dataset import Split
from rm_recipe.data.messages import Message, conversation
from rm_recipe.data.tokenization import render
from rm_recipe.errors import ExportError
from rm_recipe.files import read_json
from rm_recipe.model.head import is_float32
from rm_recipe.model.reward_model import quietly
from rm_recipe.scoring import RewardModel

N_SEQUENCES = 64  # at least, as far as there are as many
N_SERVED = 8  # of them also as texts, through the pipeline and TRL
FLOAT32 = 1e-5  # what fp32 may move a reward by ...
SUMS = 64  # ... or this many times what rounding to fp32 does, if that is more: sums in another order
# What rounding may do, in parts of what it was measured to do: the largest of a few differences is not the
# largest there is.
ROUNDINGS = 3
DRAWS = 4  # of weights moved at random; all sequences share a draw, so one would say little
PLAIN_SCORING = Path(__file__).with_name("plain_scoring.py")

ENCODER = (
    "PPO trainers apply a head called `score` to the last token, as decoders have it; this model has none"
)
UNSAMPLED = (
    "the replies tried begin within their prompt's last token or hold the pad token: no policy samples them"
)

# Whoever serves the model finds their rewards in the card, to compare.
SAMPLES = (
    ("How was your weekend?", "Great, we went hiking!"),
    ("How was your weekend?", "The invoice is due on Monday."),
    ("I burnt the rice again. What am I doing wrong?", "Too much heat: turn it right down."),
)

Rewards = NDArray[np.float32]


@dataclass
class HeldOut:
    """The conversations that every form of the model scores.

    Attributes:
        encoded: held-out comparisons as token ids.
        ranks: of their responses.
        names: of each response's sequence, in order, for messages.
        recorded: what the run's evaluation gave each sequence; NaN where it says nothing.
        whole: numbers of the first sequences that are not truncated, so that their text is known.
        texts: these as messages.
    """

    encoded: list[Encoded]
    ranks: list[list[int]]
    names: list[str]
    recorded: Rewards
    whole: list[int]
    texts: list[list[Message]]

    @classmethod
    def of(cls, split: Split, predictions: Sequence[dict[str, Any]] = ()) -> "HeldOut":
        """The first of a tokenised split, with what `predictions.jsonl` says of them."""
        lines = {line["index"]: line for line in predictions}
        found = cls([], [], [], np.empty(0, np.float32), [], [])
        recorded: list[float] = []
        for number, row in enumerate(split.comparisons):
            line = lines.get(number, {})
            same = (line.get("subset"), line.get("row")) == (row["subset"], row["row"])
            recorded += line["rewards"] if same else [np.nan] * len(row["rests"])
            is_whole = [len(row["prefix"]) + len(rest) for rest in row["rests"]] == row["lengths"]
            for k, messages in enumerate(split[number].conversations()):
                if len(found.whole) < N_SERVED and is_whole:
                    found.whole.append(len(found.names))
                    found.texts.append(messages)
                found.names.append(f"held-out comparison {number + 1}, response {k + 1} (best first)")
            found.encoded.append(Encoded(row["prefix"], row["rests"]))
            found.ranks.append(row["ranks"])
            if len(found.names) >= N_SEQUENCES:
                break
        found.recorded = np.array(recorded, np.float32)
        return found

    def sequences(self) -> list[list[int]]:
        """The token ids of each whole conversation."""
        return [ids for comparison in self.encoded for ids in comparison.conversations()]


class Proof:
    """Follows the rewards of `held_out` from step to step; raises ExportError at the first that moves them.

    Attributes:
        judge: the model as it is now.
        evaluated: its rewards at the start, `(sequences,)`; `now` those of the last step.
        float32: what a step may move rewards by that rounds nothing.
        rounding: what the steps that round may move them by, all in all.
        moved: by step the largest difference that it made.
    """

    def __init__(self, judge: RewardModel, held_out: HeldOut) -> None:
        self.judge, self.held_out = judge, held_out
        self.evaluated = self.now = self.rewards()
        self.float32, self.rounding = FLOAT32, 0.0
        self.moved: dict[str, float] = {}

    def rounding_to(self, body: torch.dtype, head: torch.dtype) -> float:
        """What writing the judge's weights so may move rewards by: as weights that are moved at random do."""
        if body == head == torch.float32:
            return 0.0
        moved = []
        for seed in range(DRAWS):
            with moved_weights(self.judge.model, body, head, seed):
                moved.append(largest(self.now, self.rewards()))
        return ROUNDINGS * max(moved)

    @property
    def tolerance(self) -> float:
        """What the whole way from the evaluation to the files may move a reward by."""
        return self.float32 + self.rounding

    def rewards(self) -> Rewards:
        """Of the judge as it is now, `(sequences,)`."""
        return np.concatenate(self.judge.score_encoded(self.held_out.encoded))

    def step(self, name: str, claim: str, rewards: Rewards, rounding: float = 0.0) -> None:
        """Goes on to these rewards, the judge's as it is now.

        Args:
            claim: what is wrong if they differ from those of the last step.
            rounding: what they may differ by beyond `float32`.
        """
        self.moved[name] = self.compare(claim, self.now, rewards, self.float32 + rounding)
        self.rounding += rounding
        self.now = rewards

    def measure_precision(self) -> None:
        """Goes on to the judge computing in fp32: the same weights, so the difference is rounding alone."""
        exact = self.rewards()
        self.step("precision", "", exact, largest(self.now, exact))
        self.measure_float32()

    def measure_float32(self) -> None:
        """Settles `float32`, in which the judge computes, by what inputs rounded to bf16 do to rewards."""
        with rounded_inputs(self.judge.model, layers_that_multiply(self.judge.model), to_bfloat16):
            moved = largest(self.now, self.rewards())
        bits = torch.finfo(torch.float32).eps / torch.finfo(torch.bfloat16).eps
        self.float32 = max(FLOAT32, SUMS * moved * bits)

    def compare(self, claim: str, before: Rewards, after: Rewards, allowed: float) -> float:
        """The largest difference.

        Raises:
            ExportError: it is more than `allowed`, with the sequence that moved most.
        """
        difference = np.abs(before.astype(float) - after)
        worst = int(difference.argmax())
        if not difference[worst] <= allowed:
            raise ExportError(
                f"{claim}: {self.held_out.names[worst]}, went from {before[worst]:.5g} to "
                f"{after[worst]:.5g}, by {difference[worst]:.2g} where {allowed:.2g} is allowed; nothing was "
                "exported"
            )
        return float(difference[worst])

    def check_recorded(self) -> None:
        """Compares what was evaluated with what the run's evaluation wrote down, as far as it did."""
        recorded = self.held_out.recorded
        known = ~np.isnan(recorded)
        if known.any():
            claim = (
                "the run no longer gives the rewards of its predictions.jsonl; has its base changed? If not, "
                "evaluate it anew"
            )
            before = np.where(known, recorded, self.evaluated)
            allowed = self.float32 + ROUNDINGS * self.rounding  # in other batches, perhaps on another device
            self.moved["recorded"] = self.compare(claim, before, self.evaluated, allowed)

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Scores with the files alone: what `proof.json` says of it all.

        Raises:
            ExportError: plain transformers, its pipeline or TRL gives other rewards.
        """
        samples, texts, expected = self._served()
        left, causal = pads_left(self.judge.model), reads_last_token(self.judge.model)
        reason = ppo_fault(self.judge.tokenizer) if causal else ENCODER
        end = self.judge.tokenizer.decode(self.held_out.sequences()[0][-1:])
        rendered = [render(self.judge.tokenizer, messages) for messages in texts]
        device = next(self.judge.model.parameters()).device
        self.let_go()
        answer = _score_anew(
            {
                "folder": str(folder),
                "sequences": self.held_out.sequences(),
                "left": left,
                "texts": rendered,
                "sampled": [] if reason else texts,
                "device": str(device),
            }
        )
        merged = self.now
        files, alone, batched = (np.array(answer[key], np.float32) for key in ("float32", "alone", "batched"))
        claim = "the files do not give the merged model's rewards"
        self.moved["files"] = self.compare(claim, merged, files, self.float32)
        served = ROUNDINGS * largest(files, alone)  # 0 unless plain transformers computes in half precision
        self.rounding += served
        allowed = self.float32 + served
        differences = {
            "merged": self.compare(
                "the merged model is not what was evaluated", self.evaluated, merged, self.tolerance
            ),
            "fresh_process": self.compare("a fresh process scores otherwise", merged, alone, allowed),
            "batch_size": self.compare("batches of 8 score otherwise", alone, batched, allowed),
            "padding_side": None,
        }
        if left:
            padded = np.array(answer["left"], np.float32)
            claim = "padding on the left scores otherwise"
            differences["padding_side"] = self.compare(claim, batched, padded, allowed)
        self._check_contracts(folder, answer, texts, expected, allowed, device)
        if not reason and not any(reward is not None for reward in answer["ppo"]):
            reason = UNSAMPLED
        ranks = self.held_out.ranks
        return {
            "n_sequences": len(alone),
            "n_comparisons": len(ranks),
            "tolerance": self.tolerance,
            "tolerance_float32": self.float32,
            "max_abs_diff": differences,
            "steps": self.moved,
            "accuracy": {
                "adapter": float(pairwise_agreement(self.evaluated, ranks).mean()),
                "merged": float(pairwise_agreement(alone, ranks).mean()),
            },
            "contracts": {
                "transformers": True,
                "pipeline": True,
                "trl_reward_funcs": True,
                "ppo": None if reason else True,
            },
            "ppo_reason": reason,
            "reward_at": "last token" if causal else "first token",
            "end_token": end,
            "samples": [
                {"prompt": prompt, "response": response, "text": text, "reward": found["score"]}
                for (prompt, response), text, found in zip(
                    samples,
                    rendered[len(texts) - len(samples) :],
                    answer["pipeline"][len(texts) - len(samples) :],
                    strict=True,
                )
            ],
            "passed": True,
        }

    def let_go(self) -> None:
        """Frees the judge's model: it and the one that is loaded next may not fit a device together."""
        self.judge.model = None
        gc.collect()  # its own forward is bound to it, a circle
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _served(self) -> tuple[list[tuple[str, str]], list[list[Message]], Rewards]:
        """The samples that fit the model; the conversations to go through pipeline and TRL; their rewards."""
        items = [{"prompt": prompt, "response": response} for prompt, response in SAMPLES]
        rewards = self.judge.score(items, unfit=np.nan)
        samples = [sample for sample, reward in zip(SAMPLES, rewards, strict=True) if np.isfinite(reward)]
        of_samples = [
            conversation([{"role": "user", "content": prompt}], response) for prompt, response in samples
        ]
        texts = [*self.held_out.texts, *of_samples]
        return samples, texts, np.concatenate([self.now[self.held_out.whole], rewards[np.isfinite(rewards)]])

    def _check_contracts(
        self,
        folder: Path,
        answer: dict[str, Any],
        texts: list[list[Message]],
        expected: Rewards,
        allowed: float,
        device: torch.device,
    ) -> None:
        """What `rl` and the card promise: plain transformers, its pipeline, TRL's and PPO trainers."""
        assert "rm_recipe" not in answer["modules"]
        ids = [
            self.judge.tokenizer(render(self.judge.tokenizer, messages))["input_ids"] for messages in texts
        ]
        if not answer["ids"][0] == answer["ids"][1] == ids:
            raise ExportError(
                "the exported tokenizer gives other token ids, or adds special tokens to the chat template's "
                "text; nothing was exported"
            )
        labels = {found["label"] for found in answer["pipeline"]}
        piped = np.array([found["score"] for found in answer["pipeline"]], np.float32)
        ppo = np.array(answer["ppo"] or [None] * len(texts), np.float32)  # NaN for None
        seen = {
            "transformers' pipeline": piped,
            "TRL's RLOOTrainer": np.array(trl_rewards(folder, texts, device)),
            "a PPO trainer": np.where(np.isnan(ppo), expected, ppo),
        }
        for consumer, rewards in seen.items():
            difference = np.abs(rewards - expected)
            worst = int(difference.argmax())
            if not difference[worst] <= allowed:
                raise ExportError(
                    f"{consumer} does not get the model's rewards: {rewards[worst]:.5g} in place of "
                    f"{expected[worst]:.5g} for '{texts[worst][-1]['content'][:60]}'; nothing was exported"
                )
        if labels != {"reward"}:
            raise ExportError(f"transformers' pipeline calls the reward {', '.join(labels)}")


def largest(before: Rewards, after: Rewards) -> float:
    """The largest difference."""
    return float(np.abs(before.astype(float) - after).max())


def pads_left(model: nn.Module) -> bool:
    """Whether padding on the left may not change rewards.

    It may where positions are absolute and counted from the row's start (GPT-2), and where the head reads the
    first token (encoders): such models are to be padded on the right.
    """
    absolute = any(
        isinstance(module, nn.Embedding) and re.search(r"position|wpe", name)
        for name, module in model.named_modules()
    )
    return reads_last_token(model) and not absolute


def reads_last_token(model: nn.Module) -> bool:
    """Whether the head reads the last token, as decoders' do; encoders' read the first."""
    return isinstance(getattr(model, "score", None), nn.Module)


def _score_anew(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `plain_scoring.py`, in a process that knows nothing of this one."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", str(PLAIN_SCORING), str(asked), str(answered)]
        code = subprocess.run(command, check=False).returncode
        if not answered.is_file():
            raise ExportError(
                f"the process that was to read the export ended with {code}; nothing was exported"
            )
        answer = read_json(answered)
    if answer.get("error", "").startswith("OutOfMemoryError"):
        raise torch.OutOfMemoryError(answer["error"])
    if "error" in answer:
        raise ExportError(
            f"plain transformers cannot use the export: {answer['error']}; nothing was exported"
        )
    return answer


# --- what rounding does to rewards, measured on the model itself -------------------------------
# Weights that will be rounded are moved at random by as much as rounding may move them; inputs of layers are
# rounded as layers that multiply in fewer bits round them.

Round = Callable[[torch.Tensor], torch.Tensor]


def to_eight_bits(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 even steps up to the largest of each row, as LLM.int8 (arXiv 2208.07339)."""
    step = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / step).round() * step


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that bf16 has, in the precision that they came in."""
    return values.bfloat16().to(values.dtype)


def layers_that_multiply(model: nn.Module) -> list[str]:
    """The names of the layers with a weight matrix to multiply by."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


@contextmanager
def rounded_inputs(model: nn.Module, layers: Sequence[str], rounded: Round) -> Iterator[None]:
    """Within it, the layers of these names read `rounded(input)`."""

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(inputs[0]), *inputs[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(before) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def precisions(
    model: nn.Module, body: torch.dtype, head: torch.dtype
) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Every parameter with the precision that it is to be written in."""
    for module in model.modules():
        precision = head if is_float32(module) else body
        for parameter in module.parameters(recurse=False):
            yield parameter, precision


@contextmanager
def moved_weights(model: nn.Module, body: torch.dtype, head: torch.dtype, seed: int) -> Iterator[None]:
    """Within it, the weights that these precisions cannot hold are off by up to half their last place."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}  # once, where several modules share it
    for parameter, precision in precisions(model, body, head):
        weights = parameter.data
        if id(parameter) in kept or torch.equal(weights, weights.to(precision).to(weights.dtype)):
            continue
        kept[id(parameter)] = parameter, weights.to("cpu")  # a GPU may not hold them twice
        _, exponents = torch.frexp(weights)
        half = torch.ldexp(torch.full_like(weights, torch.finfo(precision).eps / 4), exponents)
        share = torch.rand(weights.shape, generator=generator).to(weights.device) * 2 - 1
        parameter.data = weights + share * half * (weights != 0)
    try:
        yield
    finally:
        for parameter, weights in kept.values():
            parameter.data = weights.to(parameter.device)


# --- contracts: what an export promises to the programs that use it next -----------------------


def trl_rewards(
    folder: Path, conversations: Sequence[list[Message]], device: torch.device | None = None
) -> list[float]:
    """The rewards that TRL's `RLOOTrainer(reward_funcs="folder")` sees, by its own code.

    The trainer is made with a policy of one tiny layer, and asked for the rewards of these conversations in
    place of its own samples. TRL 1.16's GRPOTrainer scores by the same lines.

    Args:
        device: where it scores, by default on a GPU if there is one.
    """
    from trl import RLOOConfig, RLOOTrainer

    prompts = [messages[:-1] for messages in conversations]
    rows = [{"prompt": prompt} for prompt in prompts]
    with tempfile.TemporaryDirectory() as policy, quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(policy)
        tokenizer.save_pretrained(policy)
        settings = RLOOConfig(
            policy,
            per_device_train_batch_size=2,
            num_generations=2,
            use_cpu=device.type == "cpu" if device else not torch.accelerator.is_available(),
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        if settings.n_gpu > 1:  # several visible GPUs would mean nn.DataParallel, which TRL refuses
            settings._n_gpu = 1
        trainer = RLOOTrainer(
            policy, str(folder), settings, Dataset.from_list(rows), processing_class=tokenizer
        )
        replies = [messages[-1:] for messages in conversations]
        rewards = trainer._calculate_rewards(rows, prompts, replies, [[0]] * len(rows))
    return [float(reward) for reward in rewards[:, 0]]
