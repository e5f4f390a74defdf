"""Compare Vitrine with the machine's limit and other servers (`make bench-serving`).

Each round starts every server, checks one response, warms it up and measures it at 1, 8 and 32 connections, right after
the ceiling (`ceiling.py`). Ratios are taken within a round; the report has their medians and ranges.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.load import overload, run_wrk
from benchmarks.serving.models import ROOT, WORK, Model, load_models
from benchmarks.serving.report import report
from benchmarks.serving.servers import PEERS, PORT, SERVERS, Server, expected, pixels, running, send

CONNECTIONS = (1, 8, 32)
_COMPARED = ("vit-ti", "vit-small-images", "vit-cifar10", "detr-bccd")
_SERVED = ("vitrine", *PEERS)
_WARM_UP_SECONDS = 1
_OVERLOAD_SECONDS = 10.0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--servers", nargs="+", default=_SERVED, choices=_SERVED, metavar="SERVER")
    parser.add_argument("--models", nargs="+", default=_COMPARED, choices=_COMPARED, metavar="MODEL")
    parser.add_argument("--out", type=Path, default=WORK / "report")
    options = parser.parse_args()
    models = load_models()
    results: dict[str, Any] = defaultdict(list)
    for round_number in range(options.rounds):
        for model in (models[name] for name in options.models):
            for server in (SERVERS[name] for name in options.servers):
                results["cells"].append(_compare(server, model, options.seconds))
                _save(results, options.out)
                print(round_number, server.name, model.name, _short(results["cells"][-1]), flush=True)
        if "vitrine" in options.servers:
            results["tensors"].append(_compare(SERVERS["vitrine, v2 binary"], models["vit-ti"], options.seconds))
            results["no-op"].append(_no_op(models["no-op"], options.seconds))
            results["overload"].append(_overload(SERVERS["vitrine"], models["vit-ti"]))
            _save(results, options.out)
            print(round_number, results["no-op"][-1], results["overload"][-1], flush=True)
    text = report(results)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def _save(results: dict[str, Any], out: Path) -> None:
    """Save the results so far: a server that does not start ends the run."""
    out.with_suffix(".json").write_text(json.dumps(results, indent=1))


def _compare(server: Server, model: Model, seconds: int) -> dict[str, Any]:
    ceiling = _ceiling(model, seconds, tensors="binary" in server.name)
    with running(server, model) as process:
        request = server.request(model)
        score, expected_score = server.score(send(request)), expected(model)
        if abs(score - expected_score) > 0.02 * max(expected_score, 0.01):
            raise RuntimeError(f"{server.name}, {model.name}: expected a best score of {expected_score}, found {score}")
        body = WORK / "body"
        body.write_bytes(request.body)
        windows = {}
        for connections in CONNECTIONS:
            url = f"http://127.0.0.1:{PORT}{request.path}"
            run_wrk(url, connections, _WARM_UP_SECONDS, body=body, headers=request.headers)
            windows[connections] = asdict(run_wrk(url, connections, seconds, body=body, headers=request.headers))
        cell = {"server": server.name, "model": model.name, "ceiling": ceiling, "windows": windows}
        return {**cell, "memory": process.memory(), "start": process.seconds}


def _ceiling(model: Model, seconds: int, *, tensors: bool) -> dict[str, float]:
    image = model.image
    if tensors:
        image = WORK / f"{model.name}.npy"
        np.save(image, pixels(model))
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "benchmarks.serving.ceiling"]
    arguments = [str(model.bundle), str(image), str(seconds)]
    text = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ceiling: dict[str, float] = json.loads(text)
    return ceiling


def _no_op(model: Model, seconds: int) -> dict[str, Any]:
    """Measure the overhead of serving: a network that computes nothing, one worker, 1 % of requests traced."""
    windows = {}
    for name in ("vitrine", "vitrine, multipart"):
        with running(SERVERS[name], model):
            request = SERVERS[name].request(model)
            body = WORK / "body"
            body.write_bytes(request.body)
            url = f"http://127.0.0.1:{PORT}"
            run_wrk(url + request.path, 32, _WARM_UP_SECONDS, body=body, headers=request.headers)
            windows[name] = asdict(run_wrk(url + request.path, 32, seconds, body=body, headers=request.headers))
            if name == "vitrine":
                windows["no image"] = asdict(run_wrk(url + "/v2", 32, seconds))
    return windows


def _overload(server: Server, model: Model) -> dict[str, Any]:
    """Measure throughput at 32 connections, then under 256 clients that retry immediately."""
    with running(server, model):
        request = server.request(model)
        body = WORK / "body"
        body.write_bytes(request.body)
        peak = run_wrk(f"http://127.0.0.1:{PORT}{request.path}", 32, 4, body=body, headers=request.headers)
        overloaded = overload(
            PORT, request.path, request.body, connections=256, seconds=_OVERLOAD_SECONDS, probe=server.health
        )
        return {"peak": asdict(peak), **asdict(overloaded)}


def _short(cell: dict[str, Any]) -> str:
    rates = (f"c{count} {window['rate']:.0f}/s p50 {window['p50']:.1f}" for count, window in cell["windows"].items())
    ceiling = cell["ceiling"]
    return f"{', '.join(rates)} ms; ceiling {ceiling['rate']:.0f}/s, {ceiling['milliseconds']:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
