"""What is noted of one request."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from vitrine.service.observability.request_record import STAGES, Observation


def test_stages_of_one_name_are_added_up() -> None:
    observation = Observation()
    observation.add("decode", 1_000_000_000, 1_500_000_000)
    observation.add("decode", 1_200_000_000, 1_300_000_000)  # side by side with the first
    observation.add("inference", 1_500_000_000, 3_500_000_000)
    assert {name: observation.seconds(name) for name in STAGES} == {"decode": 0.6, "queue": 0.0, "inference": 2.0}


def test_a_stage_that_fails_is_noted() -> None:
    observation = Observation()
    with pytest.raises(ValueError, match="broken"), observation.stage("decode"):
        raise ValueError("broken")
    (stage,) = observation.stages
    assert stage.name == "decode"
    assert 0 <= stage.end - stage.start < 1e9


def test_threads_note_their_stages_at_the_same_time() -> None:
    observation = Observation()

    def work(_: int) -> None:
        for _ in range(100):
            with observation.stage("inference"):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(observation.stages) == 800


def test_each_observation_has_an_id_of_its_own() -> None:
    assert len({Observation().request_id for _ in range(1000)}) == 1000


@pytest.mark.parametrize(("path", "quiet"), [("/livez", True), ("/metrics", True), ("/models", False), ("/", False)])
def test_probes_and_scrapes_are_quiet(path: str, quiet: bool) -> None:
    assert Observation(path=path).quiet is quiet


def test_images_are_counted_that_threads_see_at_the_same_time() -> None:
    observation = Observation()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(observation.saw, [3] * 1000))
    assert (observation.images, observation.pixels) == (1000, 3000)
