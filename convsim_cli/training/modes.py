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


class Settings(Protocol):
    """The arguments of a run that a preparation reads (see `arguments.Arguments`)."""

    @property
    def iterations(self) -> int: ...
    @property
    def init_lr(self) -> float: ...
    @property
    def preserve_norm(self) -> bool: ...
    @property
    def rescale(self) -> bool: ...


class Preparation(Protocol):
    """What a mode does to a network before training."""

    def steps(self, model: nn.Module, settings: Settings) -> int:
        """Return the number of steps that `apply_` reports to `advance`."""

    def apply_(self, model: nn.Module, settings: Settings, advance: Advance) -> None:
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

    plan: the minimization that the directions come from, and the one that the norms come from; None keeps the present
    ones. Without a minimization for the norms, they come with the directions.
    """

    plan: Callable[[Settings], tuple[Minimization | None, Minimization | None]]

    def steps(self, model: nn.Module, settings: Settings) -> int:
        from convsim_cli.kernels import module_kernels

        selection = module_kernels(model)
        minimizations = [how for how in self.plan(settings) if how]
        return sum(how.steps(how.select(selection).kernels) for how in minimizations)

    def apply_(self, model: nn.Module, settings: Settings, advance: Advance) -> None:
        import torch

        from convsim_cli.kernels import module_kernels, weight_of
        from convsim_cli.minimize import minimize_kernel, rescale_to

        selection = module_kernels(model)
        directions, norms = self.plan(settings)
        turned = directions.select(selection).kernels if directions else []
        results = []
        for kernel in selection.kernels:
            weight = result = weight_of(model, kernel).detach()
            if directions and kernel in turned:
                result, _ = minimize_kernel(kernel, weight, directions, advance)
            if norms:
                result = rescale_to(kernel, result, minimize_kernel(kernel, weight, norms, advance)[0])
            results.append((weight, result))
        with torch.no_grad():
            for weight, result in results:
                weight.copy_(result)


def _minimization(settings: Settings, preserve_norm: bool) -> Minimization:
    from convsim_cli.minimize import Minimization

    return Minimization(settings.iterations, settings.init_lr, preserve_norm=preserve_norm)


def _init(settings: Settings) -> tuple[Minimization, Minimization | None]:
    raw = _minimization(settings, preserve_norm=False)
    return _minimization(settings, settings.preserve_norm), raw if settings.rescale else None


def _rescale(settings: Settings) -> tuple[None, Minimization]:
    return None, _minimization(settings, preserve_norm=False)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode(
            "init",
            "Algorithm 1 before training",
            frozenset({"preserve_norm", "rescale"}),
            preparation=_Algorithm1(_init),
        ),
        Mode("reg", "Algorithm 2 during training", frozenset({"objective", "beta_schedule"}), regularizes=True),
        Mode("rescale", "a control that only scales the filters as init would", preparation=_Algorithm1(_rescale)),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]
