"""States and weights of runs in any condition: of another structure, of other bytes, of another epoch."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import SMALL
from torch import nn

from convsim_cli.checkpoints.safetensors_format import write_safetensors
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.training.launch import create_run
from convsim_cli.training.run import Run, open_run, train_run

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")


def leaves(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of everything in nested containers, the first entry of each list alone, without the arguments."""
    inside = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    deeper = [place for key, value in inside if key != "arguments" for place in leaves(value, (*path, key))]
    return [path, *deeper] if path else deeper


OPTIONAL = {
    "beta",
    "without_state",
    "kernels_at_start",
    "layers",
    "fm_corr_start",
}  # what states of earlier versions do not have


@pytest.mark.slow
def test_a_state_without_any_one_of_its_entries_is_one_line(run: Run) -> None:
    path = run.folder / "state.pt"
    whole = torch.load(path, weights_only=True)
    places = [place for place in leaves(whole) if isinstance(place[-1], str)]
    places = [
        p for p in places if not {"param_groups", "fm_corr_start", *OPTIONAL} & {*p[:-1]} and p[-1] not in OPTIONAL
    ]
    assert ("trainer", "optimizer", "state", 0, "momentum_buffer") in places
    for place in places:
        state = torch.load(path, weights_only=True) if place == places[0] else pickle.loads(pickle.dumps(whole))
        inner = state
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        torch.save(state, path)
        with pytest.raises(InputError, match=r"state\.pt: damaged \(.*\), so the run cannot be resumed") as caught:
            train_run(open_run(run.folder, epochs=3))
        assert "\n" not in str(caught.value)


def test_a_state_of_other_bytes_than_were_saved_is_never_trained_on(run: Run) -> None:
    path = run.folder / "state.pt"
    whole = path.read_bytes()
    kernel = torch.load(path, weights_only=True)["trainer"]["model"]["0.weight"]
    weights = whole.index(bytes(kernel.untyped_storage().tolist()))  # where torch finds nothing wrong
    flipped = whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1 :]
    for content in (flipped, whole[:-1], whole[: len(whole) // 2], bytes(len(whole)), b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"state\.pt: damaged \(.*; to train it again, move .* away$") as caught:
            train_run(open_run(run.folder, epochs=3))
        assert not re.search("weights_only|fetch|remove", str(caught.value))


def change(*place: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def changed(state: dict[str, Any]) -> None:
        for key in place[:-1]:
            state = state[key]
        state[place[-1]] = to

    return changed


NUMPYS = ("MT19937", [1] * 624, 1, 0, 0.0)  # a state of numpy's generator

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "epoch -5": (change("trainer", "epoch", to=-5), "trainer is at epoch -5, its results have 2 epochs"),
    "epoch 2^70": (change("trainer", "epoch", to=1 << 70), "its results have 2 epochs"),
    "epoch of text": (change("trainer", "epoch", to="two"), "trainer is at epoch two"),
    "another shape": (
        change("trainer", "model", "0.weight", to=torch.ones(3, 3, 3, 3)),
        r"model: 0\.weight is float32 \[3, 3, 3, 3\], expected float32 \[2, 3, 3, 3\]",
    ),
    "another dtype": (
        change("trainer", "model", "0.weight", to=torch.ones(2, 3, 3, 3, dtype=torch.float64)),
        r"is float64 \[2, 3, 3, 3\]",
    ),
    "an unknown tensor": (change("trainer", "model", "x", to=torch.ones(1)), "x is .*, expected missing"),
    "no tensor": (change("trainer", "model", "0.weight", to=[1]), "is a list, expected float32"),
    "no values": (change("trainer", "model", "0.weight", to=torch.ones(2, 3, 3, 3, device="meta")), "without values"),
    "a model of text": (change("trainer", "model", to="cnn"), "damaged"),
    "groups": (change("trainer", "optimizer", "param_groups", to=[]), r"groups of \[\] parameters"),
    "no buffers": (
        change("trainer", "optimizer", "state", to={}),
        r"optimizer, parameter 0: momentum_buffer is missing",
    ),
    "no buffer of a parameter": (
        change("trainer", "optimizer", "state", 1, to={}),
        "optimizer, parameter 1: momentum_buffer is missing",
    ),
    "a buffer of another shape": (
        change("trainer", "optimizer", "state", 0, "momentum_buffer", to=torch.ones(5)),
        r"optimizer, parameter 0: momentum_buffer is float32 \[5\]",
    ),
    "a buffer of no parameter": (
        change("trainer", "optimizer", "state", 99, to={}),
        r"optimizer: has parameters \[99\] that the network does not have",
    ),
    "a small rng": (change("trainer", "rng", to=[(torch.zeros(7, dtype=torch.uint8), None)]), "RNG"),
    "an rng of zeros": (change("trainer", "rng", to=[(torch.zeros(5056, dtype=torch.uint8), None)]), "damaged"),
    "the rng of two processes": (change("trainer", "rng", to=[(), ()]), "rng of 2 processes, expected 1"),
    "the rng of none": (change("trainer", "rng", to=None), "damaged"),
    "numpy's rng beyond its end": (
        change("trainer", "rng", to=[(torch.get_rng_state(), None, ((), ("MT19937", [1] * 624, 9999, 0, 0.0)))]),
        "numpy's generator is at 9999 of 624",
    ),
    "python's rng": (
        change("trainer", "rng", to=[(torch.get_rng_state(), None, ((3, (1,), None), NUMPYS))]),
        "damaged",
    ),
    "beta nan": (change("trainer", "beta", to=float("nan")), "beta is nan"),
    "beta of a tensor": (change("trainer", "beta", to=torch.tensor(0.1)), r"beta is tensor\(0.1"),
    "beta beyond float32": (change("trainer", "beta", to=1e300), r"beta is 1e\+300"),
    "beta of truth": (change("trainer", "beta", to=True), "beta is True"),
    "first loss": (change("trainer", "first_loss", to=torch.ones(3)), r"first_loss is .*float32 \[3\]"),
    "kernels": (change("trainer", "kernels_at_start", to={"a": torch.ones(3)}), "kernels_at_start: "),
    "a row": (change("progress", "history", 0, to={"epoch": 1}), "the results of epoch 1 are"),
    "a row of nan": (change("progress", "history", 0, "cs", to=float("nan")), "the results of epoch 1 are"),
    "a row of a tensor": (change("progress", "history", 0, "seconds", to=torch.tensor(1.0)), "the results of epoch 1"),
    "an epoch of a tensor": (change("progress", "history", 0, "epoch", to=torch.tensor(1)), "the results of epoch 1"),
    "a turn of a tensor": (change("progress", "layers", 0, "turned", to=torch.tensor(1.0)), "a row of layers is"),
    "layers that are no list": (change("progress", "layers", to=()), "the results are a list and a tuple"),
    "rows that are no list": (change("progress", "history", to=7), "damaged"),
    "a row of layers": (change("progress", "layers", 0, to={}), "a row of layers is"),
    "fm_corr": (change("progress", "fm_corr_start", to={"a": torch.ones(2)}), "damaged"),
    "fm_corr of a tensor": (change("progress", "fm_corr_start", to={"a": torch.tensor(0.5)}), "fm_corr_start is"),
    "fm_corr of a tuple": (change("progress", "fm_corr_start", to={("a", "b"): 0.5}), "fm_corr_start is"),
    "arguments": (change("arguments", to=[1]), "expected a run's arguments"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_state_of_another_structure_says_what_was_expected(kind: str, run: Run) -> None:
    path, (harm, said) = run.folder / "state.pt", CHANGES[kind]
    state = torch.load(path, weights_only=True)
    harm(state)
    torch.save(state, path)
    before = {file.name: file.read_bytes() for file in run.folder.iterdir()}
    with pytest.raises(InputError, match=r"state\.pt: .*so the run cannot be resumed") as caught:
        train_run(open_run(run.folder, epochs=3))
    assert caught.match(said)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in run.folder.iterdir()} == before


def test_weights_of_another_run_do_not_stay_after_a_resume(run: Run) -> None:
    state = torch.load(run.folder / "state.pt", weights_only=True)
    first, second = state["progress"]["history"]
    first["test_accuracy"], second["test_accuracy"] = 10.0, 20.0
    torch.save(state, run.folder / "state.pt")
    whole = (run.folder / "last.safetensors").read_bytes()
    for record in ({"convsim.epoch": "1", "convsim.arch": "cnn:2"}, {"convsim.epoch": "2", "convsim.arch": "cnn:8"}):
        for name in ("last", "best"):
            with open(run.folder / f"{name}.safetensors", "wb") as file:
                write_safetensors(file, {"foreign": torch.ones(2)}, record)
        train_run(run)
        assert {(run.folder / f"{name}.safetensors").read_bytes() for name in ("last", "best")} == {whole}


@pytest.mark.parametrize("harm", ["cut", "missing", "a pipe"])
def test_weights_that_are_damaged_do_not_stay_after_a_resume(harm: str, run: Run) -> None:
    state = torch.load(run.folder / "state.pt", weights_only=True)
    first, second = state["progress"]["history"]
    for best in (2, 1):
        first["test_accuracy"], second["test_accuracy"] = (10.0, 20.0) if best == 2 else (20.0, 10.0)
        torch.save(state, run.folder / "state.pt")
        whole = {}
        for name in ("last.safetensors", "best.safetensors"):
            path = run.folder / name
            whole[name] = path.read_bytes()
            path.unlink()
            if harm == "cut":
                path.write_bytes(whole[name][:-9])
            if harm == "a pipe" and name == "best.safetensors" and best == 1:
                os.mkfifo(path)
        if best == 2:
            train_run(run)
            assert (run.folder / "best.safetensors").read_bytes() == (run.folder / "last.safetensors").read_bytes()
        else:
            with pytest.warns(ConvsimWarning, match=r"best\.safetensors: missing, damaged or .*epoch 1 are lost"):
                train_run(run)
            assert not (run.folder / "best.safetensors").exists()
        assert (run.folder / "last.safetensors").read_bytes() == whole["last.safetensors"]


def test_best_weights_ahead_of_the_state_do_not_stay_unless_repeated(run: Run) -> None:
    state = torch.load(run.folder / "state.pt", weights_only=True)
    state["progress"]["history"][0]["test_accuracy"] = 100.0  # the best there can be
    torch.save(state, run.folder / "state.pt")
    with open(run.folder / "best.safetensors", "wb") as file:
        write_safetensors(file, {"foreign": torch.ones(2)}, {"convsim.epoch": "7", "convsim.arch": "cnn:2"})
    with pytest.warns(ConvsimWarning, match=r"the weights of epoch 1 are lost") as caught:
        assert train_run(open_run(run.folder, epochs=4))["best_epoch"] == 1
    assert len(caught) == 1
    assert not (run.folder / "best.safetensors").exists()


def test_damaged_weights_are_moved_to_a_free_name(run: Run) -> None:
    state = torch.load(run.folder / "state.pt", weights_only=True)
    state["progress"]["history"][0]["test_accuracy"] = 100.0
    torch.save(state, run.folder / "state.pt")
    (run.folder / "best.safetensors.damaged").write_text("first rescue")
    (run.folder / "best.safetensors").write_text("torn")
    with pytest.warns(ConvsimWarning, match=r"it is now best\.safetensors\.damaged\.1;") as caught:
        train_run(open_run(run.folder, epochs=3))
    assert len(caught) == 1
    assert (run.folder / "best.safetensors.damaged").read_text() == "first rescue"
    assert (run.folder / "best.safetensors.damaged.1").read_text() == "torn"


GROUPS = {"lr": 5.0, "maximize": True, "amsgrad": True, "differentiable": True, "betas": None, "fused": "x", 7: None}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_s_settings_are_those_of_the_verified_arguments(optimizer: str, tmp_path: Path) -> None:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    runs = [create_run(replace(SMALL, optimizer=optimizer, momentum=momentum), tmp_path, name) for name in "ab"]
    for run in runs:
        train_run(replace(run, arguments=replace(run.arguments, epochs=1)))
    state = torch.load(runs[1].folder / "state.pt", weights_only=True)
    state["trainer"]["optimizer"]["param_groups"][0] |= GROUPS
    torch.save(state, runs[1].folder / "state.pt")
    for run in runs:
        train_run(run)
    whole, resumed = ((run.folder / "last.safetensors").read_bytes() for run in runs)
    assert resumed == whole


class Unused(nn.Sequential):
    """A network with a frozen parameter, and one that its logits do not depend on."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, classes))
        self.unused, self.frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)


@pytest.mark.parametrize("lost", [None, 2])
def test_a_network_resumes_without_state_of_parameters_that_do_not_train(
    lost: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("unused_networks")
    module.build = lambda num_classes: Unused(num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unused_networks", module)
    run = create_run(replace(SMALL, arch="unused_networks:build"), tmp_path, "one")
    train_run(run)
    state = torch.load(run.folder / "state.pt", weights_only=True)
    assert sorted(state["trainer"]["optimizer"]["state"]) == [2, 3, 4, 5]
    state["trainer"]["optimizer"]["state"].pop(lost, None)
    torch.save(state, run.folder / "state.pt")
    with nullcontext() if lost is None else pytest.raises(InputError, match="parameter 2: momentum_buffer is missing"):
        assert train_run(open_run(run.folder, epochs=3))["epochs"] == 3


def test_too_little_memory_is_not_called_damage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("convsim_cli.training.run.load_pickle", fail)
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        train_run(open_run(run.folder, epochs=3))
