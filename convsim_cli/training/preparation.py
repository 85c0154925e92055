"""What the modes do to a network's kernels before training: other directions, other norms, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from convsim_cli.closed_forms import decorrelate_, orthogonalize_
from convsim_cli.closed_forms.passes import undone_on_failure
from convsim_cli.inputs.images import Dataset
from convsim_cli.kernels import Selection, module_kernels, weight_of
from convsim_cli.machine.progress import Advance
from convsim_cli.minimize import Minimization, minimize_kernels, rescale_to
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.modes import MODES, Directions

IMAGES = 1024  # the first training images, on which `decorrelate` makes feature maps uncorrelated

Images = Callable[[], Tensor]  # the first training images, normalized: `[B, 3, height, width]`


def first_images(data: Dataset, device: torch.device) -> Tensor:
    """Return the first training images `[B, 3, height, width]`, normalized, without augmentation."""
    return data.normalize(data.train.images[:IMAGES].to(device))


def count_steps(model: nn.Module, settings: Arguments) -> int:
    """Return the number of steps that `prepare_` reports: those of its minimizations, and one per closed-form layer."""
    directions, selection = MODES[settings.mode].directions, module_kernels(model)
    plans = [how for how in (_turning(directions, settings), _scaling(directions, settings)) if how]
    layers = len(selection.kernels) if directions in ("orthogonal", "decorrelate") else 0
    return layers + sum(how.steps(how.select(selection).kernels) for how in plans)


@torch.no_grad()
def prepare_(model: nn.Module, settings: Arguments, images: Images, advance: Advance) -> None:
    """Give the kernels the directions, the norms, or both, that a run's mode and arguments ask for, in place.

    Feature maps are decorrelated last, which keeps the norms: without batch normalization, the scale of one layer
    matters to the maps of the next. Raises InputError and DivergedError; the network is then untouched.
    """
    directions, selection = MODES[settings.mode].directions, module_kernels(model)
    weights = {kernel.name: weight_of(model, kernel) for kernel in selection.kernels}
    with undone_on_failure(list(weights.values())):
        scaling = _scaling(directions, settings)  # of the fresh kernels
        shrunk = _minimized(selection, weights, scaling, advance) if scaling else {}
        if turning := _turning(directions, settings):
            for name, turned in _minimized(selection, weights, turning, advance).items():
                weights[name].copy_(turned)
        if directions == "orthogonal":
            orthogonalize_(model, advance=advance)
        for kernel in selection.kernels:
            weight = weights[kernel.name]
            if kernel.name in shrunk:
                weight.copy_(rescale_to(kernel, weight, shrunk[kernel.name]))
            if settings.factor is not None:
                weight.mul_(settings.factor)
        if directions == "decorrelate":
            decorrelate_(model, images(), advance=advance)


def _turning(directions: Directions | None, settings: Arguments) -> Minimization | None:
    """The minimization that the filters' directions come from, if one does."""
    return _minimization(settings, settings.preserve_norm) if directions == "init" else None


def _scaling(directions: Directions | None, settings: Arguments) -> Minimization | None:
    """The minimization that the filters' norms come from, if another one does."""
    wanted = settings.rescale or (directions == "own" and settings.factor is None)
    return _minimization(settings, preserve_norm=False) if wanted else None


def _minimization(settings: Arguments, preserve_norm: bool) -> Minimization:
    objective = settings.objective
    return Minimization(settings.iterations, settings.init_lr, preserve_norm=preserve_norm, objective=objective)


def _minimized(
    selection: Selection, weights: dict[str, Tensor], how: Minimization, advance: Advance
) -> dict[str, Tensor]:
    """The minimized weights by name; the model's are not written to."""
    kernels = how.select(selection).kernels
    found = minimize_kernels([(kernel, weights[kernel.name]) for kernel in kernels], how, advance)
    return {kernel.name: weight for kernel, (weight, _) in zip(kernels, found, strict=True)}
