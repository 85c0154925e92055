"""Timings that can be compared: what enters a ratio is run in turn, in one process, and medians are taken."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

import records  # noqa: F401  (finds convsim_cli in a checkout that is not installed)
import torch

from convsim_cli.device import resolve_device, synchronize

WARM_UP = 3  # rounds that do not count
FEWEST = 3  # rounds that do, of functions so slow that all rounds would take longer than
PATIENCE = 30.0  # seconds
SHORT = 0.005  # seconds under which a call is timed over many in a row


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the median over rounds of this one's seconds over the first one's in the same round."""

    seconds: float
    ratio: float


def interleave(functions: dict[str, Callable[[], object]], device: torch.device, repetitions: int) -> dict[str, Timing]:
    """Run functions in turn and return the timing of each; ratios are to the first.

    Fewer than `repetitions` rounds where they would take longer than half a minute, but three at least.
    """
    start, rounds = time.perf_counter(), []
    while len(rounds) < WARM_UP + repetitions:
        if len(rounds) >= WARM_UP + FEWEST and time.perf_counter() - start > PATIENCE:
            break
        rounds.append({name: _seconds(function, device) for name, function in functions.items()})
    rounds, first = rounds[WARM_UP:], next(iter(functions))
    return {
        name: Timing(median(r[name] for r in rounds), median(r[name] / r[first] for r in rounds)) for name in functions
    }


def arguments(description: str) -> argparse.Namespace:
    """Parse what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=21, help="rounds that count, at most")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    found = parser.parse_args()
    found.device = resolve_device(found.device)
    return found


@contextmanager
def report(given: argparse.Namespace, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Yield what takes rows: TSV, each as it comes, or one JSON document that says what they were measured on."""
    rows: list[Sequence[Any]] = []

    def add(row: Sequence[Any]) -> None:
        rows.append(row)
        if not given.json:
            print("\t".join(_cell(cell) for cell in row), flush=True)

    if not given.json:
        print("\t".join(columns))
    yield add
    if given.json:
        machine = {
            "device": torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "repetitions": given.repetitions,
        }
        print(json.dumps(machine | {"rows": [dict(zip(columns, row, strict=True)) for row in rows]}, indent=2))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; of a short one the mean of many in a row, whose data is in the caches as in a loop's.

    What ran before has emptied them: a few calls do not count.
    """
    taken = _timed(function, 1, device)
    if taken > SHORT:
        return taken
    taken = _timed(function, 10, device)
    return _timed(function, ceil(SHORT / taken), device)


def _timed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls
