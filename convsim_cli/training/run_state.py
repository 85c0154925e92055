"""What a run saves after every epoch: its weights, its results, and `state.pt`, which a bit-exact resume needs.

`state.pt` is replaced last and alone says how far the run has come: after a crash, the run repeats the unfinished
epoch, with the same result.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.pickle_format import write_pickle
from convsim_cli.checkpoints.state_dict import save_state_dict
from convsim_cli.errors import CheckpointError, InputError
from convsim_cli.training.arguments import Arguments, make_arguments
from convsim_cli.training.results import Row, best_row, epochs_done, write_results
from convsim_cli.training.run_folder import Run, train_command
from convsim_cli.training.trainer import Trainer

Log = dict[str, Any]  # "history": the rows so far; "fm_cos_start": `fm_cos` per layer, before training


def save_state(run: Run, trainer: Trainer, log: Log) -> None:
    """Save a run between two epochs. Rank 0 writes; all processes must call this. Raises WriteError."""
    state = {"arguments": asdict(run.arguments), "progress": log, "trainer": trainer.state()}
    trainer.processes.on_rank_zero(lambda: _write(run, trainer, log["history"], state))


def check_resumable(run: Run) -> None:
    """Raise InputError for a run that has lost its state after an epoch: starting over would overwrite its results."""
    path = run.folder / "state.pt"
    if path.exists():
        return
    done = epochs_done(run.folder)
    found = [f"results.csv with {done} epoch{'s' if done > 1 else ''}"] if done else []
    found += [name for name in ("last.safetensors", "best.safetensors") if _is_trained(run.folder / name)]
    found += ["summary.json"] if (run.folder / "summary.json").exists() else []
    if found:
        another = train_command("config", run.folder / "args.json", run.arguments.arch)
        raise InputError(
            f"{path}: missing, so the run cannot be resumed, and starting over would overwrite {', '.join(found)}; "
            f"move {run.folder} away, or start another run: {another} --name NEW"
        )


def _is_trained(weights: Path) -> bool:
    """Whether a run's weights may be those of an epoch: all but those that say that they are from before the first."""
    if not weights.exists():
        return False
    try:
        return open_checkpoint(weights).metadata.get("convsim.epoch") != "0"
    except CheckpointError:
        return True


def read_state(run: Run) -> dict[str, Any] | None:
    """Return what `save_state` saved, None for a run that has not got so far.

    Raises InputError for a damaged state, one of another run, one of more epochs than the run is to have, and as
    `check_resumable`.
    """
    check_resumable(run)
    path = run.folder / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        former, done = make_arguments(state["arguments"], path), int(state["trainer"]["epoch"])
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(
            f"{path}: damaged ({type(error).__name__}), so the run cannot be resumed; its last.safetensors may be "
            f"intact; remove {run.folder} to train it again"
        ) from error
    _check_same(run, former)
    if run.arguments.epochs < done:
        raise InputError(f"{run.folder}: has done {done} epochs, more than `epochs` {run.arguments.epochs}")
    return state


def _check_same(run: Run, former: Arguments) -> None:
    saved, wanted = former.identity(), run.arguments.identity()
    for name in (*wanted, *saved):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{run.folder / 'state.pt'}: belongs to a run with {name} = {saved.get(name)!r}, "
                f"args.json says {wanted.get(name)!r}"
            )


def _write(run: Run, trainer: Trainer, history: list[Row], state: dict[str, Any]) -> None:
    record = {
        "convsim.epoch": str(trainer.epoch),
        "convsim.mode": run.arguments.mode,
        "convsim.arch": run.arguments.arch,
    }
    weights = trainer.model.state_dict()
    save_state_dict(weights, run.folder / "last.safetensors", record)
    if history and best_row(history) is history[-1]:
        save_state_dict(weights, run.folder / "best.safetensors", record)
    write_results(run.folder, history, validated=run.arguments.validation is not None)
    replace_file(run.folder / "state.pt", lambda file: write_pickle(file, state))
