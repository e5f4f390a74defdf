"""A detector's scores: what thresholds leave, and scores that say how many detections are right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit

from vitrine.models.training.data.dataset import DetectionData
from vitrine.models.training.evaluation.calibration import bin_reliability
from vitrine.models.training.evaluation.metrics import DetectionPredictions
from vitrine.models.training.evaluation.scores import apply_scores, fit_scores, right_detections, thresholds, unscaled

HERE, THERE = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 70.0, 70.0)


@pytest.fixture
def data() -> DetectionData:
    """Two images of one cat each, and one without any."""
    boxes = [np.array([HERE], np.float32), np.array([HERE], np.float32), np.zeros((0, 4), np.float32)]
    class_ids = [np.zeros(len(own), np.int64) for own in boxes]
    return DetectionData("d", "val", ("cat", "dog"), ["a", "b", "c"], [b""] * 3, class_ids, boxes)


@pytest.fixture
def predictions() -> DetectionPredictions:
    """A right detection of 0.85, then a misplaced one, a right one, another label and one of an empty image."""
    return DetectionPredictions(
        np.arange(3),
        np.array([0, 0, 1, 1, 2]),
        np.array([0.85, 0.65, 0.45, 0.35, 0.15], np.float32),
        np.array([0, 0, 0, 1, 0]),
        np.array([HERE, THERE, HERE, HERE, HERE], np.float32),
        1.0,
    )


def test_detections_are_right_or_not(data: DetectionData, predictions: DetectionPredictions) -> None:
    assert right_detections(predictions, data).tolist() == [True, False, True, False, False]


def test_thresholds_trade_precision_for_recall(data: DetectionData, predictions: DetectionPredictions) -> None:
    points, best = thresholds(predictions, data)
    assert best == pytest.approx(0.45)
    assert [round(point.score, 2) for point in points] == [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9]
    found = {round(point.score, 2): (point.precision, point.recall) for point in points}
    assert found[0.1] == (pytest.approx(2 / 5), 1)
    assert found[0.4] == found[0.45] == (pytest.approx(2 / 3), 1)
    assert found[0.5] == found[0.6] == (0.5, 0.5)
    assert found[0.7] == found[0.8] == (1, 0.5)
    assert found[0.9] == (1, 0)  # none is kept


def test_thresholds_without_detections(data: DetectionData) -> None:
    nothing = np.zeros(0, np.int64)
    empty = DetectionPredictions(
        np.arange(3), nothing, np.zeros(0, np.float32), nothing, np.zeros((0, 4), np.float32), 1.0
    )
    points, best = thresholds(empty, data)
    assert (best, {(point.precision, point.recall) for point in points}) == (0.5, {(1, 0)})


@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (0.5, -1.0), (2.0, 1.5), (0.8, 3.0)])
def test_a_known_scale_is_found(temperature: float, offset: float) -> None:
    random = np.random.default_rng(0)
    shares = random.uniform(0.02, 0.98, 200_000)
    right = random.random(200_000) < shares
    scores = expit((logit(shares) - offset) * temperature)
    assert fit_scores(scores, right) == (pytest.approx(temperature, rel=0.03), pytest.approx(offset, abs=0.05))
    fitted = apply_scores(scores, *fit_scores(scores, right))
    assert bin_reliability(fitted, right).error < 0.01


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_without_right_and_wrong_ones_scores_stay(count: int, right: bool) -> None:
    assert fit_scores(np.full(count, 0.7), np.full(count, right)) == (1.0, 0.0)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30),
)
def test_any_scores_can_be_fitted(detections: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in detections])
    temperature, offset = fit_scores(scores, np.array([right for _, right in detections]))
    assert temperature > 0
    assert np.isfinite(offset)
    fitted: NDArray[np.float64] = apply_scores(scores, temperature, offset)
    assert ((fitted >= 0) & (fitted <= 1)).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(fitted[order]) >= 0).all()  # the same order


@given(st.floats(0.01, 0.99), st.floats(0.5, 2), st.floats(-2, 2))
def test_scaled_scores_can_be_scaled_back(score: float, temperature: float, offset: float) -> None:
    scaled = apply_scores(np.array([score]), temperature, offset)
    assert unscaled(scaled, temperature, offset) == pytest.approx(score, abs=1e-3)
