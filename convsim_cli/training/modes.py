"""The training modes. One entry in `MODES` is all that a mode takes: command line, checks and training read this table.

Nothing here imports torch, so that `convsim train --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Directions = Literal["own", "init", "orthogonal", "decorrelate"]


@dataclass(frozen=True)
class Mode:
    """A way to train.

    help: a phrase for `--help`. takes: the arguments that belong to this mode, out of those that belong to some modes
    only. regularizes: whether training adds the gradient of the objective to that of the task (Algorithm 2). lowers:
    whether it lowers similarity; the others do so only with `preserve_norm`, or not at all. directions: where the
    filters take their directions from before training (`preparation.prepare_`), None to leave the kernels alone.
    """

    name: str
    help: str
    takes: frozenset[str] = frozenset()
    regularizes: bool = False
    lowers: bool = False
    directions: Directions | None = None


_INIT = frozenset({"objective", "preserve_norm", "rescale"})
_REG = frozenset({"objective", "preserve_norm", "beta_schedule"})

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode("init", "Algorithm 1 before training", _INIT, directions="init"),
        Mode("reg", "Algorithm 2 during training", _REG, regularizes=True),
        Mode("init+reg", "both", _INIT | _REG, regularizes=True, directions="init"),
        Mode(
            "rescale",
            "a control that only scales the filters, as init would or by --factor",
            frozenset({"objective", "factor"}),
            directions="own",
        ),
        Mode(
            "orthogonal",
            "orthogonal filters before training, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            directions="orthogonal",
        ),
        Mode(
            "decorrelate",
            "filters whose feature maps of the first 1,024 training images are uncorrelated, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            directions="decorrelate",
        ),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]
