"""The training modes. One entry in `MODES` is all that a mode takes: command line, checks and training read this table.

torch is imported only where a network is prepared, so that `convsim train --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from convsim_cli.machine.progress import Advance

if TYPE_CHECKING:
    from torch import nn

    from convsim_cli.training.preparation import Directions, Images, PreparationSettings


class Preparation(Protocol):
    """What a mode does to a network before training."""

    def steps(self, model: nn.Module, settings: PreparationSettings) -> int:
        """Return the number of steps that `apply_` reports to `advance`."""

    def apply_(self, model: nn.Module, settings: PreparationSettings, images: Images, advance: Advance) -> None:
        """Change the network in place. Raises InputError and DivergedError, with the network untouched."""


@dataclass(frozen=True)
class Mode:
    """A way to train.

    help: a phrase for `--help`. takes: the arguments that belong to this mode, out of those that belong to some modes
    only. regularizes: whether training adds the gradient of the objective to that of the task (Algorithm 2). lowers:
    whether it lowers similarity; the others do so only with `preserve_norm`, or not at all.
    """

    name: str
    help: str
    takes: frozenset[str] = frozenset()
    regularizes: bool = False
    lowers: bool = False
    preparation: Preparation | None = None


@dataclass(frozen=True)
class _Kernels:
    """Give the kernels the directions, the norms, or both, that the settings ask for (see `preparation`)."""

    directions: Directions

    def steps(self, model: nn.Module, settings: PreparationSettings) -> int:
        from convsim_cli.training.preparation import count_steps

        return count_steps(model, self.directions, settings)

    def apply_(self, model: nn.Module, settings: PreparationSettings, images: Images, advance: Advance) -> None:
        from convsim_cli.training.preparation import prepare_

        prepare_(model, self.directions, settings, images, advance)


_INIT = frozenset({"objective", "preserve_norm", "rescale"})
_REG = frozenset({"objective", "preserve_norm", "beta_schedule"})

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode("init", "Algorithm 1 before training", _INIT, preparation=_Kernels("init")),
        Mode("reg", "Algorithm 2 during training", _REG, regularizes=True),
        Mode("init+reg", "both", _INIT | _REG, regularizes=True, preparation=_Kernels("init")),
        Mode(
            "rescale",
            "a control that only scales the filters, as init would or by --factor",
            frozenset({"objective", "factor"}),
            preparation=_Kernels("own"),
        ),
        Mode(
            "orthogonal",
            "orthogonal filters before training, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            preparation=_Kernels("orthogonal"),
        ),
        Mode(
            "decorrelate",
            "filters whose feature maps of the first 1,024 training images are uncorrelated, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            preparation=_Kernels("decorrelate"),
        ),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]
