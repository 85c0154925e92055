"""A folder stands for the one checkpoint in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError


def fill(folder: Path, *names: str) -> None:
    """Make files of such names: shards of an index for an index, one kernel each for the others."""
    for name in names:
        state = {"a.weight": torch.randn(4, 3, 3, 3)}
        if name.endswith(".json"):
            shard = name.replace(".index", "-1-of-1").replace(".json", ".safetensors").replace(".safetensors-", "-")
            save_file(state, folder / shard)
            (folder / name).write_text(json.dumps({"weight_map": {"a.weight": shard}}))
        elif name.endswith(".safetensors"):
            save_file(state, folder / name)
        else:
            torch.save(state, folder / name)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["model.pth"], "model.pth"),
        (["model.safetensors.index.json"], "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
        (["model.safetensors.index.json", "other.safetensors"], "model.safetensors.index.json"),
    ],
)
def test_the_only_checkpoint_of_a_folder_is_taken(
    names: list[str], taken: str, tmp_path: Path, convsim: Convsim
) -> None:
    fill(tmp_path, *names)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == tmp_path / taken
    outcome = convsim("init", tmp_path, "--iterations", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["output"] == str(tmp_path / taken)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "a folder without a checkpoint; choose a checkpoint file"),
        (["a.pt", "b.safetensors"], r"a folder with 2 checkpoints \(a\.pt, b\.safetensors\); choose a checkpoint file"),
        (
            ["a.safetensors.index.json", "a.safetensors.index.fp16.json"],
            r"2 checkpoints \(a\.safetensors\.index\.fp16\.json, a\.safetensors\.index\.json\)",
        ),
        ([f"{number}.pt" for number in range(9)], r"9 checkpoints \(0\.pt, 1\.pt, 2\.pt, 3\.pt, 4\.pt, 5\.pt, …\)"),
    ],
)
def test_of_several_none_is_taken_and_what_was_found_is_named(names: list[str], said: str, tmp_path: Path) -> None:
    fill(tmp_path, *names)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*{said}"):
        open_checkpoint(tmp_path)


def test_shards_of_a_variant_are_saved_to_another_folder_under_its_name(tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "old").mkdir()
    fill(tmp_path / "old", "model.safetensors.index.fp16.json")
    assert convsim("init", tmp_path / "old", "-o", tmp_path / "new", "--iterations", 1).code == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in (tmp_path / "old").iterdir())
    assert open_checkpoint(tmp_path / "new").path.name == "model.safetensors.index.fp16.json"
