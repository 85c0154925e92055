"""What a file may hold: every other tensor stays as it is, and no number, size or name in it does harm."""

from __future__ import annotations

import hashlib
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import cases
from conftest import Convsim
from references import literal_similarity
from safetensors.torch import load_file, save_file
from torch import Tensor

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.cli import console
from convsim_cli.errors import ConvsimWarning

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]
DTYPES += [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def state_dict(chance: random.Random) -> dict[str, Tensor]:
    """Scalars, empty tensors, views of one memory, kernels and all else, in every type."""
    torch.manual_seed(chance.randrange(2**31))
    state = {"kernel.weight": torch.randn(4, 2, 3, 3).to(chance.choice(DTYPES[:4]))}
    for number in range(chance.randint(1, 9)):
        shape = [chance.choice([0, 1, 1, 2, 3, 5]) for _ in range(chance.randrange(6))]
        state[f"{chance.choice('abc')}.{number}"] = (8 * torch.randn(shape)).to(chance.choice(DTYPES))
    if chance.random() < 0.5:
        state["alias"] = chance.choice(list(state.values()))
    if chance.random() < 0.5:
        memory = torch.randn(40)
        state |= {"view.one": memory[:27].reshape(3, 9), "view.two": memory[20:]}
    return state


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_whatever_is_no_chosen_kernel_stays_bit_identical(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    for seed in cases(60):
        state = state_dict(random.Random(seed))
        if suffix == ".pt":
            torch.save(state, path)
        else:
            save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvsimWarning)  # guesses about what the file holds
            done = init_checkpoint(path, iterations=2, no_backup=True, device="cpu")
        written = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
        chosen = {layer["name"] for layer in done.layers}
        assert "kernel.weight" in chosen, seed
        if suffix == ".pt":  # who shares a kernel's memory follows it
            memory = {state[name].untyped_storage().data_ptr() for name in chosen}
            chosen |= {n for n, t in state.items() if t.numel() and t.untyped_storage().data_ptr() in memory}
        assert written.keys() == state.keys(), seed
        for name, tensor in state.items():
            assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), (seed, name)
            if name not in chosen:
                assert raw(written[name]) == raw(tensor), (seed, name)


POISONS = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf")}
SCALES = {"zero": 0.0, "huge": 1e30, "tiny": 1e-30, "denormal": 1e-44}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("poison", POISONS)
def test_nan_and_inf_in_a_kernel_are_named_and_nothing_is_written(
    poison: str, dtype: torch.dtype, tmp_path: Path, convsim: Convsim
) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    weight[2, 1, 0, 0] = POISONS[poison]
    path = tmp_path / "model.safetensors"
    save_file({"good.weight": torch.randn(4, 3, 3, 3), "bad.weight": weight}, path)
    before = hashlib.sha256(path.read_bytes()).digest()
    for command in (["init", path], ["init", path, "--dry-run"], ["measure", path]):
        outcome = convsim(*command)
        assert outcome.code == 2
        assert f"{path}: bad.weight [4, 3, 3, 3]: 1 of 108 values is NaN or Inf" in outcome.error
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("objective", ["raw", "norm-preserving"])
def test_kernels_of_any_scale_give_a_right_number_or_are_named(
    scale: str, dtype: torch.dtype, objective: str, tmp_path: Path, convsim: Convsim
) -> None:
    limit = torch.finfo(dtype)
    size = min(SCALES[scale], 0.3 * limit.max) if scale == "huge" else SCALES[scale]
    weight = (size * torch.rand(4, 3, 3, 3, dtype=torch.float64)).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": weight}, path)
    before = path.read_bytes()
    how = ["--preserve-norm"] if objective == "norm-preserving" else []
    outcome = convsim("init", path, "--iterations", 3, "--no-backup", "--json", *how)
    if outcome.code:
        assert "a.weight" in outcome.error
        assert path.read_bytes() == before
    else:
        stored = {"before": weight, "after": load_file(path)["a.weight"]}
        assert stored["after"].isfinite().all()
        for moment in ("before", "after"):
            found, kernel = outcome.document["layers"][0][moment], stored[moment].double()
            assert found["norm"] == pytest.approx(kernel.norm().item(), rel=1e-9, abs=0)
            assert found["cs"] == pytest.approx(literal_similarity(kernel).item(), rel=1e-9, abs=0)
    measured = convsim("measure", path, "--samples", 1, "--json").document["layers"][0]
    assert measured["dead"] == (4 if not load_file(path)["a.weight"].any() else 0)


HOSTILE = [
    "../../escape.weight",
    "/etc/passwd",
    "a\x1b[2Jb.weight",
    "[bold red]x[/].weight",
    "a\nb\tc.weight",
    "[/].weight",
    "‮.weight",
    "",
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_neither_escape_nor_break_the_table(
    name: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(4, 3, 3, 3), "plain": torch.randn(4, 4, 3, 3)}, path)
    made = convsim("init", path, "--iterations", 1)
    assert made.code == 0, made.err
    for outcome in (made, convsim("measure", path)):
        assert len(outcome.out.splitlines()) == 3
        assert len({line.count("\t") for line in outcome.out.splitlines()}) == 1
        assert all(character.isprintable() or character in "\t\n" for character in outcome.out + outcome.err)
    assert name in [layer["name"] for layer in convsim("measure", path, "--json").document["layers"]]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors", "model.safetensors.bak"]
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
    drawn = convsim("measure", path, "--wide")
    assert drawn.code == 0, drawn.err
    assert "─" in drawn.out  # by rich
    assert sum("4×3×3×3" in line and console.printable(name) in line for line in drawn.out.splitlines()) == 1
    assert all(character.isprintable() or character == "\n" for character in drawn.out)
