"""Carry out a training run, from its start or from its last whole epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch

from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.names import build_network
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.modes import MODES
from convsim_cli.training.preparation import count_steps, first_images, prepare_
from convsim_cli.training.processes import ALONE, Processes
from convsim_cli.training.results import Row, write_results
from convsim_cli.training.run_data import load_data, used_images
from convsim_cli.training.run_folder import Run, locked, open_run, write_arguments, write_json
from convsim_cli.training.run_network import build_with_weights
from convsim_cli.training.run_state import Log, read_state, save_state
from convsim_cli.training.summary import feature_map_cosines, summarize_run
from convsim_cli.training.tensorboard_log import tensorboard_log
from convsim_cli.training.trainer import Trainer, choose_algorithms


class Listener(Protocol):
    """What a run reports while it is carried out."""

    def data(self, dataset: Dataset) -> None:
        """The run's images are loaded."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of this many steps begins: `init`, then `epoch N`."""

    def advance(self, steps: int) -> None:
        """Steps of the phase are done."""

    def row(self, row: Row) -> None:
        """An epoch has ended."""


class Silence:
    """A listener that does nothing."""

    def data(self, dataset: Dataset) -> None: ...

    def phase(self, name: str, steps: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def row(self, row: Row) -> None: ...


def execute(
    run: Run, listener: Listener | None = None, dataset: Dataset | None = None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Train a run to its number of epochs, resuming after its last whole epoch, and return its summary.

    dataset: the run's whole data set, if it is loaded already. Only rank 0 touches the folder; the other processes
    return an empty summary. Raises DivergedError (the last good checkpoint is kept), InputError for a damaged
    `state.pt`, a lost one or that of another run, and BusyError for a run that another process is working on.
    """
    listener = listener or Silence()
    arguments = run.arguments
    arguments.check()
    _check_processes(run, processes)
    choose_algorithms(arguments.deterministic)
    with ExitStack() as held:
        processes.on_rank_zero(lambda: held.enter_context(locked(run.folder)))
        state = processes.on_rank_zero(lambda: read_state(run))  # refused before a data set is downloaded
        data = used_images(arguments, dataset or load_data(arguments))
        listener.data(data)
        trainer, log = _resume(run, data, state, processes) if state else _start(run, data, listener, processes)
        if processes.is_rank_zero:
            _update_folder(run, trainer.epoch)
        log_row = _open_log(run, trainer, held)
        while trainer.epoch < arguments.epochs:
            listener.phase(f"epoch {trainer.epoch + 1}/{arguments.epochs}", trainer.steps)
            row = trainer.run_epoch(listener.advance)
            log["history"].append(row)
            log_row(row)
            save_state(run, trainer, log)
            listener.row(row)
        if not processes.is_rank_zero:
            return {}
        summary = summarize_run(trainer, log)
        write_json(run.folder / "summary.json", summary)
    return summary


def _open_log(run: Run, trainer: Trainer, held: ExitStack) -> Callable[[Row], None]:
    """What takes each epoch's row on rank 0: TensorBoard's log if the run has one, else nothing."""
    if not run.arguments.tensorboard:
        return lambda row: None
    logs: list[Callable[[Row], None]] = []
    opened = tensorboard_log(run.folder, trainer.epoch + 1)
    trainer.processes.on_rank_zero(lambda: logs.append(held.enter_context(opened)))
    return lambda row: trainer.processes.on_rank_zero(lambda: logs[0](row))


def _check_processes(run: Run, processes: Processes) -> None:
    began, now = run.arguments.processes, processes.size
    if began == now:
        return
    before, how = f"{began} processes", f"use torchrun --nproc-per-node {began}"
    if began == 1:
        before, how = "1 process", "resume it without torchrun"
    raise InputError(f"{run.folder} was started with {before}, but this launch has {now}; {how}")


def _update_folder(run: Run, epochs_done: int) -> None:
    if open_run(run.folder).arguments != run.arguments:
        write_arguments(run)
    if epochs_done < run.arguments.epochs:
        (run.folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one


def _start(run: Run, data: Dataset, listener: Listener, processes: Processes) -> tuple[Trainer, Log]:
    arguments, device = run.arguments, _device(run, processes)
    if processes.is_rank_zero:
        _warn_of_nothing_to_hold(arguments)
    model = build_with_weights(arguments, data.classes).to(device)
    torch.manual_seed(arguments.seed + processes.rank)  # rank 0 draws what a single process would
    prepared = MODES[arguments.mode].directions is not None
    if prepared:  # on rank 0 only: the other processes receive its weights
        listener.phase("init", count_steps(model, arguments))
        images = partial(first_images, data, device)
        processes.on_rank_zero(lambda: prepare_(model, arguments, images, listener.advance))
    trainer = Trainer(model, data, arguments, device, processes)
    cosines = feature_map_cosines(model, data, device, prepared) if processes.is_rank_zero else {}
    log: Log = {"history": [], "fm_cos_start": cosines}
    save_state(run, trainer, log)
    return trainer, log


def _warn_of_nothing_to_hold(arguments: Arguments) -> None:
    lowered = arguments.preserve_norm or arguments.weights or MODES[arguments.mode].lowers
    if arguments.hold_similarity and not lowered:
        modes = ", ".join(mode.name for mode in MODES.values() if mode.lowers)
        warnings.warn(
            f"`hold_similarity` has nothing to hold: `mode` {arguments.mode} leaves ncs near 1 at the start; "
            f"use `mode` {modes}, or init with `preserve_norm`",
            ConvsimWarning,
            stacklevel=2,
        )


def _resume(run: Run, data: Dataset, state: dict[str, Any], processes: Processes) -> tuple[Trainer, Log]:
    arguments, device = run.arguments, _device(run, processes)
    model = build_network(arguments.arch, data.classes, arguments.seed)
    trainer = Trainer(model, data, arguments, device, processes)
    trainer.load_state(state["trainer"])
    if processes.is_rank_zero:
        write_results(run.folder, state["progress"]["history"], validated=arguments.validation is not None)
    return trainer, state["progress"]


def _device(run: Run, processes: Processes) -> torch.device:
    """This process's device: of several on CUDA, the one that it has taken."""
    device = torch.device(run.arguments.device)
    return torch.device("cuda", torch.cuda.current_device()) if processes.size > 1 and device.type == "cuda" else device
