"""Algorithm 1, or a closed form, on the kernels of an open checkpoint: one at a time, as the checkpoint is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.errors import CheckpointError
from convsim_cli.kernels import Kernel, Selection, living_filters
from convsim_cli.machine.progress import Advance
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite, describe, kernel_figures
from convsim_cli.measurement.layer_probe import LayerProbe
from convsim_cli.minimize import Minimization, minimize_kernels

CPU = torch.device("cpu")
Aliases = Mapping[str, Sequence[str]]  # a kernel's name → the other names that the checkpoint holds it under


@dataclass(frozen=True)
class ClosedForm:
    """A closed form in the place of Algorithm 1, or after it.

    label: what reports call it. rewrite: returns a layer's new weight, as stored, and its record. after: the norm-
    preserving minimization that comes first, if one does; `rewrite` then carries out both.
    """

    label: str
    rewrite: Callable[[Kernel, Tensor], tuple[Tensor, Record]]
    after: Minimization | None = None
    preserve_norm = True

    @property
    def iterations(self) -> int:
        return self.after.iterations if self.after else 0

    @property
    def lr(self) -> float | None:
        return self.after.lr if self.after else None


Method = Minimization | ClosedForm


def write_minimized(
    checkpoint: Checkpoint,
    selection: Selection,
    how: Method,
    target: Path,
    *,
    aliases: Aliases | None = None,
    backup: bool = False,
    probe: str | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    advance: Advance | None = None,
) -> tuple[list[Record], Path | None]:
    """Change the selected kernels and write the checkpoint to `target`; return a record per layer, and the backup.

    Large layers are in memory one at a time; everything but the selected kernels stays bit-identical. aliases: a kernel
    is written under each of these names as well. probe: adds `fm_cos` on such inputs to `before` and `after`. advance:
    takes the steps (`Minimization.steps`) completed since the last call, one per layer of a closed form. Raises
    InputError for a kernel with NaN or Inf, DivergedError for a loss that stops being finite, WriteError; the target is
    then unchanged.
    """
    check_kernels(checkpoint, selection)
    aliases = aliases or {}
    records: list[Record] = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None

    def weights() -> Iterator[tuple[Kernel, Tensor]]:
        for kernel in selection.kernels:
            yield kernel, checkpoint.load(kernel.name).to(device)

    def changes() -> Iterator[tuple[str, Tensor]]:
        minimized_layers = _changed(weights(), how, advance)
        for kernel, (minimized, record) in zip(selection.kernels, minimized_layers, strict=True):
            if layer_probe:
                former = checkpoint.load(kernel.name).to(device)
                living = living_filters(kernel.to_filters(former))
                for moment, tensor in (("before", former), ("after", minimized)):
                    record[moment]["fm_cos"] = layer_probe.fm_cos(kernel, tensor, living)
                del former
            records.append(record)
            minimized = minimized.to(CPU)
            for name in (kernel.name, *aliases.get(kernel.name, ())):
                yield name, minimized
            del minimized  # one layer less in memory while the next one is minimized

    kept = checkpoint.write(target, changes(), make_metadata(selection, how), backup=backup)
    return records, kept


def _changed(
    layers: Iterable[tuple[Kernel, Tensor]], how: Method, advance: Advance | None
) -> Iterator[tuple[Tensor, Record]]:
    if isinstance(how, Minimization):
        yield from minimize_kernels(layers, how, advance)
        return
    for kernel, weight in layers:
        yield how.rewrite(kernel, weight)
        if advance:
            advance(1)


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


def make_metadata(selection: Selection, how: Method) -> Mapping[str, str]:
    """Return the `convsim.*` record that tells how a file was changed."""
    record = {"convsim.version": __version__, "convsim.objective": how.label}
    minimization = how if isinstance(how, Minimization) else how.after
    if minimization:
        record["convsim.optimizer"] = minimization.optimizer
        record["convsim.lr"] = repr(minimization.lr)
        record["convsim.iterations"] = str(minimization.iterations)
        record["convsim.tol"] = repr(minimization.tol)
    return {**record, "convsim.layers": ",".join(kernel.name for kernel in selection.kernels)}
