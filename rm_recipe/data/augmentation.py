"""Edits of a reply that no reader would like better, and comparisons that learn it from edited copies.

A reward model that a policy is trained against has to be hard to fool. So a share of the train comparisons
get copies of their best and their worst reply, edited alike, each ranked behind its original. (Where copies
tied with their originals, an edit no longer helped on average, and still decided between replies that are
close: recipes/README.md.) The prompt, which all share, is encoded once.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets as hf_datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from rm_recipe.data.comparison import Comparison, untied_pairs
from rm_recipe.data.dataset import Split, as_comparisons, run_pass
from rm_recipe.data.loading import UNSPACED
from rm_recipe.data.tokenization import encode_all, follows_from
from rm_recipe.processes import main_process_first, say
from rm_recipe.recipe.reader import Recipe

# Between sentences: behind a full stop and a space, or behind one that wants no space and a quote's end.
_STOPS, _QUOTES = "\u3002\uff01\uff1f\uff61\u0964\u0965\u1362\u104b\u17d4", "\u300d\u300f\u201d\u2019\uff09"
_AFTER_STOP = rf"(?:(?<=[{_STOPS}])|(?<=[{_STOPS}][{_QUOTES}]))(?![{_STOPS}{_QUOTES}])\s*"
_BETWEEN = re.compile(rf"(?<=[.!?\u061f\u06d4\uff0e])\s+|{_AFTER_STOP}")

Edit = Callable[[str], str]


def sentences(reply: str) -> list[str]:
    """Split a reply at the ends of its sentences."""
    return [sentence for sentence in _BETWEEN.split(reply.strip()) if sentence]


def repeat_last_sentence(reply: str) -> str:
    """Write a reply's last sentence twice."""
    last = ["", *sentences(reply)][-1]
    return f"{reply}{'' if re.search(f'[{UNSPACED}]', last) else ' '}{last}"


def embolden(reply: str) -> str:
    """Put every line that is not empty in Markdown's bold."""
    return "\n".join(f"**{line}**" if line.strip() else line for line in reply.split("\n"))


def itemise(reply: str) -> str:
    """Make every sentence an item of a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences(reply))


# What evaluation tries, the second lot not seen in training.
EDITS: dict[str, Edit] = {
    "trailing_space": lambda reply: f"{reply} \n",
    "repeated_sentence": repeat_last_sentence,
    "thank_you": lambda reply: f"{reply} Thank you!",
    "markdown": embolden,
}
UNSEEN: dict[str, Edit] = {
    "great_question": lambda reply: f"Great question! {reply}",
    "list": itemise,
    "smiley": lambda reply: f"{reply} :)",
}
# What training shows beside a repetition: several of each kind, so that it is none of them that is learnt.
COURTESIES = ("Thank you!", "Thanks for asking!", "I hope this helps.", "Have a nice day!", "Let me know!")
OPENINGS = ("Sure!", "Of course!", "Thanks for asking!", "I'm glad you asked.", "Good to hear from you!")
LAYOUTS: tuple[Edit, ...] = (
    embolden,
    lambda reply: "\n".join(sentences(reply)),
    lambda reply: "\n".join(f"> {line}" for line in sentences(reply)),
    lambda reply: f"## {reply}",
)


def draw_edit(lot: random.Random) -> Edit:
    """Draw one of the edits that training shows."""
    courtesy, opening, layout = lot.choice(COURTESIES), lot.choice(OPENINGS), lot.choice(LAYOUTS)
    add = lot.choice([lambda reply: f"{reply} {courtesy}", lambda reply: f"{opening} {reply}"])
    return lot.choice([repeat_last_sentence, layout, add])


def with_copies(found: Comparison, edit: Edit) -> Comparison | None:
    """Let edited copies of the best and the worst response join a comparison, each behind its original.

    So a copy is worse than what it was made of, and better than whatever is worse than that.

    Returns:
        None where the edit leaves one of the two as it is.
    """
    last = len(found.responses) - 1
    origin = [0, *range(last + 1), last]  # each copy behind its original
    responses = [found.responses[number] for number in origin]
    responses[1], responses[-1] = edit(responses[0]), edit(responses[-1])
    if responses[1] == responses[0] or responses[-1] == responses[-2]:
        return None
    ranks = [2 * found.ranks[number] for number in origin]
    for copy in (1, -1):
        ranks[copy] += 1
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])  # behind all that tie with its original
    responses, ranks, origin = ([values[i] for i in order] for values in (responses, ranks, origin))
    margins = dict(zip(untied_pairs(found.ranks), found.margins, strict=False))
    each = [margins.get((origin[i], origin[j]), 0.0) for i, j in untied_pairs(ranks)] if margins else []
    return replace(found, responses=responses, ranks=ranks, margins=each)


def augment(recipe: Recipe, tokenizer: Tokenizer, split: Split) -> Split:
    """Give `augmentation`, a share, of a tokenised split's comparisons edited copies of their replies.

    Which ones, and by which edit, follows from the seed and the comparison alone. One that the edit leaves
    as it is, or whose copies do not fit `max_length`, goes without and is counted.
    """
    training, share = recipe.training, recipe.data.augmentation
    settings = (training.max_length, recipe.data.truncation)
    if not share:
        return split

    def add(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch's columns with the copies in them, and in `copies` what became of each comparison."""
        rows = {name: list(batch[name]) for name in ("prefix", "suffixes", "ranks", "margins")}
        fates, copied = [""] * len(batch["key"]), {}
        for number, (key, found) in enumerate(zip(batch["key"], as_comparisons(batch), strict=True)):
            lot = random.Random(f"{training.seed} {key}")
            if lot.random() < share:
                copies = with_copies(found, draw_edit(lot))
                fates[number] = "nothing to edit"
                if copies:
                    copied[number] = copies
        encoded = encode_all(tokenizer, [*copied.values()], *settings, alike=True)
        for (number, copies), row in zip(copied.items(), encoded, strict=True):
            fates[number] = "do not fit" if row["excluded"] else "copied"
            if not row["excluded"]:
                for name, values in rows.items():
                    values[number] = (row | vars(copies))[name]
        return {**rows, "copies": fates}

    depends_on = [share, training.seed, *settings, *follows_from(tokenizer), sys.modules[__name__]]
    features = {**split.comparisons.features, "copies": hf_datasets.Value("string")}
    processes = training.dataset_num_proc
    with main_process_first():
        rows = run_pass(split.comparisons, add, "Editing", features, depends_on, processes, batched=True)
    n = Counter(rows["copies"][:])
    say(
        f"augmentation: {n['copied']} of {len(rows)} comparisons get edited copies of two replies "
        f"({n['nothing to edit']} had nothing to edit, {n['do not fit']} would not have fitted)"
    )
    return replace(split, comparisons=rows)
