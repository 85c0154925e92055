"""The training modes. One entry in `MODES` is all that a mode takes: command line, checks and training read this table.

torch is imported only where a network is prepared, so that `convsim train --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from convsim_cli.machine.progress import Advance

if TYPE_CHECKING:
    from torch import nn

    from convsim_cli.minimize import Minimization


class PreparationSettings(Protocol):
    """The arguments of a run that a preparation reads (see `arguments.Arguments`)."""

    @property
    def iterations(self) -> int: ...
    @property
    def init_lr(self) -> float: ...
    @property
    def objective(self) -> str: ...
    @property
    def preserve_norm(self) -> bool: ...
    @property
    def rescale(self) -> bool: ...


class Preparation(Protocol):
    """What a mode does to a network before training."""

    def steps(self, model: nn.Module, settings: PreparationSettings) -> int:
        """Return the number of steps that `apply_` reports to `advance`."""

    def apply_(self, model: nn.Module, settings: PreparationSettings, advance: Advance) -> None:
        """Change the network in place. Raises InputError and DivergedError, with the network untouched."""


@dataclass(frozen=True)
class Mode:
    """A way to train.

    help: a phrase for `--help`. takes: the arguments that belong to this mode, out of those that belong to some modes
    only. regularizes: whether training adds the gradient of the objective to that of the task (Algorithm 2).
    """

    name: str
    help: str
    takes: frozenset[str] = frozenset()
    regularizes: bool = False
    preparation: Preparation | None = None


@dataclass(frozen=True)
class _Algorithm1:
    """Give each kernel the directions, the norms, or both, that Algorithm 1 would give it.

    plan: the minimization that the directions come from, and the one that the norms come from. Without the first, the
    directions stay; without the second, the norms come with the directions.
    """

    plan: Callable[[PreparationSettings], tuple[Minimization | None, Minimization | None]]

    def steps(self, model: nn.Module, settings: PreparationSettings) -> int:
        from convsim_cli.kernels import module_kernels

        selection = module_kernels(model)
        return sum(how.steps(how.select(selection).kernels) for how in self.plan(settings) if how)

    def apply_(self, model: nn.Module, settings: PreparationSettings, advance: Advance) -> None:
        import torch

        from convsim_cli.kernels import module_kernels, weight_of
        from convsim_cli.minimize import minimize_kernels, rescale_to

        selection = module_kernels(model)
        weights = {kernel.name: weight_of(model, kernel) for kernel in selection.kernels}
        results = {name: weight.detach() for name, weight in weights.items()}
        directions, norms = self.plan(settings)
        if directions:
            kernels = directions.select(selection).kernels
            layers = [(kernel, weights[kernel.name]) for kernel in kernels]
            for kernel, (turned, _) in zip(kernels, minimize_kernels(layers, directions, advance), strict=True):
                results[kernel.name] = turned
        if norms:
            kernels = norms.select(selection).kernels
            layers = [(kernel, weights[kernel.name]) for kernel in kernels]
            for kernel, (shrunk, _) in zip(kernels, minimize_kernels(layers, norms, advance), strict=True):
                results[kernel.name] = rescale_to(kernel, results[kernel.name], shrunk)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(results[name])


def _minimization(settings: PreparationSettings, preserve_norm: bool) -> Minimization:
    from convsim_cli.minimize import Minimization

    objective = settings.objective
    return Minimization(settings.iterations, settings.init_lr, preserve_norm=preserve_norm, objective=objective)


def _init(settings: PreparationSettings) -> tuple[Minimization, Minimization | None]:
    raw = _minimization(settings, preserve_norm=False)
    return _minimization(settings, settings.preserve_norm), raw if settings.rescale else None


def _rescale(settings: PreparationSettings) -> tuple[None, Minimization]:
    return None, _minimization(settings, preserve_norm=False)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode(
            "init",
            "Algorithm 1 before training",
            frozenset({"objective", "preserve_norm", "rescale"}),
            preparation=_Algorithm1(_init),
        ),
        Mode("reg", "Algorithm 2 during training", frozenset({"objective", "beta_schedule"}), regularizes=True),
        Mode(
            "rescale",
            "a control that only scales the filters as init would",
            frozenset({"objective"}),
            preparation=_Algorithm1(_rescale),
        ),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]
