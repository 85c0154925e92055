"""Timings that can be compared: what enters a ratio is run in turn, in one process, and medians are taken."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from convsim_cli.device import resolve_device, synchronize

WARM_UP = 3  # rounds that do not count


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the median over rounds of this one's seconds over the first one's in the same round."""

    seconds: float
    ratio: float


def interleave(functions: dict[str, Callable[[], object]], device: torch.device, repetitions: int) -> dict[str, Timing]:
    """Run functions in turn and return the timing of each; ratios are to the first."""
    rounds = [
        {name: _seconds(function, device) for name, function in functions.items()} for _ in range(WARM_UP + repetitions)
    ][WARM_UP:]
    first = next(iter(functions))
    return {
        name: Timing(median(r[name] for r in rounds), median(r[name] / r[first] for r in rounds)) for name in functions
    }


def arguments(description: str) -> argparse.Namespace:
    """Parse what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--repetitions", type=int, default=21, help="rounds that count")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    found = parser.parse_args()
    found.device = resolve_device(found.device)
    return found


def report(given: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as TSV, or as JSON with what it was measured on."""
    if given.json:
        machine = {
            "device": torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "repetitions": given.repetitions,
        }
        print(json.dumps(machine | {"rows": [dict(zip(columns, row, strict=True)) for row in rows]}, indent=2))
        return
    print("\t".join(columns))
    for row in rows:
        print(
            "\t".join(f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row)
        )


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start
