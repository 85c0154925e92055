"""Algorithm 1 on a checkpoint file: read its kernels one at a time, minimize them, write the file back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Selection
from convsim_cli.measurement.kernel_figures import Record, check_finite, describe, kernel_figures
from convsim_cli.measurement.layer_probe import LayerProbe
from convsim_cli.minimize import Minimization, minimize_kernel

CPU = torch.device("cpu")
Advance = Callable[[Kernel, int], None]  # told the kernel, and how many iterations it has done since the last call


def minimize_checkpoint(
    checkpoint: Checkpoint,
    selection: Selection,
    how: Minimization,
    target: Path,
    *,
    backup: Path | None = None,
    probe: str | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    advance: Advance | None = None,
) -> list[Record]:
    """Minimize the selected kernels of a checkpoint and write it to `target`, atomically; return a record per layer.

    One layer is held at a time; whatever is not a selected kernel stays bit-identical. probe: adds `fm_cos` to
    `before` and `after`, on such inputs. Raises InputError for a kernel with NaN or Inf, DivergedError for a loss that
    stops being finite, WriteError; the target is then as it was.
    """
    check_kernels(checkpoint, selection)
    records: list[Record] = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None

    def changes() -> Iterator[tuple[str, Tensor]]:
        for kernel in selection.kernels:
            weight = checkpoint.load(kernel.name).to(device)
            steps = None if advance is None else lambda iterations, kernel=kernel: advance(kernel, iterations)
            minimized, record = minimize_kernel(kernel, weight, how, steps)
            if layer_probe:
                for moment, tensor in (("before", weight), ("after", minimized)):
                    record[moment]["fm_cos"] = layer_probe.fm_cos(kernel, tensor)
            records.append(record)
            minimized = minimized.to(CPU)
            yield kernel.name, minimized
            del weight, minimized

    checkpoint.write(target, changes(), make_metadata(selection, how), backup)
    return records


def describe_checkpoint(
    checkpoint: Checkpoint, selection: Selection, probe: str | None = None, seed: int = 0
) -> list[Record]:
    """Return the records of a dry run, with their `before` figures alone. Raises as `minimize_checkpoint`."""
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
    """Raise InputError, before any work is done, where there is nothing to act on or a kernel holds NaN or Inf."""
    if not selection.kernels:
        left_out = ", ".join(f"{skipped.name} ({skipped.reason})" for skipped in selection.skipped[:3])
        raise InputError(
            f"{checkpoint.path}: no convolution kernels to act on" + (f"; left out: {left_out}" if left_out else "")
        )
    for kernel in selection.kernels:
        check_finite(kernel, checkpoint.load(kernel.name), checkpoint.path)


def make_metadata(selection: Selection, how: Minimization) -> Mapping[str, str]:
    """Return the `convsim.*` record of what is done to a file."""
    return {
        "convsim.version": __version__,
        "convsim.objective": how.objective,
        "convsim.optimizer": how.optimizer,
        "convsim.lr": repr(how.lr),
        "convsim.iterations": str(how.iterations),
        "convsim.tol": repr(how.tol),
        "convsim.layers": ",".join(kernel.name for kernel in selection.kernels),
    }
