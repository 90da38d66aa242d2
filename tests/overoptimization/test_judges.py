"""Judges have equal say, and are compared on the same replies; their rewards: test_overoptimization."""

import numpy as np
import pytest

from rm_recipe.overoptimization.best_of_n import standardised
from rm_recipe.overoptimization.experiment import Judged, comparable, ensemble
from rm_recipe.overoptimization.replies import Sample


def test_a_judge_of_prompts_rather_than_of_replies_has_no_more_say_for_it():
    rng = np.random.default_rng(0)
    rewards, none = rng.normal(size=(2, 40, 8)), np.zeros((4, 0))
    loud = Judged("loud", rewards[1] + 5 * rng.normal(size=(40, 1)), none)
    mean = ensemble("mean", [Judged("quiet", rewards[0], none), loud]).rewards
    of_each = [np.corrcoef(standardised(mean).ravel(), standardised(own).ravel())[0, 1] for own in rewards]
    assert of_each == pytest.approx([0.71, 0.71], abs=0.06)
    constant = Judged("constant", 1 + 1e-9 * rng.normal(size=(40, 8)), none)
    alone = ensemble("mean", [Judged("quiet", rewards[0], none), constant]).rewards
    assert np.corrcoef(standardised(alone).ravel(), standardised(rewards[0]).ravel())[0, 1] > 0.999


def test_of_more_replies_than_the_others_have_some_are_taken_by_lot():
    """Not the first ones: a file may be sorted."""
    many = Sample([{"role": "user", "content": "many"}], [str(k) for k in range(100)])
    few = [Sample([{"role": "user", "content": str(k)}], ["a"] * 10) for k in range(20)]
    same, fewer = comparable([many, *few])
    assert {len(one.responses) for one in same} == {10}
    assert not fewer
    assert max(map(int, same[0].responses)) > 50
    assert comparable([many, *few])[0] == same
