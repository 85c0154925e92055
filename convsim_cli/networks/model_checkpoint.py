"""A checkpoint by itself, a checkpoint with its network, or a fresh network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.state_dict import StateDict
from convsim_cli.errors import InputError
from convsim_cli.kernels import Patterns, Selection, file_kernels, module_kernels
from convsim_cli.networks.names import build_network
from convsim_cli.networks.weights import load_weights


@dataclass
class Source:
    """A checkpoint, the kernels chosen in it, and the network with its weights where `--arch` named one."""

    checkpoint: Checkpoint
    selection: Selection
    model: nn.Module | None = None
    arch: str | None = None
    names: dict[str, str] | None = None  # the network's name → the checkpoint's, of every tensor

    @property
    def kernels_changed(self) -> bool:
        """Whether the file says that its kernels were changed after training, by `convsim init`."""
        return "convsim.layers" in self.checkpoint.metadata


def open_source(
    path: Path | None,
    arch: str | None,
    patterns: Patterns | None = None,
    seed: int = 0,
    classes: int | None = None,
    key: str | None = None,
    *,
    parametrized: bool = False,
) -> Source:
    """Open a checkpoint, a network by name, or a checkpoint into a network.

    parametrized: whether to select a network's layers that compute their weight from other parameters.
    Raises CheckpointError for a file that cannot be read, InputError for an unknown network, a checkpoint that does
    not fit it, patterns that match nothing, neither path nor arch, classes without arch, or a key without a path.
    """
    patterns = patterns or Patterns()
    if path is None and arch is None:
        raise InputError("name a CHECKPOINT, or a fresh network with --arch")
    if key is not None and path is None:
        raise InputError(f"--key {key}: chooses among the dictionaries of a CHECKPOINT; name one")
    if classes is not None and arch is None:
        raise InputError(f"--num-classes {classes}: is of the --arch network; name one")
    if arch is None:
        assert path is not None
        checkpoint = open_checkpoint(path, key)
        return Source(checkpoint, file_kernels(checkpoint.tensors, patterns, checkpoint.unfit))
    if patterns.groups or patterns.transposed:
        raise InputError("--groups and --transposed correct what a file leaves open; with --arch the network tells")
    model = build_network(arch, classes, seed)
    if path is None:
        checkpoint = StateDict(Path(arch), model.state_dict())
        return Source(checkpoint, module_kernels(model, patterns, parametrized=parametrized), model, arch)
    checkpoint = open_checkpoint(path, key)
    names = load_weights(model, checkpoint, arch)
    return Source(checkpoint, module_kernels(model, patterns, names, parametrized=parametrized), model, arch, names)
