"""How a network is best run, and how that is learnt."""

from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.loading import load_bundle
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.profile import ExecutionProfile, measure_profile
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import OnnxNetwork


def quickest(profile: ExecutionProfile, *, wide: float, narrow: float, turns: int = 200) -> list[bool]:
    """What is chosen for so many lone images that take so long."""
    chosen = []
    for _ in range(turns):
        chosen.append(profile.prefers_all_cores())
        profile.record_lone_latency(wide if chosen[-1] else narrow, all_cores=chosen[-1])
    return chosen


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_a_network_is_measured_with_what_it_takes(name: str, tiny_bundles: Path) -> None:
    bundle = load_bundle(tiny_bundles / name / "1")
    network = OnnxNetwork(bundle.file, threads=2)
    wide = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
    profile = measure_profile(bundle.predictor, wide)
    assert 0 < profile.seconds < 10
    assert profile.all_cores is wide
    assert measure_profile(bundle.predictor).all_cores is None


def test_a_repository_measures_if_it_is_told_how_many_cores_there_are(tiny_bundles: Path) -> None:
    assert Repository(tiny_bundles).get("colours").profile is None
    for cores in (1, 2):
        profile = Repository(tiny_bundles, cores=cores).get("colours").profile
        assert profile is not None
        assert (profile.all_cores is not None) == (cores > 1)


def test_the_quicker_way_is_found_and_the_other_is_tried_now_and_then(tiny_bundles: Path) -> None:
    wide = load_bundle(tiny_bundles / "colours" / "1").predictor
    for times, better in (({"wide": 0.01, "narrow": 0.02}, True), ({"wide": 0.03, "narrow": 0.02}, False)):
        chosen = quickest(ExecutionProfile(0.02, all_cores=wide), **times)
        assert np.mean([choice == better for choice in chosen[50:]]) > 0.9
        assert (not better) in chosen[50:]


def test_what_was_slow_once_is_taken_again_soon(tiny_bundles: Path) -> None:
    profile = ExecutionProfile(0.02, all_cores=load_bundle(tiny_bundles / "colours" / "1").predictor)
    quickest(profile, wide=0.5, narrow=0.02, turns=40)  # somebody else used the machine
    assert np.mean(quickest(profile, wide=0.01, narrow=0.02)[100:]) > 0.9


def test_without_other_cores_nothing_runs_widely() -> None:
    profile = ExecutionProfile(0.02)
    assert not any(profile.prefers_all_cores() for _ in range(200))


def test_batches_are_for_short_calls_even_if_the_first_ones_were_slow() -> None:
    profile = ExecutionProfile(0.03, batch=8)
    assert profile.batch == 1
    profile.record_latency(0.02)
    assert profile.batch == 1
    profile.record_latency(0.009)
    profile.record_latency(0.04)
    assert profile.batch == 8
