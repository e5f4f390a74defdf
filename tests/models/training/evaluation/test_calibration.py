"""Calibration of synthetic predictions with a known miscalibration."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitrine.models.training.evaluation.calibration import (
    TEMPERATURES,
    apply_temperature,
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)

SEEDS = st.integers(0, 2**32 - 1)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def honest(
    images: int, classes: int, seed: int = 0, spread: float = 2
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Random logits, and classes drawn from their softmax."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (images, classes))
    drawn = (softmax(logits).cumsum(axis=1) < random.random((images, 1))).sum(axis=1)
    return logits, drawn.clip(max=classes - 1)


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 1.7, 5.0])
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_a_known_temperature_is_found(temperature: float, classes: int) -> None:
    logits, class_ids = honest(8000, classes)
    assert fit_temperature(softmax(logits * temperature), class_ids) == pytest.approx(temperature, rel=0.06)


@given(SEEDS, st.integers(1, 40), st.integers(2, 9), st.floats(0.01, 5))
@settings(deadline=None, max_examples=40)
def test_no_temperature_is_better_for_the_images_it_was_fitted_on(
    seed: int, images: int, classes: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    probabilities = np.tile(softmax(random.normal(0, spread, (images, classes))), (200, 1))
    class_ids = np.tile(random.integers(0, classes, images), 200)  # so many that doubt plays no part
    fitted = fit_temperature(probabilities, class_ids)
    assert TEMPERATURES[0] <= fitted <= TEMPERATURES[1]
    loss = negative_log_likelihood(apply_temperature(probabilities, fitted), class_ids)
    for other in (1.0, fitted * 0.9, fitted * 1.1, *TEMPERATURES):
        if TEMPERATURES[0] <= other <= TEMPERATURES[1]:
            assert (
                loss <= negative_log_likelihood(apply_temperature(probabilities, other), class_ids) + 1e-3 * loss + 1e-2
            )


@given(SEEDS, st.integers(2, 9), st.floats(*TEMPERATURES))
def test_temperature_keeps_predictions_and_valid_probabilities(seed: int, classes: int, temperature: float) -> None:
    probabilities = softmax(np.random.default_rng(seed).normal(0, 3, (20, classes)))
    scaled = apply_temperature(probabilities, temperature)
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)


@given(SEEDS, st.floats(0.5, 5))
def test_a_temperature_can_be_inverted(seed: int, temperature: float) -> None:
    probabilities = softmax(np.random.default_rng(seed).normal(0, 2, (20, 6)))
    back = apply_temperature(apply_temperature(probabilities, temperature), 1 / temperature)
    np.testing.assert_allclose(back, probabilities, atol=1e-6)


def test_a_temperature_is_the_division_of_logits() -> None:
    logits, _ = honest(50, 10)
    np.testing.assert_allclose(apply_temperature(softmax(logits), 2.5), softmax(logits / 2.5), atol=1e-6)


def test_an_overconfident_network_is_calibrated_on_other_images() -> None:
    logits, class_ids = honest(8000, 10)
    sure = softmax(3 * logits)
    fitted = fit_temperature(sure[:4000], class_ids[:4000])
    before = calibration_error(sure[4000:], class_ids[4000:])
    after = calibration_error(apply_temperature(sure[4000:], fitted), class_ids[4000:])
    assert before > 0.15
    assert after < 0.03


def test_a_calibrated_network_has_nearly_no_calibration_error() -> None:
    logits, class_ids = honest(20_000, 10)
    assert calibration_error(softmax(logits), class_ids) < 0.015


def test_the_error_is_that_of_the_definition() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    class_ids = np.array([0, 1, 1, 0])
    # bins of 1/15: 0.9 twice, half right; 0.7 right; 0.55 wrong
    assert calibration_error(probabilities, class_ids) == pytest.approx((2 * 0.4 + 0.3 + 0.55) / 4)


def test_there_are_fifteen_bins_by_default() -> None:
    probabilities = np.array([[0.5, 0.5], [0.53, 0.47], [0.54, 0.46]])  # of a fifteenth: 7.5, 7.95, 8.1
    counts = reliability(probabilities, np.array([0, 0, 0])).counts.tolist()
    assert (len(counts), counts[7:9]) == (15, [2, 1])
    assert calibration_error(probabilities, np.array([0, 0, 0])) == pytest.approx((0.5 + 0.47 + 0.46) / 3)


def test_bins() -> None:
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4], [1.0, 0.0], [0.51, 0.49]])
    binned = reliability(probabilities, np.array([0, 1, 0, 0]), bins=2)
    assert binned.counts.tolist() == [1, 3]  # 0.5 belongs to the first: (0, 0.5], (0.5, 1]
    assert binned.confidence.tolist() == pytest.approx([0.5, (0.6 + 1 + 0.51) / 3])
    assert binned.accuracy.tolist() == pytest.approx([1, 2 / 3])


def test_a_network_that_is_always_right_becomes_more_confident_with_each_image() -> None:
    probabilities = softmax(np.eye(4))
    fitted = [fit_temperature(np.tile(probabilities, (n, 1)), np.tile(np.arange(4), n)) for n in (1, 10, 1000)]
    assert 1 > fitted[0] > fitted[1] > fitted[2] > TEMPERATURES[0]


def test_a_network_that_is_always_wrong_gets_the_largest_temperature() -> None:
    probabilities = softmax(30 * np.eye(4)[[0, 1, 2, 3]])
    assert fit_temperature(probabilities, np.array([1, 2, 3, 0])) == pytest.approx(20, rel=0.01)


def test_a_probability_of_zero_costs_87_nats() -> None:
    probabilities = np.array([[1, 0]], np.float32)
    assert negative_log_likelihood(probabilities, np.array([1])) == pytest.approx(87.3, abs=0.1)
    assert np.isfinite(fit_temperature(probabilities, np.array([1])))


def test_nothing_to_fit() -> None:
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) == 1


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.5])
def test_invalid_probabilities(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected probabilities from 0 to 1"):
        fit_temperature(np.array([[0.5, wrong]]), np.array([0]))


def test_other_number_of_images() -> None:
    with pytest.raises(ValueError, match="expected probabilities of 1 images, found 2"):
        fit_temperature(np.full((2, 2), 0.5), np.array([0]))


@pytest.mark.parametrize("images", [1, 8, 100])
def test_a_few_correct_predictions_make_no_certainty(images: int) -> None:
    probabilities = np.tile(np.array([[0.6, 0.3, 0.1]], dtype=np.float32), (images, 1))
    class_ids = np.zeros(images, dtype=np.int64)
    calibrated = apply_temperature(probabilities, fit_temperature(probabilities, class_ids))
    assert 0.6 < calibrated[0, 0] < 1 - 0.5 / (images + 2)
