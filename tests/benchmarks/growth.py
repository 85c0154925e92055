"""How the time for value and gradient of L_CS grows with filters, with channels and with taps: the fitted exponents.

python tests/benchmarks/growth.py
"""

from __future__ import annotations

from math import log

import torch
from methods import value_and_gradient
from timing import arguments, interleave, report

SIZES = (64, 128, 256, 512, 1024)
SIDES = (3, 5, 7, 9, 11)
SERIES = {
    "filters, S×128×3×3": [(size, (size, 128, 3, 3)) for size in SIZES],
    "channels, 128×C×3×3": [(size, (128, size, 3, 3)) for size in SIZES],
    "taps, 64×64×k×k": [(side * side, (64, 64, side, side)) for side in SIDES],
}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    x, y = torch.tensor([[log(v) for v in sizes], [log(v) for v in seconds]], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def main() -> None:
    given = arguments(__doc__ or "")
    with report(given, ["in", "exponent", "milliseconds"]) as add:
        for name, shapes in SERIES.items():
            runs = {
                str(size): value_and_gradient([torch.randn(shape, device=given.device)], "cs") for size, shape in shapes
            }
            found = interleave(runs, given.device, given.repetitions)
            seconds = [timing.seconds for timing in found.values()]
            said = ", ".join(f"{size}: {1e3 * timing.seconds:.3g}" for size, timing in found.items())
            add([name, exponent([float(size) for size, _ in shapes], seconds), said])


if __name__ == "__main__":
    main()
