"""Verification that an export scores as what was evaluated; what it finds is `proof.json`.

The same held-out conversations are scored at every step from the evaluated model to the files, and each step
has to agree with the one before, to within a share of the rewards' standard deviation: `FLOAT32` where it
only rewrites numbers (the merge in fp32, the files, another batch or padding), `ROUNDING` where it rounds.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rm_recipe.data.chat_template import ppo_fault
from rm_recipe.data.comparison import Encoded, Message, as_messages, conversation, pairwise_agreement
from rm_recipe.data.dataset import Split
from rm_recipe.data.tokenization import render
from rm_recipe.errors import ExportError
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.model.memory import free_unused
from rm_recipe.model.reward_model import is_decoder, quietly
from rm_recipe.scoring import RewardModel

N_COMPARISONS = 32  # as far as there are as many; 64 replies, if they are pairs
N_SERVED = 8  # replies also as texts, through the pipeline and TRL
# What a step may move rewards by, in standard deviations of the held-out rewards: what rounds nothing each of
# them, what rounds their root mean square (1.4 for rewards that have nothing to do with each other).
FLOAT32 = 5e-4  # sums in another order; measured 1e-6 to 1e-5
LEAST = 1e-5  # but so much is always allowed
# To half precision or 4 bits; measured 0.01 to 0.2, most for a model that has hardly learnt.
ROUNDING = 0.5
EIGHT_BITS = 1.0  # which round the inputs, too; measured 0.1 to 0.7
PLAIN_SCORING = Path(__file__).with_name("plain_scoring.py")

ENCODER = "they read a head called `score` at the last token, as decoders have it; this model has none"
UNSAMPLED = "no policy samples replies that begin within their prompt's last token or hold the pad token"

# Whoever serves the model finds their rewards in the card, to compare.
SAMPLES = (
    ("How was your weekend?", "Great, we went hiking!"),
    ("How was your weekend?", "The invoice is due on Monday."),
    ("I burnt the rice again. What am I doing wrong?", "Too much heat: turn it right down."),
)

Rewards = NDArray[np.float32]


class Verification:
    """Follow the rewards of held-out conversations from step to step; the first that moves them ends it.

    Attributes:
        reward_model: the model as it is now.
        encoded: the comparisons that every form of the model scores, as token ids.
        ranks: of their responses.
        sequences: the token ids of each of their conversations.
        names: what messages call these.
        whole: by sequence number the messages of the first ones that are not truncated.
        evaluated: the rewards at the start, `(sequences,)`; `now` are those of the last step.
        spread: their standard deviation.
        float32: what a step that rounds nothing may move a reward by.
        tolerance: what all steps together may.
        moved: by step the largest difference that it made.
    """

    def __init__(self, reward_model: RewardModel, split: Split) -> None:
        """Take the first comparisons of a tokenised split."""
        self.reward_model = reward_model
        rows = list(split.comparisons.select(range(min(N_COMPARISONS, len(split.comparisons)))))
        self.encoded = [Encoded(row["prefix"], row["suffixes"]) for row in rows]
        self.sequences = [ids for comparison in self.encoded for ids in comparison.conversations()]
        self.ranks = [row["ranks"] for row in rows]
        self.names = [
            f"held-out comparison {number}, response {k} (best first)"
            for number, ranks in enumerate(self.ranks, 1)
            for k in range(1, len(ranks) + 1)
        ]
        # TRL's trainer and the pipeline are not given tools, nor what `max_length` has cut.
        lengths = [0 if row["tools"] else length for row in rows for length in row["lengths"]]
        uncut = [i for i, ids in enumerate(self.sequences) if len(ids) == lengths[i]][:N_SERVED]
        messages = [messages for number in range(len(rows)) for messages in split[number].conversations()]
        self.whole = {number: messages[number] for number in uncut}
        self.evaluated = self.now = self.rewards()
        self.spread = float(self.evaluated.std())
        self.float32 = self.tolerance = max(LEAST, FLOAT32 * self.spread)
        self.moved: dict[str, float] = {}

    def rewards(self) -> Rewards:
        """Score with the reward model as it is now, `(sequences,)`."""
        return np.concatenate(self.reward_model.score_encoded(self.encoded))

    def check_step(self, name: str, claim: str, share: float = 0.0, why: str = "") -> None:
        """Score with the reward model as it is now and compare with the rewards of the step before.

        Args:
            name: of what was done to the model since.
            claim: what to say if they differ.
            share: the standard deviations that their differences' root mean square may have.
            why: what to say besides.

        Raises:
            ExportError: they differ by more.
        """
        rewards = self.rewards()
        allowed = max(self.float32, share * self.spread)
        if share and np.sqrt(np.mean((self.now - rewards) ** 2)) <= allowed:
            allowed = np.inf  # for a single one
        self.moved[name] = compare(claim, self.now, rewards, allowed, self.names, why)
        if self.moved[name] > self.float32:
            self.tolerance += self.moved[name]
        self.now = rewards

    def check_recorded(self, predictions: Sequence[dict[str, Any]]) -> None:
        """Compare what was evaluated with what the run's evaluation, if there is one, wrote down."""
        held_out = {line["index"]: line["rewards"] for line in predictions if line["dataset"] == HELD_OUT}
        if held_out:
            unknown = np.split(self.evaluated, np.cumsum([len(ranks) for ranks in self.ranks])[:-1])
            recorded = np.concatenate([held_out.get(n, values) for n, values in enumerate(unknown)])
            claim = "the run no longer gives the rewards of its predictions.jsonl (has its base changed?)"
            # Then as now they were rounded, if at all, each in its own way: on another device, say.
            allowed = 2 * self.tolerance - self.float32
            self.moved["recorded"] = compare(claim, recorded, self.evaluated, allowed, self.names)

    def free_model(self) -> None:
        """Free the reward model's model: it and the one that is loaded next may not fit a device together."""
        self.reward_model.model = None
        free_unused()

    def read_back(self, folder: Path) -> dict[str, Any]:
        """Score with the files alone; return what `proof.json` says of it all.

        Raises:
            ExportError: plain transformers, its pipeline, TRL or a PPO trainer gets other rewards.
        """
        model, tokenizer = self.reward_model.model, self.reward_model.tokenizer
        samples, conversations, expected = self._served()
        texts = [render(tokenizer, messages) for messages in conversations]
        causal, device = is_decoder(model), next(model.parameters()).device
        ppo_reason = ppo_fault(tokenizer) if causal else ENCODER
        request: dict[str, Any] = {"folder": str(folder), "sequences": self.sequences, "texts": texts}
        request |= {"device": str(device), "left": pads_left(model)}
        request |= {"sampled": [] if ppo_reason else conversations}
        del model
        self.free_model()
        answer = _score_anew(request) | {"trl": trl_rewards(folder, conversations, device)}
        if not answer["ids"][0] == answer["ids"][1] == tokenizer(texts)["input_ids"]:
            fault = "gives other token ids, or adds special tokens to the chat template's text"
            raise ExportError(f"the exported tokenizer {fault}; nothing was exported")
        replies = [f"'{messages[-1]['content'][:60]}'" for messages in conversations]
        differences = self._compare(answer, expected, replies)
        if not ppo_reason and set(answer["ppo"]) == {None}:
            ppo_reason = UNSAMPLED
        rewards = {"adapter": self.evaluated, "merged": np.array(answer["alone"])}
        return {
            "n_sequences": len(self.sequences),
            "tolerance": self.tolerance,
            "tolerance_float32": self.float32,
            "max_abs_diff": differences,
            "steps": self.moved,
            "accuracy": {
                name: float(pairwise_agreement(r, self.ranks).mean()) for name, r in rewards.items()
            },
            "contracts": dict.fromkeys(("transformers", "pipeline", "trl_reward_funcs"), True)
            | {"ppo": None if ppo_reason else True},
            "ppo_reason": ppo_reason,
            "reward_at": "last token" if causal else "first token",
            "end_token": tokenizer.decode(self.sequences[0][-1:]),
            "samples": [
                sample | {"text": text, "reward": found["score"]}
                for sample, text, found in zip(samples, texts, answer["pipeline"], strict=False)
            ],
            "passed": True,
        }

    def _served(self) -> tuple[list[dict[str, str]], list[list[Message]], Rewards]:
        """The samples that the model reads whole; the conversations for pipeline and TRL; their rewards.

        Raises:
            ExportError: there is no such conversation.
        """
        items = [{"prompt": prompt, "response": response} for prompt, response in SAMPLES]
        reader = copy(self.reward_model)
        reader.truncation = "exclude"  # as neither pipeline nor TRL cuts anything
        rewards = reader.score(items, unfit=np.nan)
        fit = np.isfinite(rewards)
        if not (fit.any() or self.whole):
            fault = f"no conversation fits {reader.max_length} tokens whole, so none can be served"
            raise ExportError(f"{fault}; train with a larger max_length; nothing was exported")
        samples = [item for item, fits in zip(items, fit, strict=True) if fits]
        replied = [conversation(as_messages(sample["prompt"]), sample["response"]) for sample in samples]
        expected = np.append(rewards[fit], self.now[list(self.whole)])
        return samples, [*replied, *self.whole.values()], expected

    def _compare(
        self, answer: dict[str, Any], expected: Rewards, replies: list[str]
    ) -> dict[str, float | None]:
        """Compare what the files give, and what programs that use them get for `replies`; `max_abs_diff`."""
        alone, batched, files = (np.array(answer[key]) for key in ("alone", "batched", "float32"))
        half = np.abs(files - alone).max() > self.float32  # plain transformers computes in half precision
        allowed = self.float32 + (ROUNDING * self.spread if half else 0.0)
        self.tolerance += allowed - self.float32
        claim = "the files do not give the merged model's rewards"
        self.moved["files"] = compare(claim, self.now, files, self.float32, self.names)
        claim = "the merged model is not what was evaluated"
        merged = compare(claim, self.evaluated, self.now, self.tolerance, self.names)
        found: dict[str, float | None] = {"merged": merged, "padding_side": None}
        checks = {"fresh_process": (self.now, alone), "batch_size": (alone, batched)}
        if answer["left"]:
            checks["padding_side"] = batched, np.array(answer["left"])
        for name, check in checks.items():
            claim = f"the files score otherwise ({name.replace('_', ' ')})"
            found[name] = compare(claim, *check, allowed, self.names)
        sampled = answer["ppo"] or [None] * len(expected)
        served = {
            "transformers' pipeline": np.array([one["score"] for one in answer["pipeline"]]),
            "TRL's RLOOTrainer": np.array(answer["trl"]),
            "a PPO trainer": np.array(
                [own if ppo is None else ppo for own, ppo in zip(expected, sampled, strict=True)]
            ),
        }
        for consumer, rewards in served.items():
            compare(f"{consumer} does not get the model's rewards", expected, rewards, allowed, replies)
        return found


def compare(
    claim: str, before: Rewards, after: Rewards, allowed: float, names: Sequence[str], why: str = ""
) -> float:
    """Return the largest difference of two arrays of rewards.

    Raises:
        ExportError: it is more than `allowed`, with `claim` and the name of the one that moved most.
    """
    difference = np.abs(before.astype(float) - after)
    worst = int(difference.argmax())
    if not difference[worst] <= allowed:  # NaN is no agreement
        raise ExportError(
            f"{claim}: {names[worst]}, went from {before[worst]:.5g} to {after[worst]:.5g}, by "
            f"{difference[worst]:.2g} where {allowed:.2g} is allowed{why}; nothing was exported"
        )
    return float(difference[worst])


def pads_left(model: nn.Module) -> bool:
    """Whether padding on the left may not change rewards.

    It may where positions are absolute and counted from the row's start (GPT-2), and where the head reads the
    first token (encoders): such models are to be padded on the right.
    """
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return is_decoder(model) and not re.search(r"position|wpe", " ".join(embeddings))


def _score_anew(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `plain_scoring.py`, in a process that knows nothing of this one."""
    command = [sys.executable, "-P", str(PLAIN_SCORING)]
    asked = json.dumps(request)
    result = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=False)
    answer = {"error": f"its process ended with {result.returncode}"}
    if result.returncode == 0:
        answer = json.loads(result.stdout.splitlines()[-1])
    if "error" in answer:
        fault = f"plain transformers cannot use the export: {answer['error']}"
        raise ExportError(f"{fault}; nothing was exported")
    return answer


def trl_rewards(folder: Path, conversations: Sequence[list[Message]], device: torch.device) -> list[float]:
    """Return the rewards that TRL's `RLOOTrainer(reward_funcs="folder")` sees, by its own code.

    The trainer is made with a policy of one tiny layer, and asked for the rewards of these conversations in
    place of its own samples. TRL 1.16's GRPOTrainer scores by the same lines.
    """
    from trl import RLOOConfig, RLOOTrainer

    prompts, replies = [m[:-1] for m in conversations], [m[-1:] for m in conversations]
    rows = [{"prompt": prompt} for prompt in prompts]
    with tempfile.TemporaryDirectory() as scratch, quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
        settings = RLOOConfig(scratch, beta=0.0, use_cpu=device.type == "cpu", bf16=False, report_to="none")
        # Several visible GPUs would mean nn.DataParallel, which TRL refuses.
        settings._n_gpu = min(settings.n_gpu, 1)
        data = Dataset.from_list(rows)
        trainer = RLOOTrainer(policy, str(folder), settings, data, processing_class=tokenizer)
        rewards = trainer._calculate_rewards(rows, prompts, replies, [[0]] * len(rows))
    return [float(reward) for reward in rewards[:, 0]]
