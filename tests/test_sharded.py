from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file, save_file
from torch import Tensor

from convsim_cli.checkpoint import open_checkpoint
from convsim_cli.errors import CheckpointError, InputError

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in three shards: a kernel in the first and in the last, none in the second."""
    state = [
        {"conv1.weight": torch.randn(8, 3, 3, 3), "conv1.bias": torch.randn(8)},
        {"head.weight": torch.randn(4, 8), "head.scale": torch.tensor(2.0)},
        {"conv10.weight": torch.randn(8, 8, 3, 3).bfloat16(), "steps": torch.tensor([3])},
    ]
    where = tmp_path / "model"
    where.mkdir()
    for name, tensors in zip(SHARDS, state, strict=True):
        save_file(tensors, where / name, {"format": "pt", "from": "a test"})
    weight_map = {name: shard for shard, tensors in zip(SHARDS, state, strict=True) for name in tensors}
    (where / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return where


def everything(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in SHARDS for name, tensor in load_file(folder / shard).items()}


def test_in_place_only_the_shards_that_change_are_written_anew(folder: Path, convsim: Convsim) -> None:
    before, inodes = everything(folder), {name: (folder / name).stat().st_ino for name in SHARDS}
    outcome = convsim("init", folder, "--iterations", 5, "--exclude", "conv10*", "--json")
    assert outcome.code == 0, outcome.err
    after = everything(folder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"conv1.weight"}
    assert [name for name in SHARDS if (folder / name).stat().st_ino != inodes[name]] == SHARDS[:1]
    backup = folder / f"{SHARDS[0]}.bak"
    assert backup.stat().st_ino == inodes[SHARDS[0]]
    assert outcome.document["backup"] == str(folder / f"{INDEX}.bak")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SHARDS, INDEX, f"{INDEX}.bak", backup.name])


def test_another_folder_gets_a_whole_checkpoint_and_this_one_stays(folder: Path, convsim: Convsim) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = convsim("init", folder / INDEX, "-o", folder.parent / "new", "--iterations", 5)
    assert outcome.code == 0, outcome.err
    assert [row["name"] for row in outcome.rows] == ["conv1.weight", "conv10.weight"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    new = folder.parent / "new"
    assert sorted(path.name for path in new.iterdir()) == sorted([*SHARDS, INDEX])
    old, made = everything(folder), everything(new)
    assert {name for name in old if not torch.equal(old[name], made[name])} == {"conv1.weight", "conv10.weight"}
    assert {name: tensor.dtype for name, tensor in made.items()} == {name: tensor.dtype for name, tensor in old.items()}
    assert (new / SHARDS[1]).read_bytes() == before[SHARDS[1]]
    assert convsim("measure", new).rows[0]["name"] == "conv1.weight"


def test_every_shard_is_on_disk_before_the_first_takes_its_place(
    folder: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        fsync(descriptor)

    def record_replace(self: Path, to: Path) -> Path:
        calls.append("rename")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    assert convsim("init", folder, "--iterations", 1, "--no-backup").code == 0
    assert calls == ["data"] * 3 + ["rename", "folder"] * 3


def test_what_stops_the_work_leaves_every_shard_and_no_other_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def changes() -> Iterator[tuple[str, Tensor]]:
        yield "conv1.weight", torch.zeros(8, 3, 3, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(checkpoint.path, changes(), {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable index of shards"),
        ("[]", "expected an index with a weight_map"),
        ('{"weight_map": {}}', "expected an index with a weight_map"),
        ('{"weight_map": {"a": 3}}', "expected an index with a weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected a .safetensors file in the same folder"),
        ('{"weight_map": {"a": "x.bin"}}', "expected a .safetensors file in the same folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "fetch the missing shard"),
        (f'{{"weight_map": {{"a": "{SHARDS[0]}"}}}}', "does not hold it"),
    ],
)
def test_an_index_that_cannot_be_followed_is_one_line(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_shards_go_to_a_folder_and_a_single_file_does_not(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for output in (tmp_path / "x.safetensors", tmp_path / "missing" / "new"):
        with pytest.raises(InputError, match=r"name a folder|make it first"):
            checkpoint.target(output)
    with pytest.raises(InputError, match="a folder; name the file to write"):
        open_checkpoint(folder / SHARDS[0]).target(tmp_path)
