"""rm_recipe: a fine-tuning recipe, on TRL, for reward models.

The Python interface is one class, imported when it is first used::

    from rm_recipe import RewardModel
    rewards = RewardModel.from_pretrained("outputs/smollm2_offline").score(items)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_recipe.scoring import RewardModel

__version__ = "0.1.0"
__all__ = ["RewardModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "RewardModel":
        from rm_recipe.scoring import RewardModel

        return RewardModel
    raise AttributeError(f"module 'rm_recipe' has no attribute '{name}'")
