"""hh-rlhf transcripts (`\\n\\nHuman: ...\\n\\nAssistant: ...`) as turns and messages, and back.

The format has no way to quote a speaker's name, so a rule has to say where a turn starts: at a
name after a blank line, and only where the speaker changes. `Human:` in the middle of a message,
or an `Assistant:` that an assistant's reply wrote itself, is then part of the message.
"""

import re
from collections.abc import Sequence

_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript by its look, and no message that speaks of one.

    It begins with a blank line and a speaker, or with a speaker and ends where the reply is to come.
    """
    text = text.replace("\r\n", "\n")
    begins = text.lstrip().startswith(("Human:", "Assistant:"))
    return begins and (text.startswith("\n\n") or text.rstrip().endswith("\n\nAssistant:"))


def split_turns(text: str) -> list[tuple[str, str]]:
    """A transcript as (speaker, what follows the colon); `join_turns` gives the text back.

    Raises:
        ValueError: text stands before the first speaker, or there is none.
    """
    before, *parts = _SPEAKER.split("\n\n" + text.lstrip())
    if before or not parts:
        raise ValueError("not a transcript")
    turns: list[tuple[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            turns[-1] = (speaker, f"{turns[-1][1]}\n\n{speaker}:{said}")
        else:
            turns.append((speaker, said))
    return turns


def join_turns(turns: Sequence[tuple[str, str]]) -> str:
    """The transcript that `split_turns` took apart, character for character."""
    return "".join(f"\n\n{speaker}:{said}" for speaker, said in turns)


def parse_transcript(text: str) -> list[dict[str, str]]:
    """The messages of a transcript, each without the white space around it.

    Raises:
        ValueError: see `split_turns`.
    """
    return [{"role": _ROLES[speaker], "content": said.strip()} for speaker, said in split_turns(text)]


def before_last_reply(text: str) -> str:
    """What stands before the last `Assistant:`, whoever wrote that name."""
    return text.rpartition("\n\nAssistant:")[0]
