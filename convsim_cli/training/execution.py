"""Carry out a training run, from its start or from where it stopped."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.pickle_format import write_pickle
from convsim_cli.checkpoints.state_dict import save_state_dict
from convsim_cli.errors import InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset, parse_channels
from convsim_cli.measurement.network import fm_cos_by_layer
from convsim_cli.networks.names import CLASSES, build_network, count_parameters, usual_side
from convsim_cli.networks.weights import load_weights
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.modes import preparation_steps, prepare_
from convsim_cli.training.processes import ALONE, Processes
from convsim_cli.training.run_folder import Row, Run, locked, open_run, write_json, write_results
from convsim_cli.training.trainer import Trainer, be_deterministic

FEATURE_MAP_IMAGES = 16  # test images that the summary's fm_cos is taken over


class Listener(Protocol):
    """What a run tells whoever watches."""

    def phase(self, name: str, steps: int) -> None:
        """A new phase begins: `init`, then `epoch N`."""

    def advance(self, steps: int) -> None:
        """Steps of the phase were done."""

    def row(self, row: Row) -> None:
        """An epoch ended."""


class Silence:
    """A listener that says nothing."""

    def phase(self, name: str, steps: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def row(self, row: Row) -> None: ...


def load_inputs(arguments: Arguments) -> Dataset:
    """Return a run's data set, having tried its network and weights too: what is wrong shows before a folder is made.

    Raises InputError.
    """
    arguments.check()
    build_network(arguments.arch, CLASSES)  # an unknown one shows before a data set is fetched
    dataset = _load(arguments)
    check_network(arguments, dataset)
    return dataset


def check_network(arguments: Arguments, dataset: Dataset) -> None:
    """Raise InputError for a network, or weights, that a run on this data set could not work with."""
    model = network_with_weights(arguments, dataset.classes)
    try:
        ConvSimPenalty(model)
    except InputError as error:
        raise InputError(f"--arch {arguments.arch}: {error}") from error
    _try(model, dataset.limited(arguments.limit_train, arguments.limit_test), arguments)


def execute(
    run: Run, listener: Listener | None = None, dataset: Dataset | None = None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Train a run to its number of epochs, from its last whole epoch where it has any, and return its summary.

    Of several processes the leading one alone touches the folder; the others return an empty summary. Raises
    DivergedError (the last good checkpoint is kept), InputError for a `state.pt` that is torn or another run's, and
    BusyError for a run that another process is working on.
    """
    listener = listener or Silence()
    arguments = run.arguments
    arguments.check()
    if arguments.processes != processes.size:
        raise InputError(
            f"{run.folder}: is trained by {arguments.processes} processes, these are {processes.size}; start as many"
        )
    if arguments.deterministic:
        be_deterministic()
    with ExitStack() as held:
        processes.led(lambda: held.enter_context(locked(run.folder)))
        data = dataset or _load(arguments)
        data = data.limited(arguments.limit_train, arguments.limit_test)
        state = processes.led(lambda: _read_state(run))
        trainer, progress = _resume(run, data, state, processes) if state else _start(run, data, listener, processes)
        if processes.leads and open_run(run.folder).arguments != arguments:
            write_json(run.folder / "args.json", asdict(arguments))
        if processes.leads and trainer.epoch < arguments.epochs:
            (run.folder / "summary.json").unlink(missing_ok=True)  # a summary stands for a finished run
        while trainer.epoch < arguments.epochs:
            listener.phase(f"epoch {trainer.epoch + 1}/{arguments.epochs}", trainer.steps)
            row = trainer.run_epoch(listener.advance)
            progress["history"].append(row)
            _save(run, trainer, progress)
            listener.row(row)
        if not processes.leads:
            return {}
        summary = _summary(trainer, progress)
        write_json(run.folder / "summary.json", summary)
    return summary


def _load(arguments: Arguments) -> Dataset:
    side = arguments.image_size or usual_side(arguments.arch)
    mean, std = parse_channels("--mean", arguments.mean), parse_channels("--std", arguments.std)
    return load_dataset(arguments.dataset, Path(arguments.data_dir), side, mean, std)


def _try(model: nn.Module, dataset: Dataset, arguments: Arguments) -> None:
    """Raise InputError for a network that cannot classify the images, or not train on the last batch."""
    images = dataset.normalize(dataset.test.images[:1])
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # whatever a network asserts or runs into
        raise InputError(
            f"--arch {arguments.arch}: does not run on images {list(images.shape)} of {arguments.dataset} "
            f"({' '.join(str(error).split())[:160]})"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < dataset.classes:
        gives = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"--arch {arguments.arch}: gives {gives} for one image, expected [1, {dataset.classes}] logits, "
            f"for the classes of {arguments.dataset}"
        )
    last = len(dataset.train) % arguments.batch_size or arguments.batch_size
    if last // arguments.processes <= 1:
        try:
            with torch.no_grad():
                model.train()(images)
        except ValueError as error:  # batch normalization of a single value
            raise InputError(
                f"--batch-size {arguments.batch_size}: leaves a process a batch of one image at the end of "
                f"{len(dataset.train)}, on which {arguments.arch} cannot train ({error})"
            ) from error


def network_with_weights(arguments: Arguments, classes: int) -> nn.Module:
    """Return the fresh network of a run, with the tensors of its `weights` file where it names one."""
    model = build_network(arguments.arch, classes, arguments.seed)
    if arguments.weights:
        checkpoint = open_checkpoint(Path(arguments.weights))
        load_weights(model, checkpoint, arguments.arch)
        for line in (checkpoint.note or "").splitlines():
            warnings.warn(line, stacklevel=2)
    return model


def sample_maps(model: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, float | None]:
    """Return `fm_cos` per layer on the first test images."""
    images = dataset.normalize(dataset.test.images[:FEATURE_MAP_IMAGES].to(device))
    return fm_cos_by_layer(model, images)


def _start(run: Run, data: Dataset, listener: Listener, processes: Processes) -> tuple[Trainer, dict[str, Any]]:
    arguments, device = run.arguments, _device(run, processes)
    model = network_with_weights(arguments, data.classes).to(device)
    torch.manual_seed(arguments.seed + processes.rank)  # the leader's is a single process's
    steps = preparation_steps(model, arguments)
    if steps:  # the others take its weights
        listener.phase("init", steps)
        processes.led(lambda: prepare_(model, arguments, listener.advance))
    trainer = Trainer(model, data, arguments, device, processes)
    maps = sample_maps(model, data, device) if processes.leads else {}
    progress: dict[str, Any] = {"history": [], "fm_cos_start": maps}
    _save(run, trainer, progress)
    return trainer, progress


def _resume(run: Run, data: Dataset, state: dict[str, Any], processes: Processes) -> tuple[Trainer, dict[str, Any]]:
    arguments, device = run.arguments, _device(run, processes)
    model = build_network(arguments.arch, data.classes, arguments.seed)
    trainer = Trainer(model, data, arguments, device, processes)
    trainer.load_state(state["trainer"])
    if processes.leads:
        write_results(run.folder, state["progress"]["history"])
    return trainer, state["progress"]


def _device(run: Run, processes: Processes) -> torch.device:
    """This process's device: of several on CUDA, the one that it has taken."""
    device = torch.device(run.arguments.device)
    return torch.device("cuda", torch.cuda.current_device()) if processes.size > 1 and device.type == "cuda" else device


def _save(run: Run, trainer: Trainer, progress: dict[str, Any]) -> None:
    state = {"arguments": asdict(run.arguments), "progress": progress, "trainer": trainer.state()}
    trainer.processes.led(lambda: _write(run, trainer, progress, state))


def _write(run: Run, trainer: Trainer, progress: dict[str, Any], state: dict[str, Any]) -> None:
    history: list[Row] = progress["history"]
    record = {
        "convsim.epoch": str(trainer.epoch),
        "convsim.mode": run.arguments.mode,
        "convsim.arch": run.arguments.arch,
    }
    weights = trainer.model.state_dict()
    save_state_dict(weights, run.folder / "last.safetensors", record)
    if history and history[-1]["test_accuracy"] > max((row["test_accuracy"] for row in history[:-1]), default=-1.0):
        save_state_dict(weights, run.folder / "best.safetensors", record)
    write_results(run.folder, history)
    replace_file(run.folder / "state.pt", lambda file: write_pickle(file, state))


def _read_state(run: Run) -> dict[str, Any] | None:
    path = run.folder / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        former = {**asdict(Arguments()), **state["arguments"]}
        done = int(state["trainer"]["epoch"])
    except Exception as error:  # whatever a torn pickle raises
        raise InputError(
            f"{path}: damaged ({type(error).__name__}); the run cannot go on, its last.safetensors may be whole; "
            f"remove {run.folder} to train it anew"
        ) from error
    for key, value in asdict(run.arguments).items():
        if key != "epochs" and former[key] != value:
            raise InputError(f"{path}: belongs to a run with {key} = {former[key]!r}, args.json says {value!r}")
    if run.arguments.epochs < done:
        raise InputError(f"{run.folder}: has done {done} epochs, --epochs {run.arguments.epochs} is fewer")
    return state


def _summary(trainer: Trainer, progress: dict[str, Any]) -> dict[str, Any]:
    history: list[Row] = progress["history"]
    best = max(history, key=lambda row: row["test_accuracy"])
    seconds = sum(row["seconds"] for row in history)
    return {
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "last_test_accuracy": history[-1]["test_accuracy"],
        "mean_last5_test_accuracy": mean(row["test_accuracy"] for row in history[-5:]),
        "last_train_accuracy": history[-1]["train_accuracy"],
        "cs": history[-1]["cs"],
        "fm_cos": {
            "start": progress["fm_cos_start"],
            "end": sample_maps(trainer.model, trainer.dataset, trainer.device),
        },
        "parameters": count_parameters(trainer.model),
        "epochs": len(history),
        "seconds": seconds,
        "images_per_second": len(history) * len(trainer.dataset.train) / seconds,
    }
