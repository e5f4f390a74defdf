"""Test the claims of `docs/claims.md`: train the networks, then draw the plots and fill the tables.

    python -m benchmarks.claims run --data DATA --jobs 2
    python -m benchmarks.claims plot

DATA contains `cifar10` and `bccd`. Each training uses one core; interrupted ones are resumed.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import measure
from benchmarks.claims.report import RESULTS, read_results, write_report
from benchmarks.claims.trials import Trial, trials

RUNS = Path("runs/claims")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the trainings that are not in results.jsonl yet")
    claims = list(dict.fromkeys(trial.claim for trial in trials()))
    run.add_argument("claims", nargs="*", metavar="CLAIM", help=f"all by default: {', '.join(claims)}")
    run.add_argument("--data", type=Path, required=True, help="folder with cifar10 and bccd")
    run.add_argument("--jobs", type=int, default=1, help="parallel trainings, one core each")
    commands.add_parser("plot", help="write docs/claims/*.svg and the tables of docs/claims.md")
    options = parser.parse_args()
    if options.command == "plot":
        write_report(read_results())
        return
    for claim in options.claims:
        if claim not in claims:
            parser.error(f"CLAIM: expected {' or '.join(claims)}, found {claim!r}")
    results = read_results()
    remaining = [t for t in trials() if t not in results and t.claim in (options.claims or claims)]
    with ProcessPoolExecutor(
        options.jobs,
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1,
    ) as pool:
        futures = {pool.submit(measure.run, trial, options.data, RUNS): trial for trial in remaining}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                if outcome is None:
                    break
                _append(futures[future], outcome)
                shutil.rmtree(RUNS / futures[future].name, ignore_errors=True)
                shown = {key: value for key, value in outcome.items() if not isinstance(value, list)}
                print(time.strftime("%H:%M"), f"{number}/{len(remaining)}", futures[future].name, shown, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _append(trial: Trial, outcome: dict[str, Any]) -> None:
    row = {**vars(trial), "factors": dict(trial.factors), "outcome": outcome, "torch": torch.__version__}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
