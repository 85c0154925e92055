"""What tests of faults share: how many cases they try, and a small run with its files."""

from __future__ import annotations

import os

from convsim_cli.training.config import Arguments

SMALL = Arguments(
    arch="cnn:2", dataset="digits", epochs=2, batch_size=20, limit_train=60, limit_test=30, momentum=0.9, seed=3
)
NAMES = ("args.json", "results.csv", "layers.csv", "best.safetensors", "last.safetensors", "state.pt", "summary.json")


def cases(usual: int) -> range:
    """The seeds of a test's cases: `usual` of them, times CONVSIM_TIMES on demand."""
    return range(usual * int(os.environ.get("CONVSIM_TIMES", "1")))
