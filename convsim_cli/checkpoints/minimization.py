"""Algorithm 1 on the kernels of an open checkpoint: minimize them one at a time and write the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.errors import CheckpointError
from convsim_cli.kernels import Kernel, Selection
from convsim_cli.measurement.kernel_figures import Record, check_finite, describe, kernel_figures
from convsim_cli.measurement.layer_probe import LayerProbe
from convsim_cli.minimize import Minimization, minimize_kernel

CPU = torch.device("cpu")
Aliases = Mapping[str, Sequence[str]]  # a kernel's name → the other names that the checkpoint holds it under


def write_minimized(
    checkpoint: Checkpoint,
    selection: Selection,
    how: Minimization,
    target: Path,
    *,
    aliases: Aliases | None = None,
    backup: bool = False,
    probe: str | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    advance: Callable[[float], None] | None = None,
) -> tuple[list[Record], Path | None]:
    """Minimize the selected kernels and write the checkpoint to `target`; return a record per layer, and the backup.

    One layer is in memory at a time; everything but the selected kernels stays bit-identical. aliases: a kernel is
    written under each of these names as well. probe: adds `fm_cos` on such inputs to `before` and `after`. advance:
    called with the part done since the last call, of `work_of`. Raises InputError for a kernel with NaN or Inf,
    DivergedError for a loss that stops being finite, WriteError; the target is then unchanged.
    """
    check_kernels(checkpoint, selection)
    aliases = aliases or {}
    records: list[Record] = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None

    def changes() -> Iterator[tuple[str, Tensor]]:
        for kernel in selection.kernels:
            weight = checkpoint.load(kernel.name).to(device)
            minimized, record = minimize_kernel(kernel, weight, how, _scaled(advance, kernel))
            if layer_probe:
                for moment, tensor in (("before", weight), ("after", minimized)):
                    record[moment]["fm_cos"] = layer_probe.fm_cos(kernel, tensor)
            records.append(record)
            minimized = minimized.to(CPU)
            for name in (kernel.name, *aliases.get(kernel.name, ())):
                yield name, minimized
            del weight, minimized  # one layer less in memory while the next one is minimized

    kept = checkpoint.write(target, changes(), make_metadata(selection, how), backup=backup)
    return records, kept


def work_of(selection: Selection, how: Minimization) -> float:
    """Return how much there is to minimize: the iterations of every weight."""
    return float(sum(how.iterations * prod(kernel.shape) for kernel in selection.kernels))


def describe_kernels(
    checkpoint: Checkpoint, selection: Selection, probe: str | None = None, seed: int = 0
) -> list[Record]:
    """Return the records of a dry run, with `before` alone. Raises InputError as `write_minimized` does."""
    check_kernels(checkpoint, selection)
    records = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None
    for kernel in selection.kernels:
        weight = checkpoint.load(kernel.name)
        figures = kernel_figures(kernel, weight)
        before = {key: figures[key] for key in ("cs", "ncs", "norm")}
        if layer_probe:
            before["fm_cos"] = layer_probe.fm_cos(kernel, weight)
        records.append({**describe(kernel), "before": before})
    return records


def check_kernels(checkpoint: Checkpoint, selection: Selection) -> None:
    """Raise InputError, before any work is done, if there is nothing to act on or a kernel holds NaN or Inf."""
    if not selection.kernels:
        left_out = ", ".join(f"{skipped.name} ({skipped.reason})" for skipped in selection.skipped[:3])
        raise CheckpointError(
            f"{checkpoint.path}: no convolution kernels to act on" + (f"; left out: {left_out}" if left_out else "")
        )
    for kernel in selection.kernels:
        check_finite(kernel, checkpoint.load(kernel.name), checkpoint.path)


def make_metadata(selection: Selection, how: Minimization) -> Mapping[str, str]:
    """Return the `convsim.*` record that tells how a file was changed."""
    return {
        "convsim.version": __version__,
        "convsim.objective": how.objective,
        "convsim.optimizer": how.optimizer,
        "convsim.lr": repr(how.lr),
        "convsim.iterations": str(how.iterations),
        "convsim.tol": repr(how.tol),
        "convsim.layers": ",".join(kernel.name for kernel in selection.kernels),
    }


def _scaled(advance: Callable[[float], None] | None, kernel: Kernel) -> Callable[[int], None] | None:
    """Return what turns a kernel's iterations into its part of `work_of`."""
    return None if advance is None else lambda iterations: advance(iterations * prod(kernel.shape))
