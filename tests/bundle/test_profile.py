"""Execution profiles: the measurements and the choices made from them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vitrine.bundle.loading import load_bundle
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing
from vitrine.bundle.predictors import Classifier, Detector, make_predictor
from vitrine.bundle.profile import ExecutionProfile, measure_profile
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import OnnxNetwork

CHANNELS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def classifier() -> Classifier:
    return Classifier(lambda **inputs: [], ClassificationPreprocessing(input_size=(1, 1), **CHANNELS), ["a"])


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


@pytest.mark.parametrize(("all_cores", "first"), [(0.01, []), (0.03, [1])], ids=["faster", "slower"])
def test_the_slower_way_is_probed_seldom(all_cores: float, first: list[int]) -> None:
    """First to know it at all, then at the 4th, 8th, 16th and 32nd lone image, and at every 50th."""
    chosen = simulate(ExecutionProfile(0.02, all_cores=classifier()), all_cores=all_cores, one_core=0.02)
    slower = [number for number, choice in enumerate(chosen, start=1) if choice != (all_cores < 0.02)]
    assert slower == [*first, 4, 8, 16, 32, 50, 100, 150, 200]


def test_a_short_lone_latency_counts_at_once_and_a_long_one_slowly() -> None:
    """By a tenth of the difference: 10, 14, 17.6 and 20.8 ms on all cores, beside 20 ms on one."""
    profile = ExecutionProfile(0.02, all_cores=classifier())
    for latencies, preferred in (([0.01], True), ([0.05, 0.05], True), ([0.05], False)):
        for seconds in latencies:
            profile.record_lone_latency(seconds, 1, all_cores=True)
        assert profile.prefers_all_cores() == preferred
    profile = ExecutionProfile(0.02, all_cores=classifier())
    for seconds, all_cores, preferred in ((0.03, True, False), (0.019, True, True), (0.018, False, False)):
        profile.record_lone_latency(seconds, 1, all_cores=all_cores)
        assert profile.prefers_all_cores() == preferred


@pytest.mark.parametrize(("seconds", "batch"), [(0.0149, 8), (0.015, 1), (1.0, 1)])
def test_only_short_calls_are_batched(seconds: float, batch: int) -> None:
    assert ExecutionProfile(seconds, batch=8).batch == batch
    assert ExecutionProfile(seconds).batch == 1


def test_a_busy_machine_does_not_end_batches_and_a_slower_network_does() -> None:
    """By a hundredth of the difference with each call: from 10 ms, 15 are reached after 69 calls of 20."""
    profile = ExecutionProfile(0.01, batch=8)
    calls = 0
    while profile.batch == 8:
        profile.record_latency(0.02, [1])
        calls += 1
    assert calls == 69


def test_the_share_of_an_image_in_a_batch_counts_slowly_in_both_directions() -> None:
    """From 20 ms, 15 are reached after 69 calls of 10 for each image."""
    profile = ExecutionProfile(0.02, batch=8)
    calls = 0
    while profile.batch == 1:
        profile.record_latency(0.08, [1] * 8)
        calls += 1
    assert calls == 69
    for _ in range(1000):
        profile.record_latency(0.08, [1] * 8)
    assert profile.batch == 8


@pytest.mark.parametrize(
    ("pixels", "counts"),
    [([100], True), ([50], True), ([49], False), ([200], True), ([201], False), ([201, 100], False), ([1], False)],
)
def test_images_unlike_the_measured_one_say_nothing(pixels: list[int], counts: bool) -> None:
    """Of less than half or more than twice its pixels."""
    profile = ExecutionProfile(0.03, pixels=100, batch=8, all_cores=classifier())
    for _ in range(500):
        profile.record_latency(0.001 * len(pixels), pixels)
    assert (profile.batch == 8) == counts
    profile.record_lone_latency(0.02, 100, all_cores=True)
    profile.record_lone_latency(0.001, pixels[0], all_cores=False)
    assert profile.prefers_all_cores() != (counts or pixels[0] == 100)


class Timed:
    """A network whose calls take so many seconds; the last number is repeated."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.shapes = seconds, list[tuple[int, ...]]()

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        end = time.perf_counter() + self.seconds[min(len(self.shapes), len(self.seconds) - 1)]
        self.shapes.append(inputs["pixels"].shape)
        while time.perf_counter() < end:
            pass
        return []


@pytest.mark.parametrize(("seconds", "calls"), [((0,), 4), ((0.031,), 1), ((0.02,), 2), ((0.01, 0), 4)])
def test_a_network_is_measured_with_few_calls(seconds: tuple[float, ...], calls: int) -> None:
    """At most four, and none after 30 ms; the shortest counts."""
    network = Timed(*seconds)
    profile = measure_profile(Classifier(network, ClassificationPreprocessing(input_size=(16, 24), **CHANNELS), ["a"]))
    assert len(network.shapes) <= calls  # fewer on a busy machine
    assert min(seconds) <= profile.seconds
    assert network.shapes[0] == (1, 16, 24, 3)
    assert profile.pixels == 16 * 24


def test_a_detector_is_measured_with_an_image_of_a_photographs_shape() -> None:
    network = Timed(0)
    preprocessing = DetectionPreprocessing(shortest_edge=48, longest_edge=640, **CHANNELS)
    profile = measure_profile(Detector(network, preprocessing, ["a"]))
    assert network.shapes[0] == (1, 48, 64, 3)
    assert (profile.pixels, profile.batch) == (48 * 64, 8)


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
