"""The cost of `POST /explain`: beside the plain request, and to others who send plain requests.

    python -m benchmarks.explaining

A server of the shipped bundles runs as `make serve` does. For each bundle and method, a plain request and an explained
one alternate; a ratio is that of two neighbours. Then four clients classify a photograph for some seconds, alone and
while others ask for explanations without a pause.
"""

import statistics
import threading
import time

import httpx

from benchmarks.serving.models import ROOT
from benchmarks.soak.server import started

ROUNDS, SECONDS, CLIENTS = 15, 8.0, 4
EXAMPLES = {"detr-bccd": "blood.jpg"}


def milliseconds(client: httpx.Client, path: str, image: bytes) -> float:
    """Time a request, which must succeed."""
    started = time.perf_counter()
    client.post(path, content=image).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def costs(client: httpx.Client) -> None:
    """Print the cost of each method of each bundle."""
    print("| bundle | method | plain, ms | explained, ms | ratio | runs of the network |\n|---|---|---|---|---|---|")
    for model in client.get("models").json()["models"]:
        name = model["name"]
        image = (ROOT / "examples" / EXAMPLES.get(name, "cat.jpg")).read_bytes()
        route = {"object-detection": "detect"}.get(model["task"], "classify")
        for method in model["explanations"]:
            point = "&x=9&y=9" if method == "encoder-attention" else ""
            query = f"explain?model={name}&method={method}{point}"
            pairs = []
            for turn in range(2 if method == "occlusion" else ROUNDS):
                plain = milliseconds(client, f"{route}?model={name}", image)
                explained = milliseconds(client, query, image)
                pairs += [(plain, explained)] if turn else []  # the first loads the graph
            runs = client.post(query, content=image).json()["images_computed"]
            ratio = statistics.median(explained / plain for plain, explained in pairs)
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            print(f"| {name} | {method} | {medians[0]:.1f} | {medians[1]:.1f} | {ratio:.2f} | {runs} |", flush=True)


def under_load(url: str, query: str) -> None:
    """Print the latency of plain requests, alone and beside explanations."""
    image = (ROOT / "examples" / "cat.jpg").read_bytes()

    def classify(explainers: int) -> list[float]:
        times: list[float] = []
        done = threading.Event()

        def repeat(path: str, kept: list[float] | None) -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while not done.is_set():
                    taken = milliseconds(client, path, image)
                    if kept is not None:
                        kept.append(taken)

        threads = [threading.Thread(target=repeat, args=("classify", times)) for _ in range(CLIENTS)]
        threads += [threading.Thread(target=repeat, args=(query, None)) for _ in range(explainers)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS)
        done.set()
        for thread in threads:
            thread.join()
        return times

    for _ in range(3):
        for explainers in (0, CLIENTS):
            times = sorted(classify(explainers))
            p50, p95 = times[len(times) // 2], times[len(times) * 95 // 100]
            rate = len(times) / SECONDS
            print(f"{explainers} by {query}: {rate:.1f}/s, p50 {p50:.1f} ms, p95 {p95:.1f} ms", flush=True)


def main() -> None:
    """Print the tables."""
    with started(VITRINE_BUNDLES=str(ROOT / "bundles")) as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            costs(client)
        for query in ("explain", "explain?method=occlusion"):
            under_load(server.url, query)


if __name__ == "__main__":
    main()
