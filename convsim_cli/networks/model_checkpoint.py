"""A checkpoint alone, a checkpoint with the network that it belongs to, or a new network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.state_dict import StateDict
from convsim_cli.checkpoints.training_state import set_aside
from convsim_cli.errors import InputError
from convsim_cli.kernels import Patterns, Selection, file_kernels, module_kernels
from convsim_cli.networks.names import build_network, warn_of_random_weights
from convsim_cli.networks.shared_weights import find_aliases
from convsim_cli.networks.weights import load_weights


@dataclass
class ModelCheckpoint:
    """A checkpoint, the kernels selected in it, and with `arch` the network that holds its weights.

    names: the network's name of each tensor → the checkpoint's; aliases: a kernel's name → the checkpoint's other names
    of the same parameter.
    """

    checkpoint: Checkpoint
    selection: Selection
    model: nn.Module | None = None
    arch: str | None = None
    names: dict[str, str] | None = None
    aliases: dict[str, list[str]] = field(default_factory=dict)

    def skipped(self) -> list[dict[str, Any]]:
        """Return name, shape and reason of what was not selected, as in a JSON document."""
        return [
            {"name": skipped.name, "shape": list(skipped.shape), "reason": skipped.reason}
            for skipped in self.selection.skipped
        ]

    @property
    def kernels_changed(self) -> bool:
        """Whether the file says that its kernels were changed after training, by `convsim init`."""
        return "convsim.layers" in self.checkpoint.metadata


def open_model_checkpoint(
    path: str | Path | None,
    arch: str | None = None,
    patterns: Patterns | None = None,
    seed: int = 0,
    classes: int | None = None,
    key: str | None = None,
    *,
    pretrained: bool = False,
    parametrized: bool = False,
    for_writing: bool = False,
) -> ModelCheckpoint:
    """Open a checkpoint, build a new network by name, or load a checkpoint into a network.

    pretrained: see `find_network`. parametrized: whether to select a network's layers that compute their weight from
    other parameters. for_writing: see `open_checkpoint`. Raises CheckpointError for a file that cannot be read;
    InputError for an unknown network, a checkpoint that does not fit it, patterns that match nothing, and arguments
    that would have no effect.
    """
    patterns = patterns or Patterns()
    if path is None and arch is None:
        raise InputError("name a `checkpoint`, or a new network by `arch`")
    if key is not None and path is None:
        raise InputError("`key` applies only to a `checkpoint`; `arch` alone creates a new network")
    if classes is not None and arch is None:
        raise InputError("`num_classes` requires `arch`")
    if pretrained and (arch is None or path is not None):
        raise InputError("`pretrained` requires `arch`, and no `checkpoint`, which has weights of its own")
    if arch is None:
        assert path is not None
        checkpoint: Checkpoint = open_checkpoint(path, key, for_writing=for_writing)
        aside = set_aside(checkpoint.tensors)
        selection = file_kernels(checkpoint.tensors, patterns, checkpoint.unfit, aside)
        checkpoint.notes += [f"{checkpoint.path}: {line}" for line in selection.doubts]
        return ModelCheckpoint(checkpoint, selection)
    if patterns.groups or patterns.transposed:
        raise InputError("`groups` and `transposed` apply only without `arch`, which tells them exactly")
    model = build_network(arch, classes, seed, pretrained)
    if path is None and not pretrained:
        warn_of_random_weights(arch)
    names = None
    if path is None:
        checkpoint = StateDict(Path(arch), model.state_dict())
    else:
        checkpoint = open_checkpoint(path, key, for_writing=for_writing)
        names = load_weights(model, checkpoint, arch)
    selection = module_kernels(model, patterns, names, parametrized=parametrized)
    return ModelCheckpoint(checkpoint, selection, model, arch, names, find_aliases(model, selection.kernels, names))
