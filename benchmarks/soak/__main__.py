"""Half an hour of everything at once: does the server grow, leak or slow down?

Each kind of request arrives at its own rate, about half of what two cores can do, while models are replaced, loaded and
unloaded. Every five seconds the server's memory, files and threads and the latencies are written to `results.csv`;
at the end they are drawn, and the last five minutes are compared with the first five after the warm-up.
"""

import argparse
import asyncio
import csv
import itertools
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.serving.models import ROOT
from benchmarks.soak.chart import draw
from benchmarks.soak.overload import percentile
from benchmarks.soak.processes import usage
from benchmarks.soak.server import Server, started
from benchmarks.soak.traffic import Traffic

RESULTS = Path(__file__).with_name("results.csv")
CHART = ROOT / "docs" / "operations" / "soak.svg"
_SAMPLE_SECONDS = 5.0
_WARM_UP_MINUTES = 12.0  # memory is flat after 6,000 distinct mutations, of which 8 are sent per second
_COMPARED_MINUTES = 5.0
_MAX_GROWTH = 0.02  # of memory
_MAX_DRIFT = 1.25  # of a class's median latency; the machine itself varies
_SHOWN = 10  # unexpected responses


@dataclass
class Kind:
    """A kind of request, its rate and what may be answered."""

    name: str
    per_second: float
    ask: Callable[[int], Awaitable[str]]  # given a number, returns the status
    allowed: frozenset[str]
    latencies: list[float] = field(default_factory=list)  # milliseconds, since the last sample
    statuses: Counter[str] = field(default_factory=Counter)


async def soak(server: Server, minutes: float, out: Path) -> list[str]:
    """Send the traffic and write samples; return what went wrong."""
    faults: list[str] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        traffic = Traffic(server, channel)
        kinds = [Kind(name, rate, ask, frozenset(allowed.split())) for name, rate, ask, allowed in traffic.kinds()]
        end = time.perf_counter() + 60 * minutes
        running = [asyncio.create_task(_send(kind, end, faults)) for kind in kinds]
        rows = await _sample(server, kinds, end, out)
        _, late = await asyncio.wait(running, timeout=90)
        faults += [f"{len(late)} kinds of request did not end"] * bool(late)
        traffic.close()
    for kind in kinds:
        print(f"{kind.name}: {dict(sorted(kind.statuses.items()))}")
    log = server.log.read_text()
    faults += [f"{text} in the log" for text in ("Traceback", '"level":"error"') if text in log]
    return faults + compare(rows)


async def _send(kind: Kind, end: float, faults: list[str]) -> None:
    """Send requests of a kind at its rate, whether or not earlier ones have been answered."""
    tasks: set[asyncio.Task[None]] = set()

    async def ask(number: int) -> None:
        start = time.perf_counter()
        try:
            status = await kind.ask(number)
        except Exception as error:
            status = f"{type(error).__name__}: {error}"[:200]
        kind.latencies.append(1000 * (time.perf_counter() - start))
        kind.statuses[status] += 1
        if status not in kind.allowed and len(faults) < _SHOWN:
            faults.append(f"{kind.name} {number}: {status}")

    start = time.perf_counter()
    for number in itertools.count():
        due = start + (number + 0.5) / kind.per_second
        if due > end:
            break
        await asyncio.sleep(due - time.perf_counter())
        task = asyncio.create_task(ask(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(tasks, timeout=60)


async def _sample(server: Server, kinds: list[Kind], end: float, out: Path) -> list[dict[str, float]]:
    start, rows = time.perf_counter(), []
    names = [f"{kind.name} {share}" for kind in kinds for share in ("p50", "p99")]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seconds", "memory", "files", "threads", *names])
        writer.writeheader()
        for number in itertools.count(1):
            await asyncio.sleep(start + number * _SAMPLE_SECONDS - time.perf_counter())
            used = await asyncio.to_thread(usage, server.pid)
            row = {"seconds": round(time.perf_counter() - start, 1), "memory": round(used.memory, 1)}
            row |= {"files": used.files, "threads": used.threads}
            for kind in kinds:
                latencies, kind.latencies = kind.latencies, []
                if latencies:
                    row[f"{kind.name} p50"] = round(statistics.median(latencies), 2)
                    row[f"{kind.name} p99"] = round(percentile(latencies, 0.99), 2)
            rows.append(row)
            writer.writerow(row)
            file.flush()
            if time.perf_counter() > end:
                break
    return rows


def compare(rows: list[dict[str, float]]) -> list[str]:
    """Print the first minutes after the warm-up beside the last ones; return what has grown."""
    last = rows[-1]["seconds"]
    warm = min(60 * _WARM_UP_MINUTES, last / 3)
    length = min(60 * _COMPARED_MINUTES, last / 6)
    windows = ([row for row in rows if low < row["seconds"] <= low + length] for low in (warm, last - length))
    first, final = (_medians(window) for window in windows)
    faults = []
    for name in sorted(first.keys() & final.keys() - {"seconds"}):
        before, after = first[name], final[name]
        grown = {
            "memory": after > (1 + _MAX_GROWTH) * before,
            "files": after > before + 2,
            "threads": after > before + 2,
        }.get(name, name.endswith("p50") and after > _MAX_DRIFT * before)
        print(f"{name}: {before:g} -> {after:g}{'  GROWN' if grown else ''}")
        if grown:
            faults.append(f"{name}: {before:g} at first, {after:g} at last")
    return faults


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    return {name: statistics.median(values) for name, values in columns.items()}


def read_rows(file: Path) -> list[dict[str, float]]:
    """Read samples that `soak` has written."""
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def main() -> int:
    """Run the command line; the exit status is 1 if something went wrong or grew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--chart", type=Path, default=CHART)
    options = parser.parse_args()
    with started(VITRINE_POLL_SECONDS="2", VITRINE_MODEL_CONTROL="true") as server:
        faults = asyncio.run(soak(server, options.minutes, options.results))
    commit = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        print("commit", subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())
    draw(read_rows(options.results), options.chart)
    print("\n".join(faults) or "nothing grew, every response was expected")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
