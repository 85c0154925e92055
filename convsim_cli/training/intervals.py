"""The 95 % interval of a mean over few values, by Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import cos, pi, sin, sqrt, tan
from statistics import mean, stdev

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the lower and the upper end of the 95 % interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    half = student_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return center - half, center + half


@cache
def student_quantile(freedom: int) -> float:
    """Return the t that |T| stays below with probability 0.95, for T of Student's distribution.

    freedom: degrees of freedom, at least 1. Found by bisection of arctan(t/√freedom), down to neighboring floats.
    """
    low, high = 0.0, pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _probability(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return sqrt(freedom) * tan(low)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom·tan(angle)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    total, term = 0.0, cos(angle) if odd else 1.0
    for index in range(freedom // 2):
        total += term
        term *= cos(angle) ** 2 * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
