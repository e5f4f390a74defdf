"""How a network is best run, and how that is learnt."""

from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.loading import load_bundle
from vitrine.bundle.pace import Pace, measure_pace
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import OnnxNetwork


def quickest(pace: Pace, *, wide: float, narrow: float, turns: int = 200) -> list[bool]:
    """What is chosen for so many lone images that take so long."""
    chosen = []
    for _ in range(turns):
        chosen.append(pace.widely())
        pace.took(wide if chosen[-1] else narrow, widely=chosen[-1])
    return chosen


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_a_network_is_measured_with_what_it_takes(name: str, tiny_bundles: Path) -> None:
    bundle = load_bundle(tiny_bundles / name / "1")
    network = OnnxNetwork(bundle.file, threads=2)
    wide = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
    pace = measure_pace(bundle.predictor, wide)
    assert 0 < pace.seconds < 10
    assert pace.wide is wide
    assert measure_pace(bundle.predictor).wide is None


def test_a_repository_measures_if_it_is_told_how_many_cores_there_are(tiny_bundles: Path) -> None:
    assert Repository(tiny_bundles).get("colours").pace is None
    for cores in (1, 2):
        pace = Repository(tiny_bundles, cores=cores).get("colours").pace
        assert pace is not None
        assert (pace.wide is not None) == (cores > 1)


def test_the_quicker_way_is_found_and_the_other_is_tried_now_and_then(tiny_bundles: Path) -> None:
    wide = load_bundle(tiny_bundles / "colours" / "1").predictor
    for times, better in (({"wide": 0.01, "narrow": 0.02}, True), ({"wide": 0.03, "narrow": 0.02}, False)):
        chosen = quickest(Pace(0.02, wide=wide), **times)
        assert np.mean([choice == better for choice in chosen[50:]]) > 0.9
        assert (not better) in chosen[50:]


def test_what_was_slow_once_is_taken_again_soon(tiny_bundles: Path) -> None:
    pace = Pace(0.02, wide=load_bundle(tiny_bundles / "colours" / "1").predictor)
    quickest(pace, wide=0.5, narrow=0.02, turns=40)  # somebody else used the machine
    assert np.mean(quickest(pace, wide=0.01, narrow=0.02)[100:]) > 0.9


def test_without_other_cores_nothing_runs_widely() -> None:
    pace = Pace(0.02)
    assert not any(pace.widely() for _ in range(200))


def test_batches_are_for_short_calls_even_if_the_first_ones_were_slow() -> None:
    pace = Pace(0.03, batch=8)
    assert pace.batch == 1
    pace.ran(0.02)
    assert pace.batch == 1
    pace.ran(0.009)
    pace.ran(0.04)
    assert pace.batch == 8
