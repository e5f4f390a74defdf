"""Measure Vitrine beside the machine's limit and beside its peers: `make bench-serving`.

A round starts every server in turn, asks it once and compares the answer with the right one, warms it up, and measures
it at 1, 8 and 32 connections; directly before, the ceiling is measured (`ceiling.py`). Ratios are taken within a round;
the report has their medians and ranges.
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

from benchmarks.serving.load import ask, overload
from benchmarks.serving.models import ROOT, WORK, Model, models
from benchmarks.serving.report import report
from benchmarks.serving.servers import PEERS, PORT, SERVERS, Server, ask_once, expected, pixels, running

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
    chosen = parser.parse_args()
    known = models()
    results: dict[str, Any] = defaultdict(list)
    for number in range(chosen.rounds):
        for model in (known[name] for name in chosen.models):
            for server in (SERVERS[name] for name in chosen.servers):
                results["cells"].append(_compare(server, model, chosen.seconds))
                _save(results, chosen.out)
                print(number, server.name, model.name, _short(results["cells"][-1]), flush=True)
        if "vitrine" in chosen.servers:
            results["tensors"].append(_compare(SERVERS["vitrine, v2 binary"], known["vit-ti"], chosen.seconds))
            results["no-op"].append(_no_op(known["no-op"], chosen.seconds))
            results["overload"].append(_overload(SERVERS["vitrine"], known["vit-ti"]))
            _save(results, chosen.out)
            print(number, results["no-op"][-1], results["overload"][-1], flush=True)
    text = report(results)
    chosen.out.with_suffix(".md").write_text(text)
    print(text)


def _save(results: dict[str, Any], out: Path) -> None:
    """After each server: one that does not start ends the run."""
    out.with_suffix(".json").write_text(json.dumps(results, indent=1))


def _compare(server: Server, model: Model, seconds: int) -> dict[str, Any]:
    ceiling = _ceiling(model, seconds, tensors="binary" in server.name)
    with running(server, model) as process:
        request = server.request(model)
        found, right = server.answer(ask_once(request)), expected(model)
        if abs(found - right) > 0.02 * max(right, 0.01):
            raise RuntimeError(f"{server.name}, {model.name}: expected a best score of {right}, found {found}")
        body = WORK / "body"
        body.write_bytes(request.body)
        windows = {}
        for connections in CONNECTIONS:
            url = f"http://127.0.0.1:{PORT}{request.path}"
            ask(url, connections, _WARM_UP_SECONDS, body=body, headers=request.headers)
            windows[connections] = asdict(ask(url, connections, seconds, body=body, headers=request.headers))
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
    found: dict[str, float] = json.loads(text)
    return found


def _no_op(model: Model, seconds: int) -> dict[str, Any]:
    """One worker, a network that computes nothing, one request in a hundred traced: the way there and back."""
    found = {}
    for name in ("vitrine", "vitrine, multipart"):
        with running(SERVERS[name], model):
            request = SERVERS[name].request(model)
            body = WORK / "body"
            body.write_bytes(request.body)
            url = f"http://127.0.0.1:{PORT}"
            ask(url + request.path, 32, _WARM_UP_SECONDS, body=body, headers=request.headers)
            found[name] = asdict(ask(url + request.path, 32, seconds, body=body, headers=request.headers))
            if name == "vitrine":
                found["no image"] = asdict(ask(url + "/v2", 32, seconds))
    return found


def _overload(server: Server, model: Model) -> dict[str, Any]:
    """Throughput at 32 connections, then 256 that ask again at once whatever they are told."""
    with running(server, model):
        request = server.request(model)
        body = WORK / "body"
        body.write_bytes(request.body)
        peak = ask(f"http://127.0.0.1:{PORT}{request.path}", 32, 4, body=body, headers=request.headers)
        found = overload(
            PORT, request.path, request.body, connections=256, seconds=_OVERLOAD_SECONDS, probe=server.health
        )
        return {"peak": asdict(peak), **asdict(found)}


def _short(cell: dict[str, Any]) -> str:
    rates = (f"c{count} {window['rate']:.0f}/s p50 {window['p50']:.1f}" for count, window in cell["windows"].items())
    ceiling = cell["ceiling"]
    return f"{', '.join(rates)} ms; ceiling {ceiling['rate']:.0f}/s, {ceiling['milliseconds']:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
