"""Confidence against accuracy: by hand, against scikit-learn, and with a temperature that is known."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve

from rm_recipe.evaluation.metrics import (
    FEWEST,
    bradley_terry_loss,
    calibrate,
    expected_calibration_error,
    fit_temperature,
)

ONE_EACH = np.arange(2000)


def drawn_margins(temperature: float, n: int = 2000) -> np.ndarray:
    """Margins of a model whose sigmoid(margin / temperature) is how often it is right."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, n)
    wins = rng.random(n) < 1 / (1 + np.exp(-true))
    return temperature * np.where(wins, true, -true)


def test_calibration_error_by_hand():
    # Both margins are ln 9, so confidence is 0.9; one of the two is right.
    error, bins = expected_calibration_error([math.log(9), -math.log(9)])
    assert error == pytest.approx(0.4)
    assert bins == [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "n": 2}]


def test_a_tie_is_half_right_with_a_confidence_of_one_half():
    assert expected_calibration_error([0.0, 0.0]) == (0, [{"confidence": 0.5, "accuracy": 0.5, "n": 2}])


def test_the_curve_is_scikit_learns():
    margins = drawn_margins(1.5)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    # Theirs has equal bins between 0 and 1, of which confidence fills the upper half.
    accuracy, mean_confidence = calibration_curve(margins > 0, confidence, n_bins=20)
    _, bins = expected_calibration_error(margins)
    assert [b["accuracy"] for b in bins] == pytest.approx(accuracy)
    assert [b["confidence"] for b in bins] == pytest.approx(mean_confidence)


def test_each_comparison_weighs_one_in_the_error():
    """Three pairs of one comparison, sure and right, beside one that is sure and wrong."""
    sure = 50.0
    error, _ = expected_calibration_error([sure, sure, sure, -sure], np.array([0, 0, 0, 1]))
    assert error == pytest.approx(0.5)


def test_the_temperature_is_where_the_loss_is_least():
    margins = drawn_margins(3.0)
    best = minimize_scalar(
        lambda t: bradley_terry_loss(margins / t, np.zeros_like(margins)), bounds=(0.1, 10), method="bounded"
    )
    assert fit_temperature(margins, ONE_EACH) == pytest.approx(best.x, rel=1e-3)
    assert best.x == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("margins", [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
def test_where_all_are_right_or_most_are_wrong_there_is_no_temperature(margins):
    assert fit_temperature(margins, np.arange(3)) is None


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_temperature_mends_what_is_too_sure_or_not_sure_enough(temperature):
    margins = drawn_margins(temperature)
    result = calibrate(margins, ONE_EACH)
    assert result["temperature"] == pytest.approx(temperature, rel=0.1)
    assert result["ece"] > 0.05 > 0.03 > result["ece_after"]
    assert result["loss_after"] < bradley_terry_loss(margins, np.zeros_like(margins))


def test_no_comparison_is_judged_by_a_temperature_that_it_helped_to_fit():
    """On what it was fitted to, a temperature looks better than it is."""
    margins = np.random.default_rng(1).normal(0.3, 1, FEWEST)
    temperature = fit_temperature(margins, np.arange(FEWEST))
    fitted_loss = bradley_terry_loss(margins / temperature, np.zeros_like(margins))
    assert calibrate(margins, np.arange(FEWEST))["loss_after"] > fitted_loss


def test_a_few_comparisons_have_no_temperature():
    result = calibrate(drawn_margins(2.0)[: FEWEST - 1], np.arange(FEWEST - 1))
    assert (result["temperature"], result["ece_after"], result["loss_after"]) == (None, None, None)
