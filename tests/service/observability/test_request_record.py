"""The record of a request."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitrine.service.observability.request_record import STAGES, RequestRecord


def test_stages_of_one_name_are_added_up() -> None:
    record = RequestRecord()
    record.add_stage("decode", 1_000_000_000, 1_500_000_000)
    record.add_stage("decode", 1_200_000_000, 1_300_000_000)  # in parallel with the first
    record.add_stage("inference", 1_500_000_000, 3_500_000_000)
    assert {name: record.seconds(name) for name in STAGES} == {"decode": 0.6, "queue": 0.0, "inference": 2.0}


def test_a_failed_stage_is_recorded() -> None:
    record = RequestRecord()
    with pytest.raises(ValueError, match="broken"), record.stage("decode"):
        raise ValueError("broken")
    (stage,) = record.stages
    assert stage.name == "decode"
    assert 0 <= stage.end - stage.start < 1e9


def test_adding_stages_is_thread_safe() -> None:
    record = RequestRecord()

    def work(_: int) -> None:
        for _ in range(100):
            with record.stage("inference"):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(record.stages) == 800


def test_each_record_has_its_own_id() -> None:
    assert len({RequestRecord().request_id for _ in range(1000)}) == 1000


@pytest.mark.parametrize(("path", "quiet"), [("/livez", True), ("/metrics", True), ("/models", False), ("/", False)])
def test_probes_and_scrapes_are_quiet(path: str, quiet: bool) -> None:
    assert RequestRecord(path=path).quiet is quiet


def test_adding_images_is_thread_safe() -> None:
    record = RequestRecord()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record.add_image, [3] * 1000))
    assert (record.images, record.pixels) == (1000, 3000)


def test_durations_do_not_depend_on_the_clock_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    past = iter(range(10**18, 0, -(10**12)))
    monkeypatch.setattr(time, "time_ns", lambda: next(past))
    monkeypatch.setattr(time, "time", lambda: next(past) / 1e9)
    record = RequestRecord()
    for _ in range(3):
        with record.stage("decode"):
            pass
    assert 0 <= record.seconds("decode") < 60


@pytest.mark.parametrize(
    ("key", "client", "sender"),
    [
        ("ci", "10.0.0.1:5", "ci"),
        ("", "10.0.0.1:5", "10.0.0.1"),
        ("", "::1:5", "::/64"),
        ("", "2001:db8::7%eth0:5", "2001:db8::/64"),
        ("", "2001:db8:0:1::7:5", "2001:db8:0:1::/64"),
        ("", "::ffff:192.0.2.7:5", "192.0.2.7"),  # IPv4 on a socket for both
        ("", "no address:5", "no address"),
        ("", "", ""),
    ],
)
def test_the_sender_is_the_key_or_the_address(key: str, client: str, sender: str) -> None:
    assert RequestRecord(key=key, client=client).sender == sender
