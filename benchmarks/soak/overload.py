"""Ten times as many requests as the server can answer: what it still answers, and how soon it is back to normal.

Requests arrive at a fixed rate, whether or not earlier ones have been answered (an open loop). The generator is its own
process, but shares the cores with the server: a detector makes requests that cost the server far more than the
generator. In the end all clients leave, whether or not they have their answers.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

from benchmarks.serving.models import ROOT
from benchmarks.soak.client import Client, encode_form, encode_request, wait_until_idle
from benchmarks.soak.processes import usage
from benchmarks.soak.server import started

PHOTOGRAPH = ROOT / "examples" / "blood.jpg"
_CONNECTIONS = 16  # of the closed loop that finds the capacity
_PROBE_SECONDS = 0.02  # between probes
_NORMAL = 1.5  # a latency up to this many times the idle one is normal again
_RECOVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Overload:
    """What was measured. Latencies are in milliseconds, memory is in MiB."""

    capacity: float  # requests per second in a closed loop
    offered: float  # requests per second
    sent: float  # requests per second that the generator managed to send
    generator: float  # cores that the generator took from the server
    goodput: float  # requests per second that were answered with 200 while the overload lasted
    statuses: dict[str, int]  # responses by status; "lost": none; "left": the client was still waiting when it left
    idle: float  # median latency of a lone request before
    accepted_p99: float  # latency of the answers with 200
    probe_p99: float
    probe_max: float
    memory_before: float
    memory_during: float  # largest
    memory_after: float
    recovery: float  # seconds from when all have left until a lone request takes as long as before


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed; 0 if there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def capacity(port: int, request: bytes, seconds: float) -> float:
    """Return the requests per second that are answered in a closed loop."""
    client, start, answered = Client(port), time.perf_counter(), 0

    async def ask() -> None:
        nonlocal answered
        while time.perf_counter() < start + seconds:
            answer = await client.ask(request)
            answered += answer.status == 200

    await asyncio.gather(*(ask() for _ in range(_CONNECTIONS)))
    client.close()
    return answered / (time.perf_counter() - start)  # the last ones are answered later


async def latency(client: Client, request: bytes, count: int) -> float:
    """Return the median latency of lone requests, in milliseconds."""
    return 1000 * statistics.median([(await client.ask(request)).seconds for _ in range(count)])


async def _until_normal(client: Client, request: bytes, idle: float) -> float:
    """Return for how many seconds from now a lone request takes longer than normal."""
    start = time.perf_counter()
    while time.perf_counter() - start < _RECOVERY_SECONDS:
        answer = await client.ask(request)
        if answer.status == 200 and 1000 * answer.seconds <= _NORMAL * idle:
            return time.perf_counter() - start - answer.seconds
    return _RECOVERY_SECONDS


async def attack(port: int, pid: int, request: bytes, *, factor: float, seconds: float) -> Overload:
    """Find the capacity, send `factor` times as many requests for some time, and watch the server recover."""
    watcher = Client(port)
    await latency(watcher, request, 20)  # a first measurement warms up
    found = await capacity(port, request, max(2.0, seconds / 10))
    idle = await latency(watcher, request, 40)
    before = usage(pid).memory
    client, statuses, accepted, probes = Client(port), Counter[str](), list[float](), list[float]()
    memory, good, tasks = [before], 0, set[asyncio.Task[None]]()
    start, used = time.perf_counter(), time.process_time()
    end = start + seconds

    async def ask() -> None:
        nonlocal good
        try:
            answer = await client.ask(request, timeout=60)
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            statuses["lost"] += 1
            return
        statuses[str(answer.status)] += 1
        if answer.status == 200:
            accepted.append(1000 * answer.seconds)
            good += time.perf_counter() < end

    async def probe() -> None:
        probing = Client(port)
        while time.perf_counter() < end:
            answer = await probing.ask(encode_request("GET", "/livez"))
            assert answer.status == 200
            probes.append(1000 * answer.seconds)
            await asyncio.sleep(_PROBE_SECONDS)
        probing.close()

    async def sample() -> None:
        while time.perf_counter() < end:
            memory.append((await asyncio.to_thread(usage, pid)).memory)
            await asyncio.sleep(1)

    watching = asyncio.gather(probe(), sample())
    sent = 0
    while (now := time.perf_counter()) < end:
        due = int((now - start) * factor * found)
        for _ in range(due - sent):
            task = asyncio.create_task(ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        sent = max(sent, due)
        await asyncio.sleep(0.002)
    generator = (time.process_time() - used) / seconds
    statuses["left"] = len(tasks)
    for task in tasks:
        task.cancel()
    recovery = await _until_normal(watcher, request, idle)
    await watching
    client.close()
    watcher.close()
    return Overload(
        capacity=found,
        offered=factor * found,
        sent=sent / seconds,
        generator=generator,
        goodput=good / seconds,
        statuses=dict(sorted(statuses.items())),
        idle=idle,
        accepted_p99=percentile(accepted, 0.99),
        probe_p99=percentile(probes, 0.99),
        probe_max=max(probes, default=0.0),
        memory_before=before,
        memory_during=max(memory),
        memory_after=usage(pid).memory,
        recovery=recovery,
    )


def generate(port: int, pid: int, *, factor: float, seconds: float, pictures: int = 1) -> Overload:
    """Run the attack in a process of its own, with requests of so many pictures."""
    arguments = [port, pid, "--factor", factor, "--seconds", seconds, "--pictures", pictures]
    command = [sys.executable, "-m", "benchmarks.soak.overload", "--attack", *map(str, arguments)]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return Overload(**json.loads(text))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.overload", description=__doc__)
    parser.add_argument("--factor", type=float, default=10.0, help="how many times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pictures", type=int, default=8, help="in a request")
    parser.add_argument("--attack", nargs=2, type=int, metavar=("PORT", "PID"), help="attack a running server")
    options = parser.parse_args()
    if options.attack:
        body, content_type = encode_form(*[PHOTOGRAPH.read_bytes()] * options.pictures)
        request = encode_request("POST", "/detect?model=detr-bccd", body, Content_Type=content_type)
        port, pid = options.attack
        result = asyncio.run(attack(port, pid, request, factor=options.factor, seconds=options.seconds))
        print(json.dumps(asdict(result)))
        return
    many = {f"VITRINE_MAX_CONNECTIONS{limit}": "4000" for limit in ("", "_PER_CLIENT")}  # the generator is many clients
    with started(**many) as server:
        target = server.port, server.pid
        result = generate(*target, factor=options.factor, seconds=options.seconds, pictures=options.pictures)
        wait_until_idle(server.url)
    print(json.dumps(asdict(result), indent=1))
    print(table_rows(result))


def table_rows(result: Overload) -> str:
    """Format a result as rows of docs/operations.md."""
    total = sum(result.statuses.values())
    lines = [
        f"| requests per second: capacity, sent | {result.capacity:.0f}, {result.sent:.0f} "
        f"(taking {result.generator:.2f} cores) | |",
        f"| answered with 200 per second, share of the capacity | {result.goodput / result.capacity:.2f} | 0.90 |",
        f"| responses | {', '.join(f'{status}: {n}' for status, n in result.statuses.items())} of {total} | |",
        f"| p99 of the answers with 200 | {result.accepted_p99:.0f} ms | 30,000 ms |",
        f"| p99 of the probe (longest) | {result.probe_p99:.0f} ms ({result.probe_max:.0f}) | 50 ms |",
        f"| memory before, during, after | {result.memory_before:.0f}, {result.memory_during:.0f}, "
        f"{result.memory_after:.0f} MiB | flat |",
        f"| back to {_NORMAL} times the idle latency ({result.idle:.0f} ms) | {result.recovery:.1f} s | 2 s |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
