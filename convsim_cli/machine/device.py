"""Which device to compute on."""

from __future__ import annotations

import torch

from convsim_cli.errors import InputError, did_you_mean


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the first accelerator that is there.

    Raises InputError for an unknown name and for a device that this machine does not have: never a silent fallback.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and (kind != "cuda" or not index.isdecimal())):
        raise InputError(f"--device {name}: {did_you_mean(kind, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        raise InputError(
            f"--device {name}: this machine has {there} {kind} devices; take --device cpu or --device auto"
        )
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
