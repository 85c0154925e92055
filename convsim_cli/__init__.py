"""convsim: measure and lower the similarity between a convolutional network's feature maps, by its kernels alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convsim_cli.checkpoint_init import minimize_checkpoint
    from convsim_cli.checkpoint_measure import measure_checkpoint
    from convsim_cli.checkpoints.formats import open_checkpoint
    from convsim_cli.closed_forms import decorrelate_, orthogonalize_
    from convsim_cli.measurement.network import measure
    from convsim_cli.minimize import minimize_, minimize_weight_
    from convsim_cli.penalty import ConvSimPenalty
    from convsim_cli.similarity import convolutional_similarity

__version__ = "0.2.0"
__all__ = [
    "ConvSimPenalty",
    "convolutional_similarity",
    "decorrelate_",
    "measure",
    "measure_checkpoint",
    "minimize_",
    "minimize_checkpoint",
    "minimize_weight_",
    "open_checkpoint",
    "orthogonalize_",
]

_HOMES = {
    "ConvSimPenalty": "penalty",
    "convolutional_similarity": "similarity",
    "decorrelate_": "closed_forms",
    "measure": "measurement.network",
    "measure_checkpoint": "checkpoint_measure",
    "minimize_": "minimize",
    "minimize_checkpoint": "checkpoint_init",
    "minimize_weight_": "minimize",
    "open_checkpoint": "checkpoints.formats",
    "orthogonalize_": "closed_forms",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `convsim --help` needs none of them, nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"convsim_cli.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
