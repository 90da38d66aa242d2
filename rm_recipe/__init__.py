"""rm_recipe: a fine-tuning recipe, on TRL, for reward models.

The Python interface is what `__all__` lists, each imported when it is first used::

    from rm_recipe import RewardModel
    rewards = RewardModel.from_pretrained("outputs/smollm2_offline").score(items)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_recipe.evaluation.evaluate import evaluate
    from rm_recipe.evaluation.metrics import PreferenceAccuracy
    from rm_recipe.exporting.export import export
    from rm_recipe.recipe.reader import read_recipe
    from rm_recipe.rl import reward_function
    from rm_recipe.scoring import RewardModel
    from rm_recipe.training.train import train

__version__ = "0.1.0"
__all__ = [
    "PreferenceAccuracy",
    "RewardModel",
    "__version__",
    "evaluate",
    "export",
    "read_recipe",
    "reward_function",
    "train",
]

_MODULES = {
    "PreferenceAccuracy": "evaluation.metrics",
    "RewardModel": "scoring",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "read_recipe": "recipe.reader",
    "reward_function": "rl",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"rm_recipe.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rm_recipe' has no attribute '{name}'")
