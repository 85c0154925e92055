"""The numerical experiments of Tables 1, 2, 3 and 6: two kernels, one input, and what minimizing does to their maps.

K1, K2 ~ U(−1, 1) with N taps, X ~ U(0, 1) of length 64. All episodes run at once in float64, as the groups of one layer
with two filters each. With W the windows of X that the kernels see, ⟨F1, F2⟩ = K1ᵀ(WᵀW)K2 exactly, for any padding, so
the maps themselves are never computed. Feature-map similarity is ⟨F1, F2⟩².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.objectives import project_, rescale_
from convsim_cli.precision import full_precision
from convsim_cli.reproduction.published import (
    FITTED_NOTES,
    KEYS,
    NUMERICAL_ROWS,
    NUMERICAL_TABLES,
    NumericalTable,
    settings_of,
)
from convsim_cli.similarity import autocorrelation, similarity_gradient, spectrum_if_cheaper

INPUT_LENGTH = 64  # M of section 3.1
EPISODES = 1000
Measured = dict[str, float | None]


@dataclass(frozen=True)
class Episodes:
    """Kernels `[episodes, 2, N, 1]`, as `similarity.to_filters` has them; WᵀW of their inputs `[episodes, N, N]`."""

    kernels: Tensor
    gram: Tensor


def reproduce_table(
    name: str, episodes: int = EPISODES, seed: int = 0, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Return the content of a numerical table's JSON: published, measured, and measured with every kernel's norm fixed.

    advance: called with 1 after each iteration, `numerical_steps` times in all. Raises InputError for an unknown name.
    """
    table, rows = find_table(name), []
    for row in NUMERICAL_ROWS:
        if row.table == name:
            drawn = draw_episodes(row.taps, table.padding, episodes, seed)
            free, held = (run_episodes(drawn, table, row.optimizer, hold, advance) for hold in (False, True))
            published = dict(zip(KEYS, row.published, strict=True))
            found = {"published": published, "measured": free, "fixed_norms": held}
            rows.append({"N": row.taps, "optimizer": row.optimizer} | found)
    about = {"name": name, "title": table.title, "claim": table.claim or None, "note": FITTED_NOTES.get(name)}
    return about | {"episodes": episodes, "seed": seed, "rows": rows}


def find_table(name: str) -> NumericalTable:
    """Return a numerical table by its name. Raises InputError for an unknown one."""
    for table in NUMERICAL_TABLES:
        if table.name == name:
            return table
    raise InputError(f"unknown experiment {name!r}: {did_you_mean(name, (table.name for table in NUMERICAL_TABLES))}")


def numerical_steps(name: str) -> int:
    """Return how many iterations `reproduce_table` reports."""
    rows = [row for row in NUMERICAL_ROWS if row.table == name]
    return 2 * sum(settings_of(name, row.taps, row.optimizer).iterations for row in rows)


def draw_episodes(taps: int, padding: Literal["full", "valid"], episodes: int, seed: int) -> Episodes:
    """Draw kernels and inputs (section 3.1). The same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    kernels = 2 * torch.rand(episodes, 2, taps, 1, generator=generator, dtype=torch.float64) - 1
    inputs = torch.rand(episodes, INPUT_LENGTH, generator=generator, dtype=torch.float64)
    around = taps - 1 if padding == "full" else 0
    windows = torch.nn.functional.pad(inputs, (around, around)).unfold(1, taps, 1)
    return Episodes(kernels, windows.mT @ windows)


def run_episodes(
    episodes: Episodes,
    table: NumericalTable,
    optimizer: Literal["adam", "sgd"],
    fixed_norms: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Measured:
    """Minimize the table's objective in every episode; return the figures by `KEYS`, and `cos_before`, `cos_after`.

    Correlation: Pearson's, between objective and feature-map similarity over the iterates of an episode, including the
    first. Reduction frequency: share of episodes that end lower. Decrease and increase: |after − before| / before over
    the episodes that fall or rise. All in per cent except correlations and cosines; None if there is no such episode.
    """
    settings = settings_of(table.name, episodes.kernels.shape[2], optimizer)
    kernels = episodes.kernels.clone().requires_grad_()
    step = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([kernels], lr=settings.lr)
    objectives, similarities = [], []
    with torch.no_grad(), full_precision(kernels.device):
        norms = torch.linalg.vector_norm(kernels, dim=(-2, -1), keepdim=True)
        for iteration in range(settings.iterations + 1):
            objectives.append(pair_objective(kernels, table))
            similarities.append(inner_products(kernels, episodes.gram)[:, 0, 1].square())
            if iteration == settings.iterations:
                break
            kernels.grad = pair_gradient(kernels, table)
            if fixed_norms:
                project_(kernels.grad, kernels, norms)
            step.step()
            if fixed_norms:
                rescale_(kernels, norms)
            if advance:
                advance(1)
        found = summarize_episodes(torch.stack(objectives), torch.stack(similarities))
        found["cos_before"] = _cosine(inner_products(episodes.kernels, episodes.gram))
        found["cos_after"] = _cosine(inner_products(kernels, episodes.gram))
    return found


def inner_products(kernels: Tensor, gram: Tensor) -> Tensor:
    """Return ⟨F_i, F_j⟩ of every episode, `[episodes, 2, 2]`."""
    flat = kernels.squeeze(-1)
    return flat @ gram @ flat.mT


def pair_objective(kernels: Tensor, table: NumericalTable) -> Tensor:
    """Return the table's objective in every episode, `[episodes]`."""
    if table.objective == "kernel":
        return (kernels[:, 0] * kernels[:, 1]).sum((1, 2)).square()
    taps = (kernels.shape[2],)
    first, second = autocorrelation(kernels, taps, spectrum_if_cheaper(kernels, taps)).unbind(1)
    return (first * second).sum(1)


def pair_gradient(kernels: Tensor, table: NumericalTable) -> Tensor:
    """Return ∂`pair_objective`/∂kernels, `[episodes, 2, N, 1]`."""
    if table.objective == "kernel":
        return 2 * (kernels[:, :1] * kernels[:, 1:]).sum((1, 2, 3), keepdim=True) * kernels.flip(1)
    return similarity_gradient(kernels, (kernels.shape[2],))


def summarize_episodes(objectives: Tensor, similarities: Tensor) -> Measured:
    """Return the figures by `KEYS` of iterates, both `[iterates, episodes]`; see `run_episodes`."""
    before, after = similarities[0], similarities[-1]
    change = 100 * (after - before).abs() / before
    correlations = _pearson(objectives, similarities)
    spreads: list[float | None] = []
    for values in (correlations[correlations.isfinite()], change[after < before], change[after > before]):
        spreads += [values.mean().item() if len(values) else None, values.std().item() if len(values) > 1 else None]
    frequency = 100 * (after < before).double().mean().item()
    return dict(zip(KEYS, (*spreads[:2], frequency, *spreads[2:]), strict=True))


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation along the first axis."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def _cosine(products: Tensor) -> float:
    cosines = products[:, 0, 1] / (products[:, 0, 0] * products[:, 1, 1]).sqrt()
    return cosines[cosines.isfinite()].abs().mean().item()
