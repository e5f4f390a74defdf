"""`/metrics` as read by Prometheus."""

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tritonclient.grpc
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Serving = Callable[..., AbstractContextManager[Any]]


def scrape(url: str) -> dict[str, Metric]:
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def value(families: dict[str, Metric], family: str, sample: str, **labels: str) -> float:
    samples = families[family].samples if family in families else ()  # counters exist after their first increment
    return sum(found.value for found in samples if found.name == sample and labels.items() <= found.labels.items())


def test_the_exposition_is_valid(server: str, photograph: bytes) -> None:
    httpx.post(f"{server}/classify", content=photograph)
    httpx.post(f"{server}/detect", content=photograph)
    for name, family in scrape(server).items():
        assert name.startswith("vitrine_")
        assert family.documentation
        assert family.type != "unknown"
        assert not re.search("milli|kilo|total$", name)  # base units; the parser strips _total from counters
        if family.type == "histogram":
            series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
            counts = {}
            for sample in family.samples:
                labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
                if sample.name.endswith("_bucket"):
                    series.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
                elif sample.name.endswith("_count"):
                    counts[labels] = sample.value
            assert series
            for labels, buckets in series.items():
                assert buckets == sorted(buckets)
                assert [count for _, count in buckets] == sorted(count for _, count in buckets)
                assert buckets[-1] == (math.inf, counts[labels])


def test_requests_images_and_stages_are_counted(server: str, photograph: bytes) -> None:
    before = scrape(server)
    files = [("image", ("a", photograph))] * 3
    assert httpx.post(f"{server}/classify", files=files).status_code == 200
    assert httpx.post(f"{server}/classify", content=b"no image").status_code == 415
    after = scrape(server)

    def grown(family: str, sample: str, **labels: str) -> float:
        return value(after, family, sample, **labels) - value(before, family, sample, **labels)

    answered = {"route": "/classify", "model": "colours", "version": "1"}
    assert grown("vitrine_requests", "vitrine_requests_total", **answered, status="200") == 1
    assert grown("vitrine_requests", "vitrine_requests_total", **answered, status="415") == 1
    assert grown("vitrine_rejected", "vitrine_rejected_total", reason="unsupported_image_type") == 1
    assert grown("vitrine_images", "vitrine_images_total", model="colours") == 3
    assert grown("vitrine_pixels", "vitrine_pixels_total", model="colours") == 3 * 640 * 480
    assert grown("vitrine_batch_images", "vitrine_batch_images_count", model="colours") == 3
    assert grown("vitrine_request_seconds", "vitrine_request_seconds_count", route="/classify") == 2
    for stage, count in (("queue", 4), ("decode", 4), ("inference", 3)):
        assert grown("vitrine_stage_seconds", "vitrine_stage_seconds_count", stage=stage, model="colours") == count
    assert value(after, "vitrine_requests_in_flight", "vitrine_requests_in_flight") == 0  # a scrape does not count


def test_client_input_never_becomes_a_label(server: str, photograph: bytes) -> None:
    httpx.get(f"{server}/surprise-path")
    httpx.post(f"{server}/classify?model=surprise-model", content=photograph)
    httpx.get(f"{server}/models/surprise-name")
    httpx.request("SURPRISE", f"{server}/classify")
    families = scrape(server)
    text = httpx.get(f"{server}/metrics").text.lower()
    assert "surprise" not in text
    assert value(families, "vitrine_requests", "vitrine_requests_total", route="other", status="404") >= 1
    assert value(families, "vitrine_requests", "vitrine_requests_total", route="/models/{name}", status="404") >= 1


def test_calls_over_grpc_are_counted(running: Any) -> None:
    with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
        client.get_server_metadata()
    route = "/inference.GRPCInferenceService/ServerMetadata"
    assert value(scrape(running.url), "vitrine_requests", "vitrine_requests_total", route=route, status="OK") >= 1


def test_only_served_models_are_exposed(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_MODEL_CONTROL="true", VITRINE_WORKERS="2") as running:
        for names in (["colours", "squares"], ["squares"]):
            for _ in range(10):  # from either worker
                families = scrape(running.url)
                info = [sample.labels for sample in families["vitrine_model_info"].samples]
                assert sorted(labels["model"] for labels in info) == names
                assert {labels["task"] for labels in info} <= {"image-classification", "object-detection"}
                seconds = {
                    sample.labels["model"]: sample.value for sample in families["vitrine_model_load_seconds"].samples
                }
                assert sorted(seconds) == names
                assert all(0 < took < 60 for took in seconds.values())
            if names != ["squares"]:
                httpx.post(f"{running.url}/v2/repository/models/colours/unload").raise_for_status()


def test_any_worker_returns_the_sum_which_keeps_the_counts_of_killed_ones(
    serve: Serving, tiny_bundles: Path, photograph: bytes
) -> None:
    with serve(tiny_bundles, VITRINE_WORKERS="2") as running:
        for _ in range(12):
            httpx.post(f"{running.url}/classify", content=photograph).raise_for_status()

        def counted() -> float:
            families = scrape(running.url)
            assert value(families, "vitrine_requests_in_flight", "vitrine_requests_in_flight") == 0
            assert value(families, "vitrine_workers", "vitrine_workers") == 2
            assert 50e6 < value(families, "vitrine_resident_memory_bytes", "vitrine_resident_memory_bytes") < 5e9
            return value(families, "vitrine_requests", "vitrine_requests_total", route="/classify")

        assert {counted() for _ in range(10)} == {12}
        began = value(scrape(running.url), "vitrine_start_time_seconds", "vitrine_start_time_seconds")
        assert time.time() - 300 < began < time.time()
        ready = sum("ready:" in line for line in running.lines)
        os.kill(psutil.Process(running.process.pid).children()[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while sum("ready:" in line for line in running.lines) == ready:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert {counted() for _ in range(10)} == {12}
        assert value(scrape(running.url), "vitrine_worker_starts", "vitrine_worker_starts_total") == 3


@contextmanager
def constant_load(url: str, image: bytes) -> Iterator[list[Future[list[int]]]]:
    """Four clients that send one request after the other until the block ends; they return the statuses."""
    stop = threading.Event()

    def client() -> list[int]:
        statuses = []
        while not stop.is_set():
            statuses.append(httpx.post(f"{url}/classify", content=image, timeout=60).status_code)
        return statuses

    with ThreadPoolExecutor(4) as pool:
        try:
            yield [pool.submit(client) for _ in range(4)]
        finally:
            stop.set()


def gauges(url: str, *names: str) -> list[float]:
    families = scrape(url)
    return [value(families, name, name) for name in names]


def test_the_gauges_of_a_killed_worker_are_dropped(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    names = ("vitrine_requests_in_flight", "vitrine_running_images", "vitrine_workers")
    with serve(slow_bundle, VITRINE_WORKERS="2", VITRINE_THREADS="1") as running:
        deadline = time.monotonic() + 90
        with constant_load(running.url, bright(255)) as clients:
            while gauges(running.url, *names)[1] != 2:
                assert time.monotonic() < deadline
            psutil.Process(running.process.pid).children()[0].kill()
            failed = wait(clients, 60, FIRST_EXCEPTION).done
            assert all(isinstance(client.exception(0), httpx.HTTPError) for client in failed)
            assert failed
        while gauges(running.url, *names) != [0, 0, 2]:  # the other worker serves until there are two again
            assert time.monotonic() < deadline


def test_queued_and_rejected_requests_are_exposed(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    names = ("vitrine_queue_images", "vitrine_running_images")
    with serve(slow_bundle, VITRINE_THREADS="1", VITRINE_MAX_QUEUE="1") as running:
        deadline = time.monotonic() + 60
        with constant_load(running.url, bright(150)) as clients:
            while gauges(running.url, *names) != [1, 1]:
                assert time.monotonic() < deadline
        statuses = [status for client in clients for status in client.result()]
        families = scrape(running.url)
        refused = value(families, "vitrine_rejected", "vitrine_rejected_total", reason="overloaded")
        assert refused == statuses.count(503) >= 1
        assert set(statuses) == {200, 503}
        while gauges(running.url, *names) != [0, 0]:  # updated a few times a second
            assert time.monotonic() < deadline


def test_the_dashboard_queries_existing_metrics(root: Path, server: str, photograph: bytes) -> None:
    httpx.post(f"{server}/classify", content=photograph)
    httpx.post(f"{server}/classify", content=b"no image")
    families = scrape(server)
    labels: dict[str, set[str]] = {}
    for family in families.values():
        for sample in family.samples:
            labels.setdefault(sample.name, {"instance"}).update(sample.labels)  # Prometheus adds the instance
    growing = {s.name for f in families.values() if f.type in ("counter", "histogram") for s in f.samples}
    dashboard = json.loads((root / "deploy/grafana/vitrine.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queried = set()
    for query in queries:
        assert all(query.count(a) == query.count(b) for a, b in ("()", "{}", "[]")), query
        selected = re.findall(r"(vitrine_[a-z_]+)\{([^}]*)\}", query)
        assert selected, query
        grouped = {name for group in re.findall(r"by \(([^)]*)\)", query) for name in group.split(", ")}
        for name, matchers in selected:
            queried.add(name)
            assert grouped | set(re.findall(r"(\w+)=~", matchers)) <= labels[name], query
            assert (f"rate({name}" in query) <= (name in growing), query
        assert set(re.findall(r"rate\((\w+)", query)) <= growing, query
    displayed = {re.sub("_(bucket|sum|count)$", "", name) for name in queried}
    assert displayed == {
        re.sub("_(bucket|sum|count)$", "", name) for name in labels
    }  # every metric is in the dashboard
    assert displayed == set(re.findall("`(vitrine_[a-z_]+)`", (root / "docs/observability.md").read_text()))


def test_the_dashboard_is_valid(root: Path) -> None:
    dashboard = json.loads((root / "deploy/grafana/vitrine.json").read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "table")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            used = set(re.findall(r"\$([a-z]+)", target["expr"]))
            assert used <= variables.keys()
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & covered
        covered |= cells


def test_the_scrape_example_is_valid(root: Path) -> None:
    configuration = yaml.safe_load((root / "deploy/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    assert job["metrics_path"] == "/metrics"


@pytest.mark.parametrize("path", ["/metrics", "/livez"])
def test_probes_and_scrapes_are_counted(path: str, server: str) -> None:
    httpx.get(server + path)
    assert value(scrape(server), "vitrine_requests", "vitrine_requests_total", route=path) >= 1
