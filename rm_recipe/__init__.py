"""rm_recipe: a fine-tuning recipe, on TRL, for reward models.

The Python interface is what `__all__` lists, each imported when it is first used::

    from rm_recipe import RewardModel
    rewards = RewardModel.from_pretrained("outputs/smollm2_offline").score(items)
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_recipe.evaluation.evaluate import evaluate as evaluate
    from rm_recipe.evaluation.metrics import PreferenceAccuracy as PreferenceAccuracy
    from rm_recipe.exporting.export import export as export
    from rm_recipe.recipe.reader import read_recipe as read_recipe
    from rm_recipe.rl import reward_function as reward_function
    from rm_recipe.scoring import RewardModel as RewardModel
    from rm_recipe.training.train import train as train

__version__ = "0.1.0"
# bitsandbytes 0.50 looks for an optional CPU kernel at import and logs that it is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
_MODULES = {
    "PreferenceAccuracy": "evaluation.metrics",
    "RewardModel": "scoring",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "read_recipe": "recipe.reader",
    "reward_function": "rl",
    "train": "training.train",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"rm_recipe.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rm_recipe' has no attribute '{name}'")
