"""A training run, from its start or from its last whole epoch to its last one, and the folder that keeps it.

The folder holds `args.json` (the run's arguments), `results.csv` (a row per epoch), `layers.csv` (a row per epoch and
layer: how far its filters turned), `last.safetensors` and `best.safetensors` (the network after its last and its best
epoch), `state.pt` (what a bit-exact resume needs) and, once the run is finished, `summary.json`. Every file is replaced
as a whole: the results after every epoch, weights and state after those that `Saves` chooses. `state.pt` comes last,
and it alone decides how far the run has come: after a crash, the run repeats the epochs since, with the same result.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import mean, stdev
from typing import Any, Literal
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.atomic import check_folder, check_regular, free_names, replace_file
from convsim_cli.checkpoints.pickle_format import load_pickle, write_pickle
from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint, write_safetensors
from convsim_cli.device import Progress, read_bounded, read_json, seed_generators, unreported
from convsim_cli.errors import ConvsimWarning, InputError, WriteError, brief, is_out_of_memory, open_regular
from convsim_cli.inputs.images import Dataset
from convsim_cli.measurement.network import fm_corr_by_layer
from convsim_cli.networks.architectures import build_network, count_parameters, to_repeat
from convsim_cli.training.config import MODES, Arguments, make_arguments
from convsim_cli.training.distributed import ALONE, Processes, locked
from convsim_cli.training.prepare import (
    build_with_weights,
    count_steps,
    first_images,
    import_summary_writer,
    load_data,
    prepare_,
    used_images,
)
from convsim_cli.training.trainer import VALIDATION_COLUMNS, Trainer, choose_algorithms

ARGUMENTS_FILE = "args.json"
RESULTS_FILE = "results.csv"
LAYERS_FILE = "layers.csv"
FORMER_BEST = ".former-best.safetensors"  # while a save is under way
COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")  # of results.csv
LAYER_COLUMNS = ("epoch", "layer", "norm", "turn_per_step", "turned")  # of layers.csv; angles in degrees
SAVING = 0.05  # of the time since the last save, that this save may have taken for the next one to be due
LAST_EPOCHS = 5  # that the mean of the last test accuracies is over
FEATURE_MAP_IMAGES = 16  # the first test images, over which `fm_corr` is taken

Row = dict[str, Any]  # of results.csv, by column
Log = dict[str, Any]  # "history": the rows so far; "fm_corr_start": `fm_corr` per layer, before training


@dataclass(frozen=True)
class Run:
    """A run's folder and its arguments."""

    folder: Path
    arguments: Arguments

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class RunCallbacks:
    """Callbacks of a run in training; each does nothing by default.

    begin: takes the run and the images that it uses, before it starts or resumes. progress: takes a phase (`init`, then
    `epoch N/M`) and its number of steps, and gives what advances it. epoch: takes the row of each epoch.
    """

    begin: Callable[[Run, Dataset], object] = lambda run, data: None
    progress: Progress = unreported
    epoch: Callable[[Row], object] = lambda row: None


SILENT = RunCallbacks()


def train_run(
    run: Run,
    callbacks: RunCallbacks = SILENT,
    dataset: Dataset | None = None,
    processes: Processes = ALONE,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Train a run to its number of epochs, resuming after its last whole epoch, and return its summary.

    dataset: what `load_data` gives, if it is loaded already. model: what `build_with_weights` gives, if it is built
    already. Only rank 0 touches the folder; the other processes return an empty summary. Raises DivergedError (the last
    good checkpoint is kept), InputError for a damaged `state.pt`, a lost one or that of another run, and BusyError for
    a run that another process is working on.
    """
    arguments = run.arguments
    arguments.check()
    if arguments.processes != processes.size:
        several = f"{arguments.processes} processes", f"use torchrun --nproc-per-node {arguments.processes}"
        began, way = several if arguments.processes > 1 else ("1 process", "resume it without torchrun")
        raise InputError(f"{run.folder} was started with {began}, but this launch has {processes.size}; {way}")
    with ExitStack() as held:
        held.callback(choose_algorithms(arguments.deterministic))
        processes.on_rank_zero(lambda: held.enter_context(locked(run.folder)))
        state = processes.on_rank_zero(lambda: read_state(run))  # refused before a dataset is downloaded
        data = used_images(arguments, dataset or processes.rank_zero_first(lambda: load_data(arguments)))
        callbacks.begin(run, data)
        trainer, log = _resume(run, data, state, processes) if state else _start(run, data, model, processes, callbacks)
        saves = Saves(run, trainer, log)
        if not state:
            saves.save()
        if processes.is_rank_zero:
            if open_run(run.folder).arguments != arguments:
                write_json(run.folder / ARGUMENTS_FILE, asdict(arguments))
            if trainer.epoch < arguments.epochs:
                check_regular(run.folder / "summary.json")
                (run.folder / "summary.json").unlink(missing_ok=True)  # only a finished run has one
        log_row, trained = held.enter_context(tensorboard_log(run, trainer)), trainer.epoch < arguments.epochs
        while trainer.epoch < arguments.epochs:
            with callbacks.progress(f"epoch {trainer.epoch + 1}/{arguments.epochs}", trainer.steps) as advance:
                row = trainer.run_epoch(advance)
            row["seconds"] = saves.lap()
            log["history"].append(row)
            log.setdefault("layers", []).extend({"epoch": row["epoch"], **layer} for layer in trainer.turned.rows())
            log_row(row)
            saves.after_epoch()
            callbacks.epoch(row)
        if not processes.is_rank_zero:
            return {}
        _restore_weights(run, trainer, log["history"], ended=True)
        summary = summarize_run(trainer, log, saves.lap())
        if not trained:  # how long it took does not change
            with suppress(OSError, ValueError, KeyError, TypeError):
                former = read_json(run.folder / "summary.json")
                summary |= {name: former[name] for name in ("seconds", "images_per_second")}
        write_json(run.folder / "summary.json", summary)
    return summary


def _start(
    run: Run, data: Dataset, model: nn.Module | None, processes: Processes, callbacks: RunCallbacks
) -> tuple[Trainer, Log]:
    arguments, device = run.arguments, torch.device(run.arguments.device)
    model = (build_with_weights(arguments, data.classes) if model is None else model).to(device)
    seed_generators(arguments.seed + processes.rank)  # rank 0 draws what a single process would
    prepared = MODES[arguments.mode].initializes or MODES[arguments.mode].scales
    if prepared:  # on rank 0 only: the other processes receive its weights
        with callbacks.progress("init", count_steps(model, arguments)) as advance:
            processes.on_rank_zero(lambda: prepare_(model, arguments, lambda: first_images(data, device), advance))
    trainer = Trainer(model, data, arguments, device, processes)
    start = feature_map_correlations(model, data, device, prepared) if processes.is_rank_zero else {}
    return trainer, {"history": [], "fm_corr_start": start}


def _resume(run: Run, data: Dataset, state: dict[str, Any], processes: Processes) -> tuple[Trainer, Log]:
    arguments, log = run.arguments, state["progress"]
    model = build_network(arguments.arch, data.classes, arguments.seed)
    trainer = Trainer(model, data, arguments, torch.device(arguments.device), processes)
    seed_generators(arguments.seed + processes.rank)  # a state of version 0.2 has not all generators
    try:
        trainer.load_state(state["trainer"])
    except Exception as error:  # a damaged state may raise anything
        raise _unusable(run, error) from error
    if processes.is_rank_zero:
        _restore_weights(run, trainer, log["history"])
        write_tables(run, log)
    return trainer, log


def _restore_weights(run: Run, trainer: Trainer, history: Sequence[Row], ended: bool = False) -> None:
    """Write weights that are missing or damaged again; where the state does not hold them, move them away and warn."""
    former = run.folder / FORMER_BEST
    with suppress(ValueError, OSError):
        check_regular(former)
        if history and SafetensorsCheckpoint(former).metadata.get("convsim.epoch") == str(best_row(history)["epoch"]):
            former.replace(run.folder / "best.safetensors")
        former.unlink()
    for name, epoch in (("last", trainer.epoch), *([("best", best_row(history)["epoch"])] if history else [])):
        path = run.folder / f"{name}.safetensors"
        with suppress(ValueError, OSError):
            check_regular(path)
            checkpoint = SafetensorsCheckpoint(path)
            saved = checkpoint.metadata
            # of a crash: they are written before the state, and mostly repeated until the run has ended
            ahead = not ended and int(saved.get("convsim.epoch", 0)) > trainer.epoch
            known = (saved.get("convsim.epoch"), saved.get("convsim.arch")) == (str(epoch), run.arguments.arch)
            if ahead or (known and (ended or epoch != trainer.epoch or _holds(checkpoint, trainer.model.state_dict()))):
                continue
        if epoch == trainer.epoch:
            _write_weights(run, name, trainer.model.state_dict(), epoch)
            continue
        moved = ""
        if path.exists():
            [aside] = free_names([path.with_name(f"{path.name}.damaged")])
            moved = f"; it is now {path.replace(aside).name}"
        elif ended:
            continue  # a resume has said so
        message = (
            f"{path}: missing, damaged or of another epoch{moved}; the weights of epoch {epoch} are lost until a "
            "better epoch replaces them"
        )
        warnings.warn(message, ConvsimWarning, stacklevel=2)


def _holds(checkpoint: SafetensorsCheckpoint, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a file holds these weights."""
    complete = weights.keys() <= checkpoint.tensors.keys()
    return complete and all(torch.equal(checkpoint.load(name), weight.cpu()) for name, weight in weights.items())


def feature_map_correlations(
    model: nn.Module, dataset: Dataset, device: torch.device, kernels_changed: bool = False
) -> dict[str, float | None]:
    """Return `fm_corr` per layer on the first test images.

    kernels_changed: since the batch-norm statistics were stored, so that those of the images serve instead.
    """
    images = dataset.normalize(dataset.test.images[:FEATURE_MAP_IMAGES].to(device))
    return fm_corr_by_layer(model, images, kernels_changed)


def summarize_run(trainer: Trainer, log: Log, since: float) -> dict[str, Any]:
    """Return a run's summary: accuracies in per cent; `seconds` and `images_per_second`, with those `since` its end.

    `classes` has the number of training and test images of each class, in the order of the network's outputs.
    """
    history: list[Row] = log["history"]
    best, accuracies = best_row(history), {name: figure(history) for name, figure in ACCURACIES.items()}
    seconds = sum(row["seconds"] for row in history) + since
    validated = {"best_validation_accuracy": best["validation_accuracy"]} if "validation_accuracy" in best else {}
    return {
        "best_test_accuracy": accuracies.pop("best_test_accuracy"),
        "best_epoch": best["epoch"],
        **validated,
        **accuracies,
        "cs": history[-1]["cs"],
        "beta": trainer.beta if trainer.mode.regularizes else None,
        "fm_corr": {
            "start": log.get("fm_corr_start", {}),  # a state of convsim 0.2 has `fm_cos_start`, another figure
            "end": feature_map_correlations(trainer.model, trainer.dataset, trainer.device),
        },
        "classes": trainer.dataset.images_of_classes(),
        "parameters": count_parameters(trainer.model),
        "epochs": len(history),
        "seconds": seconds,
        "images_per_second": len(history) * len(trainer.dataset.train) / seconds,
    }


class Saves:
    """Saves a run at its start, at its end, and after an epoch if the last save took less than 5 % of the time since.

    What a kill can lose is then an epoch, or 20 times what a save takes. All processes must call the methods.
    """

    def __init__(self, run: Run, trainer: Trainer, log: Log) -> None:
        self._run, self._trainer, self._log = run, trainer, log
        self._place = trainer.processes.on_rank_zero(run.folder.stat)
        self._took = 0.0  # seconds, of the last save; after a resume not known
        self._ended = self._counted = time.perf_counter()
        self._best: dict[str, Tensor] | None = None  # weights of the best epoch, while they are not saved

    def lap(self) -> float:
        """Return the seconds since the last call, or since the start: those of an epoch, and of saves before it."""
        before, self._counted = self._counted, time.perf_counter()
        return self._counted - before

    def after_epoch(self) -> None:
        """Save if it is due; results are written in any case. Raises WriteError, InputError for another folder."""

        def check_place() -> None:
            folder = self._run.folder
            if not folder.exists() or not os.path.samestat(folder.stat(), self._place):
                raise InputError(f"{folder}: moved, removed or replaced during training; resume it where it is now")

        self._trainer.processes.on_rank_zero(check_place)
        trainer, history = self._trainer, self._log["history"]
        is_last, elapsed = trainer.epoch >= self._run.arguments.epochs, time.perf_counter() - self._ended
        due = trainer.processes.on_rank_zero(lambda: is_last or self._took < SAVING * elapsed)
        if trainer.processes.is_rank_zero and best_row(history) is history[-1]:
            weights = trainer.model.state_dict()
            self._best = weights if due else copy.deepcopy(weights)
        if due:
            return self.save()
        trainer.processes.on_rank_zero(lambda: write_tables(self._run, self._log))

    def save(self) -> None:
        """Save the run as it is between two epochs. Raises WriteError."""
        began = time.perf_counter()
        save_state(self._run, self._trainer, self._log, self._best)
        self._best, self._ended = None, time.perf_counter()
        self._took = self._ended - began


def save_state(run: Run, trainer: Trainer, log: Log, best: dict[str, Tensor] | None = None) -> None:
    """Save a run between two epochs. Rank 0 writes; all processes must call this. Raises WriteError.

    best: weights of the best epoch, unless they are saved.
    """
    state = {"arguments": asdict(run.arguments), "progress": log, "trainer": trainer.state()}

    def write() -> None:
        _write_weights(run, "last", trainer.model.state_dict(), trainer.epoch)
        former = run.folder / FORMER_BEST  # which the last state names, until there is a new one
        if best is not None:
            with suppress(OSError):  # none yet, or a file system without hard links
                former.unlink(missing_ok=True)
                former.hardlink_to(run.folder / "best.safetensors")
            _write_weights(run, "best", best, best_row(log["history"])["epoch"])
        write_tables(run, log)
        replace_file(run.folder / "state.pt", lambda file: write_pickle(file, state))
        with suppress(OSError):
            former.unlink()
        write_json(run.folder / ARGUMENTS_FILE, asdict(run.arguments))  # without it the folder is no run's any more

    trainer.processes.on_rank_zero(write)


def _write_weights(run: Run, name: str, weights: dict[str, Tensor], epoch: int) -> None:
    record = {"convsim.epoch": str(epoch), "convsim.mode": run.arguments.mode, "convsim.arch": run.arguments.arch}
    replace_file(run.folder / f"{name}.safetensors", lambda file: write_safetensors(file, weights, record))


def write_tables(run: Run, log: Log) -> None:
    """Replace a run's results.csv and layers.csv. Raises WriteError."""
    write_results(run.folder, log["history"], run.arguments.validation is not None)
    replace_file(run.folder / LAYERS_FILE, lambda file: file.write(_as_csv(LAYER_COLUMNS, log.get("layers", []))))


def read_state(run: Run) -> dict[str, Any] | None:
    """Return what `save_state` saved, None for a run that has not got so far.

    Raises InputError for a damaged state, one of another run, one of more epochs than the run is to have, and as
    `check_resumable`.
    """
    check_folder(run.folder)
    check_resumable(run)
    path = run.folder / "state.pt"
    if not path.exists():
        return None
    try:
        with open_regular(path) as file, ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size or archive.testzip():
                raise ValueError("its bytes differ from those saved")  # torch does not look at the checksums
            state: dict[str, Any] = load_pickle(path, file)[1]
        former, done = make_arguments(state["arguments"], path), state["trainer"]["epoch"]
        _check_progress(state["progress"], done, former.validation is not None)
    except Exception as error:  # a damaged pickle may raise anything
        raise _unusable(run, error) from error
    saved, wanted = former.identity(), run.arguments.identity()
    for name in (*wanted, *saved):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: belongs to a run with {name} = {saved.get(name)!r}, args.json says {wanted.get(name)!r}"
            )
    if run.arguments.epochs < done:
        raise InputError(
            f"{run.folder}: has done {done} epochs, more than `epochs` {run.arguments.epochs}; ask for as many"
        )
    return state


def _unusable(run: Run, error: Exception) -> Exception:
    if is_out_of_memory(error):  # the state may be intact
        return error
    path, again = run.folder / "state.pt", f"last.safetensors may be intact; to train it again, move {run.folder} away"
    what, advice = ("cannot be read", "") if isinstance(error, OSError) else ("damaged", f"; its {again}")
    reason = brief(error).removeprefix(f"{path}: ")
    if reason.startswith("model: "):  # its checksums are right
        advice = f"; if the code of `arch` {run.arguments.arch} has changed, restore it{advice}"
    return InputError(f"{path}: {what} ({reason}), so the run cannot be resumed{advice}")


def _check_progress(progress: dict[str, Any], epochs: Any, validated: bool) -> None:
    """Raise ValueError unless the results in a state are those of its epochs, each row whole."""
    history, layers, start = progress["history"], progress.get("layers", []), progress.get("fm_corr_start", {})
    if type(epochs) is not int or epochs != len(history):
        raise ValueError(f"the trainer is at epoch {epochs}, its results have {len(history)} epochs")
    if type(history) is not list or type(layers) is not list:
        raise ValueError(f"the results are a {type(history).__name__} and a {type(layers).__name__}")
    columns = COLUMNS + VALIDATION_COLUMNS * validated
    for number, row in enumerate(history, 1):
        if set(row) != set(columns) or row["epoch"] != number or not _are_finite(row.values()):
            raise ValueError(f"the results of epoch {number} are {row}")
    for row in layers:
        figures = [value for name, value in row.items() if name != "layer" and value is not None]
        if set(row) != set(LAYER_COLUMNS) or not isinstance(row["layer"], str) or not _are_finite(figures):
            raise ValueError(f"a row of layers is {row}")
    figures = [value for value in start.values() if value is not None]
    if not all(isinstance(name, str) for name in start) or not _are_finite(figures):
        raise ValueError(f"fm_corr_start is {start}")


def _are_finite(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def check_resumable(run: Run) -> None:
    """Raise InputError for a run that has lost its state after an epoch: starting over would overwrite its results."""
    path = run.folder / "state.pt"
    if path.exists():
        return
    try:
        done = epochs_done(run.folder)
        found = [f"{RESULTS_FILE} with {done} epoch{'s' if done > 1 else ''}"] if done else []
    except InputError:  # damaged, and no state to write it again from
        found = [RESULTS_FILE]
    for weights in (run.folder / "last.safetensors", run.folder / "best.safetensors"):
        with suppress(InputError, OSError):  # weights that cannot be read may be those of an epoch
            check_regular(weights)
            if not weights.exists() or SafetensorsCheckpoint(weights).metadata.get("convsim.epoch") == "0":
                continue
        found.append(weights.name)
    found += ["summary.json"] if (run.folder / "summary.json").exists() else []
    if found:
        repeated = to_repeat(run.arguments.arch, run.arguments.weights)
        another = command_to_train("config", run.folder / ARGUMENTS_FILE, repeated)
        raise InputError(
            f"{path}: missing, so the run cannot be resumed, and starting over would overwrite {', '.join(found)}; "
            f"move {run.folder} away, or start another run: {another} --name NEW"
        )


def command_to_train(
    option: Literal["resume", "config"], path: Path, repeated: Mapping[str, str], processes: int = 1
) -> str:
    """Return the command that resumes a run, or starts another from its args.json, with what `to_repeat` finds."""
    options = (f"--{name} {quote(value)}" for name, value in repeated.items())
    command = "convsim train" if processes == 1 else f"torchrun --nproc-per-node {processes} -m convsim_cli train"
    return " ".join([f"{command} --{option} {quote(str(path))}", *options])


def read_results(folder: Path) -> list[Row]:
    """Return a run's results as rows of numbers. Raises InputError if there are none, or the file is damaged."""
    try:
        rows = _read_csv(folder / RESULTS_FILE, (COLUMNS, COLUMNS + VALIDATION_COLUMNS))
        results = [{key: int(row[key]) if key == "epoch" else _figure(key, row[key]) for key in row} for row in rows]
        if [row["epoch"] for row in results] != [*range(1, len(rows) + 1)]:
            raise ValueError("its epochs are not 1, 2, 3, …")
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(folder / RESULTS_FILE, error, "resume the run, which writes it again") from error
    return results


def _unreadable(path: Path, error: Exception, advice: str) -> InputError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if not os.path.lexists(path.parent):
            return InputError(f"{path.parent}: not a run's folder: it does not exist")
        return InputError(f"{path.parent}: not a run's folder (no {path.name}: {brief(error)})")
    return InputError(f"{path}: cannot be read ({brief(error)}); {advice}")


def _read_csv(path: Path, known: Sequence[tuple[str, ...]]) -> list[dict[str, str]]:
    """Return the rows of a run's table by column. Raises OSError, csv.Error, and ValueError for columns not `known`.

    So does a row of another length, and a table that does not end in a line break: its last number may be cut.
    """
    text = read_bounded(path).decode("utf-8-sig")  # editors may add a mark
    head, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    if tuple(head) not in known:
        raise ValueError(f"its first line is not {','.join(known[0])}")
    if not text.endswith("\n") or any(len(row) != len(head) for row in rows):
        raise ValueError("a row is cut short or too long")
    return [dict(zip(head, row, strict=True)) for row in rows]


def _figure(column: str, text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    for part, most, unit in (("accuracy", 100, "per cent"), ("turn", 180, "degrees")):
        if part in column and not 0 <= number <= most:
            raise ValueError(f"{column} = {number}, expected 0 to {most} {unit}")
    return number


def write_results(folder: Path, history: Sequence[Row], validated: bool = False) -> None:
    """Replace a run's results. validated: whether it has validation images. Raises WriteError."""
    columns = COLUMNS + VALIDATION_COLUMNS * validated
    replace_file(folder / RESULTS_FILE, lambda file: file.write(_as_csv(columns, history)))


def read_layers(folder: Path) -> list[Row]:
    """Return the rows of a run's layers.csv, none where there is no such file. Raises InputError for a damaged one.

    A missing figure is None.
    """
    path = folder / LAYERS_FILE
    if not path.exists():
        return []
    try:
        rows = _read_csv(path, (LAYER_COLUMNS,))
        figures = [{key: _figure(key, row[key]) if row[key] else None for key in LAYER_COLUMNS[2:]} for row in rows]
        return [row | {"epoch": int(row["epoch"])} | found for row, found in zip(rows, figures, strict=True)]
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, error, "remove it, or restore it from a copy") from error


def _as_csv(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def epochs_done(folder: Path) -> int:
    """Return how many whole epochs a run has in its results, 0 if it has none yet."""
    return len(read_results(folder)) if (folder / RESULTS_FILE).exists() else 0


def best_row(history: Sequence[Row]) -> Row:
    """Return the row of the best epoch, by validation accuracy if there is one; the first if several are equal."""
    return max(history, key=lambda row: row["validation_accuracy" if "validation_accuracy" in row else "test_accuracy"])


ACCURACIES: dict[str, Callable[[Sequence[Row]], float]] = {  # of a run, in per cent
    "best_test_accuracy": lambda rows: best_row(rows)["test_accuracy"],
    "last_test_accuracy": lambda rows: rows[-1]["test_accuracy"],
    "mean_last5_test_accuracy": lambda rows: mean(row["test_accuracy"] for row in rows[-LAST_EPOCHS:]),
    "last_train_accuracy": lambda rows: rows[-1]["train_accuracy"],
}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and the standard deviation of a figure over seeds; null where there are too few values."""
    return {"mean": mean(values) if values else None, "std": stdev(values) if len(values) > 1 else None}


@contextmanager
def tensorboard_log(run: Run, trainer: Trainer) -> Iterator[Callable[[Row], None]]:
    """Yield a function that logs a row of results for TensorBoard, from rank 0, if the run asks for it.

    Each column is a scalar. The log is in the run's folder `tensorboard`; TensorBoard hides what a crash left of the
    next epoch. Raises InputError if the package is missing, and WriteError.
    """
    if not run.arguments.tensorboard:
        yield lambda row: None
        return
    folder = run.folder / "tensorboard"
    writer: Any = None

    def write(row: Row) -> None:
        nonlocal writer
        try:
            if writer is None:
                writer = import_summary_writer()(str(folder), purge_step=trainer.epoch + 1)
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from error

    trainer.processes.on_rank_zero(lambda: write({}))
    try:
        yield lambda row: trainer.processes.on_rank_zero(lambda: write(row))
    finally:
        with suppress(OSError):  # which has been told, or what it cannot write is flushed already
            if writer:
                writer.close()


def open_run(folder: Path, **changes: Any) -> Run:
    """Open a run's folder, with changes to its arguments, such as more `epochs` or another `data_dir`.

    Raises InputError for a folder that is not a run's, and for arguments that this version does not know.
    """
    path = folder / ARGUMENTS_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "restore it from a copy") from error
    return Run(folder, replace(make_arguments(values, path), **changes))


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document. Raises WriteError."""
    data = (json.dumps(document, indent=2) + "\n").encode()
    replace_file(path, lambda file: file.write(data))
