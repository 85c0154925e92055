"""Prepare a run: load its images, build its network, check that both fit, and change the kernels.

A mode changes the kernels once, before the first epoch: their directions, their norms, or both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.device import Advance
from convsim_cli.errors import ConvsimWarning, InputError, brief, to_install
from convsim_cli.inputs.datasets import folder_digest, load_dataset
from convsim_cli.inputs.images import Dataset, parse_channels
from convsim_cli.kernels import Selection, module_kernels, undone_on_failure, warn_of_unsupported, weight_of
from convsim_cli.layers import side_effect_free
from convsim_cli.methods import METHODS, Method
from convsim_cli.minimize import Minimization, minimize_kernels, rescale_to
from convsim_cli.networks.architectures import build_network, usual_side, warn_of_random_weights
from convsim_cli.networks.load import load_weights
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.training.config import FOLDER, MODES, Arguments

IMAGES = 1024  # the first training images, on which `decorrelate` makes feature maps uncorrelated


def import_summary_writer() -> Any:
    """Return torch's class that writes for TensorBoard. Raises InputError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"`tensorboard` requires the package tensorboard, which is not installed: {to_install('tensorboard')}"
        ) from error
    return SummaryWriter


def load_data(arguments: Arguments) -> Dataset:
    """Return the dataset of a run: all of its images, except those of a folder beyond the run's limits.

    Raises InputError if it cannot be read, and for an image folder with other images than those of the run.
    """
    side = arguments.image_size or usual_side(arguments.arch)
    mean, std = parse_channels("mean", arguments.mean), parse_channels("std", arguments.std)
    found = identified(replace(arguments, folder_digest=None)).folder_digest
    if arguments.folder_digest not in (None, found):
        raise InputError(
            f"{arguments.dataset}: names or sizes of its images differ from those that the run began with; "
            "use a folder with the same images"
        )
    return load_dataset(
        arguments.dataset,
        Path(arguments.data_dir),
        side,
        mean,
        std,
        limit_train=arguments.limit_train,
        limit_test=arguments.limit_test,
    )


def identified(arguments: Arguments) -> Arguments:
    """Return the arguments with the digest of their image folder, if they name one. Raises InputError."""
    if arguments.folder_digest or not arguments.dataset.startswith(FOLDER):
        return arguments
    return replace(arguments, folder_digest=folder_digest(Path(arguments.dataset.removeprefix(FOLDER))))


def used_images(arguments: Arguments, dataset: Dataset) -> Dataset:
    """Return the images that a run uses, its validation images set apart. Raises InputError if there are too few."""
    return dataset.limited(arguments.limit_train, arguments.limit_test).hold_out(arguments.validation)


def build_with_weights(arguments: Arguments, classes: int) -> nn.Module:
    """Return the network of a run before training: fresh, pretrained, or with the tensors of its `weights` file.

    Raises InputError and DownloadError.
    """
    model = build_network(arguments.arch, classes, arguments.seed, arguments.pretrained)
    if arguments.weights:
        checkpoint = open_checkpoint(arguments.weights)
        load_weights(model, checkpoint, arguments.arch)
        for line in checkpoint.notes:
            line = line.replace("(choose with `key`)", "(to start from those, save them alone)")
            warnings.warn(line, ConvsimWarning, stacklevel=2)
    return model


def check_network(model: nn.Module, arguments: Arguments, dataset: Dataset) -> None:
    """Raise InputError for a network that a run on this dataset cannot train. The network is left as it is."""
    if not (arguments.pretrained or arguments.weights):
        warn_of_random_weights(arguments.arch)
    try:
        ConvSimPenalty(model)
        if _method(arguments) or MODES[arguments.mode].scales:
            module_kernels(model).require_kernels(f"`mode` {arguments.mode} can write to")
    except InputError as error:
        raise InputError(f"`arch` {arguments.arch}: {error}") from error
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InputError(f"`arch` {arguments.arch}: its state_dict holds a {kind}, {name}; expected only tensors")
    data = used_images(arguments, dataset)
    with side_effect_free(model):
        _check_logits(model, data.normalize(data.test.images[:1]), arguments, data.classes)
        _check_small_batches(model, data, arguments)
        # of synchronized batch norm, which needs all processes and a GPU, only evaluation can be tried here
        if arguments.processes == 1 and len(data.train) > 1:
            model.train()
            with torch.enable_grad():
                logits = _check_logits(model, data.normalize(data.train.images[:2]), arguments, data.classes)
            if not logits.requires_grad:
                raise InputError(
                    f"`arch` {arguments.arch}: its logits depend on no trainable parameter; set requires_grad of some"
                )


def _check_logits(model: nn.Module, images: Tensor, arguments: Arguments, classes: int) -> Tensor:
    count, state = len(images), " in training" if model.training else ""
    try:
        logits = model(images)
    except (Exception, SystemExit) as error:  # a network may raise anything
        raise InputError(
            f"`arch` {arguments.arch}: does not run{state} on images {list(images.shape)} of {arguments.dataset} "
            f"({brief(error)})"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count or logits.shape[1] < classes:
        output = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"`arch` {arguments.arch}: returns {output} for {'one image' if count == 1 else f'{count} images'}{state}, "
            f"expected [{count}, {classes}] logits, one for each class of {arguments.dataset}"
        )
    return logits


def _check_small_batches(model: nn.Module, dataset: Dataset, arguments: Arguments) -> None:
    """Batch normalization may refuse a batch of one image: the last one in training, or one in evaluation."""
    last = len(dataset.train) % arguments.batch_size or arguments.batch_size
    in_training = last // arguments.processes <= 1
    evaluated = {"test": dataset.test, "validation": dataset.validation}
    alone = [name for name, split in evaluated.items() if split and len(split) // arguments.processes <= 1]
    in_evaluation = alone if arguments.bn_statistics == "batch" else []
    if not in_training and not in_evaluation:
        return
    try:
        model.train()(dataset.normalize(dataset.train.images[:1]))
    except ValueError as error:
        cause = f"`batch_size` {arguments.batch_size}: the last batch of {len(dataset.train)} training images"
        if not in_training:
            cause = f"`bn_statistics` batch: the {alone[0]} set of {len(evaluated[alone[0]] or [])} images"
        raise InputError(
            f"{cause} leaves one image for a process, and {arguments.arch} cannot normalize such a batch ({error})"
        ) from error


@torch.no_grad()
def prepare_(model: nn.Module, settings: Arguments, images: Callable[[], Tensor], advance: Advance) -> None:
    """Give the kernels the directions, the norms, or both, that a run's mode and method ask for, in place.

    images: gives the `first_images`. A method that needs them comes last, and keeps the norms: without batch
    normalization, the scale of one layer matters to the maps of the next. Raises InputError and DivergedError; the
    network is then untouched.
    """
    method, selection = _method(settings), module_kernels(model)
    minimization, norms = _minimizations(settings)
    warn_of_unsupported(minimization.select(selection) if minimization else selection)
    if caution := method and method.warning({name: value.shape for name, value in model.state_dict().items()}):
        warnings.warn(caution, ConvsimWarning, stacklevel=2)
    weights = {kernel.name: weight_of(model, kernel) for kernel in selection.kernels}
    with undone_on_failure(list(weights.values())):
        shrunk = _minimized(selection, weights, norms, advance) if norms else {}  # from the fresh kernels
        if minimization:
            for name, minimized in _minimized(selection, weights, minimization, advance).items():
                weights[name].copy_(minimized)
        for kernel in selection.kernels:
            weight = weights[kernel.name]
            if method and method.of_kernel:
                weight.copy_(method.of_kernel(kernel, weight))
                advance(1)
            if kernel.name in shrunk:
                weight.copy_(rescale_to(kernel, weight, shrunk[kernel.name]))
            if settings.factor is not None:
                smallest = torch.finfo(weight.dtype).tiny if weight.any() else 0  # below it, a weight loses its digits
                if not smallest <= weight.mul_(settings.factor).abs().max() < torch.inf:
                    raise InputError(
                        f"`factor` {settings.factor}: the weights of {kernel.name} leave the range of {weight.dtype}; "
                        "choose a factor nearer to 1"
                    )
        if method and method.of_maps:
            called = {record["name"] for record in method.of_maps(model, selection.kernels, images(), advance)}
            if uncalled := [kernel.name for kernel in selection.kernels if kernel.name not in called]:
                message = f"layers that no inputs reach are unchanged: {', '.join(uncalled)}"
                warnings.warn(message, ConvsimWarning, stacklevel=2)


def first_images(data: Dataset, device: torch.device) -> Tensor:
    """Return the first training images `[B, 3, height, width]`, normalized, without augmentation."""
    return data.normalize(data.train.images[:IMAGES].to(device))


def count_steps(model: nn.Module, settings: Arguments) -> int:
    """Return the number of steps that `prepare_` reports: those of its minimizations, and one per closed-form layer."""
    method, selection = _method(settings), module_kernels(model)
    layers = len(selection.kernels) if method and not method.iterates else 0
    return layers + sum(how.steps(how.select(selection).kernels) for how in _minimizations(settings) if how)


def _method(settings: Arguments) -> Method | None:
    return METHODS[settings.method] if MODES[settings.mode].initializes else None


def _minimizations(settings: Arguments) -> tuple[Minimization | None, Minimization | None]:
    """The minimization of the run's method, and the one that norms are taken from; None if there is none."""
    method, raw = _method(settings), Minimization(settings.iterations, settings.init_lr)
    own = None
    if method and method.iterates:
        own = replace(raw, preserve_norm=settings.preserve_norm, objective=method.name)
    return own, raw if settings.takes_raw_norms else None


def _minimized(
    selection: Selection, weights: dict[str, Tensor], how: Minimization, advance: Advance
) -> dict[str, Tensor]:
    """The minimized weights by name; the model's are not written to."""
    kernels = how.select(selection).kernels
    found = minimize_kernels([(kernel, weights[kernel.name]) for kernel in kernels], how, advance)
    return {kernel.name: weight for kernel, (weight, _) in zip(kernels, found, strict=True)}
