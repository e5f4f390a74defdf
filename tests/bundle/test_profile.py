"""Execution profiles: the measurements and the choices made from them."""

from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.loading import load_bundle
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.profile import ExecutionProfile, measure_profile
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import OnnxNetwork


def simulate(profile: ExecutionProfile, *, all_cores: float, one_core: float, images: int = 200) -> list[bool]:
    """Run lone images with these latencies; return the choice made for each."""
    chosen = []
    for _ in range(images):
        chosen.append(profile.prefers_all_cores())
        profile.record_lone_latency(all_cores if chosen[-1] else one_core, 1, all_cores=chosen[-1])
    return chosen


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_measures_a_network_of_either_task(name: str, tiny_bundles: Path) -> None:
    bundle = load_bundle(tiny_bundles / name / "1")
    network = OnnxNetwork(bundle.file, threads=2)
    all_cores = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
    profile = measure_profile(bundle.predictor, all_cores)
    assert 0 < profile.seconds < 10
    assert profile.all_cores is all_cores
    assert measure_profile(bundle.predictor).all_cores is None


def test_a_repository_with_cores_measures_profiles(tiny_bundles: Path) -> None:
    assert Repository(tiny_bundles).get("colours").profile is None
    for cores in (1, 2):
        profile = Repository(tiny_bundles, cores=cores).get("colours").profile
        assert profile is not None
        assert (profile.all_cores is not None) == (cores > 1)


def test_prefers_the_faster_way_and_probes_the_other(tiny_bundles: Path) -> None:
    predictor = load_bundle(tiny_bundles / "colours" / "1").predictor
    for times, better in (
        ({"all_cores": 0.01, "one_core": 0.02}, True),
        ({"all_cores": 0.03, "one_core": 0.02}, False),
    ):
        chosen = simulate(ExecutionProfile(0.02, all_cores=predictor), **times)
        assert np.mean([choice == better for choice in chosen[50:]]) > 0.9
        assert (not better) in chosen[50:]


def test_recovers_from_a_temporary_slowdown(tiny_bundles: Path) -> None:
    profile = ExecutionProfile(0.02, all_cores=load_bundle(tiny_bundles / "colours" / "1").predictor)
    simulate(profile, all_cores=0.5, one_core=0.02, images=40)  # other load on the machine
    assert np.mean(simulate(profile, all_cores=0.01, one_core=0.02)[100:]) > 0.9


def test_a_single_core_never_prefers_all_cores() -> None:
    profile = ExecutionProfile(0.02)
    assert not any(profile.prefers_all_cores() for _ in range(200))


def test_batches_only_for_short_calls_by_the_fastest_one() -> None:
    profile = ExecutionProfile(0.03, batch=8)
    assert profile.batch == 1
    profile.record_latency(0.02, [1])
    assert profile.batch == 1
    profile.record_latency(0.009, [1])
    profile.record_latency(0.04, [1])
    assert profile.batch == 8


def test_images_unlike_the_usual_ones_do_not_change_how_a_network_is_run(tiny_bundles: Path) -> None:
    predictor = load_bundle(tiny_bundles / "squares" / "1").predictor
    profile = ExecutionProfile(0.06, pixels=640 * 480, batch=8, all_cores=predictor)
    for pixels in (640 * 8, 16 * 16, 4000 * 3000):
        profile.record_latency(0.002, [pixels])
        profile.record_latency(0.004, [640 * 480, pixels])
        profile.record_lone_latency(0.002, pixels, all_cores=False)
    assert profile.batch == 1
    assert np.mean([profile.prefers_all_cores() for _ in range(100)]) > 0.9  # not measured yet; one core takes 60 ms
    profile.record_latency(0.008, [600 * 400])
    assert profile.batch == 8


def test_a_network_that_became_slower_ends_its_batches_in_time() -> None:
    profile = ExecutionProfile(0.002, batch=8)
    profile.record_latency(1.0, [1])  # the machine was busy
    assert profile.batch == 8
    for _ in range(300):
        profile.record_latency(8 * 0.04, [1] * 8)
    assert profile.batch == 1
    profile.record_latency(8 * 0.001, [1] * 8)  # a share of a batch is no latency
    assert profile.batch == 1
    profile.record_latency(0.002, [1])
    assert profile.batch == 8
