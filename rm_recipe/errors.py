"""The errors that users see: one message each, printed without a traceback.

The command line turns them into exit codes (`rm_recipe/cli.py`): 2 where the user's input is
wrong, 1 where the run itself failed.
"""

import signal


def one_line(error: BaseException) -> str:
    """A library's message, shortened to what fits into one of ours: its first sentence."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:300]


class RmRecipeError(Exception):
    """Base of every error whose text is meant for the user; `exit_code` is the process's."""

    exit_code = 1


class RecipeError(RmRecipeError):
    """The recipe, an argument or a path is wrong."""

    exit_code = 2


class DataError(RmRecipeError):
    """A data set or an input file is not what it should be."""

    exit_code = 2


class UnfitError(DataError):
    """A conversation that the model cannot read: too long, or refused by its template."""


class TrainingError(RmRecipeError):
    """Training started and could not go on."""


class Interrupted(RmRecipeError):  # noqa: N818 - asked for by the user
    """SIGINT (Ctrl-C) or SIGTERM, with what is kept and how to go on."""

    def __init__(self, message: str, number: int | None = None, *, resumable: bool = False) -> None:
        """`resumable`: whether `--resume` goes on, or the same command again."""
        super().__init__(message)
        self.resumable = resumable
        self.number = number or signal.SIGINT
        self.exit_code = 128 + self.number  # as a shell counts: 130, 143


class ExportError(RmRecipeError):
    """A merged model could not be written, or is not equal to what was evaluated."""


class PushError(RmRecipeError):
    """A model could not be uploaded, or what arrived is not what was sent."""
