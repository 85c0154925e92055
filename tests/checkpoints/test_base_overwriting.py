"""Files that others rely on are not replaced unasked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError


def store(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": torch.randn(4, 3, 3, 3)}, path)
    return path.read_bytes()


SHA, MD5 = hashlib.sha256(b"x").hexdigest(), hashlib.md5(b"x").hexdigest()
STORED = {
    "Hugging Face": f"blobs/{SHA}",
    "its small files": f"blobs/{hashlib.sha1(b'x').hexdigest()}",
    "git-annex": f"annex/objects/SHA256E-s123--{SHA}.safetensors",
    "DVC": f"cache/files/md5/{MD5[:2]}/{MD5[2:]}",
    "an md5 store": f"store/{MD5}",
    "ollama": f"blobs/sha256-{SHA}",
}


@pytest.mark.parametrize("kind", STORED)
def test_a_link_into_a_store_of_content_is_refused_in_place_and_named(
    kind: str, tmp_path: Path, convsim: Convsim
) -> None:
    real, link = tmp_path / STORED[kind], tmp_path / "snapshots" / "1" / "model.safetensors"
    before = store(real)
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(real, link.parent))
    outcome = convsim("init", link, "--iterations", 1)
    assert outcome.code == 2
    assert f"{link} is a link to {real}, which is named by a digest of its content" in outcome.error
    assert "save elsewhere with --output, or overwrite it with --force" in outcome.error
    assert convsim("init", link, "--dry-run").code == 0
    assert convsim("init", link, "-o", tmp_path / "new.safetensors", "--iterations", 1).code == 0
    assert real.read_bytes() == before
    assert convsim("init", link, "--iterations", 1, "--force").code == 0
    assert link.is_symlink()
    assert real.read_bytes() != before


@pytest.mark.parametrize("name", [f"blobs/{SHA}", f"objects/SHA256E-s123--{SHA}.safetensors", f"{MD5[:2]}/{MD5[2:]}"])
def test_a_file_of_a_store_itself_is_refused(name: str, tmp_path: Path, convsim: Convsim) -> None:
    before = store(tmp_path / name)
    outcome = convsim("init", tmp_path / name, "--iterations", 1)
    assert (outcome.code, (tmp_path / name).read_bytes()) == (2, before)


@pytest.mark.parametrize("name", ["store/last.safetensors", "resnet-f37072fd.safetensors", f"{MD5}.safetensors"])
def test_a_plain_link_and_usual_names_are_saved_in_place(name: str, tmp_path: Path, convsim: Convsim) -> None:
    before = store(tmp_path / name)
    given = tmp_path / name
    if "store" in name:
        given = tmp_path / "model.safetensors"
        given.symlink_to(tmp_path / name)
    assert convsim("init", given, "--iterations", 1).code == 0
    assert (tmp_path / name).read_bytes() != before


@pytest.mark.parametrize("how", ["in place", "output", "shard"])
def test_a_file_that_is_marked_read_only_is_refused(how: str, tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    given: list[object] = [path]
    store(path)
    if how == "output":
        store(tmp_path / "other.safetensors")
        given = [tmp_path / "other.safetensors", "-o", path]
    if how == "shard":
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a.weight": path.name}}))
        given = [index]
    before = path.read_bytes()
    path.chmod(0o444)
    outcome = convsim("init", *given, "--iterations", 1)
    assert outcome.code == 2
    assert f"{path} is read-only (mode 0444); save elsewhere with --output" in outcome.error
    assert path.read_bytes() == before
    assert convsim("init", *given, "--iterations", 1, "--force").code == 0
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_read_only_index_is_no_obstacle_in_place(tmp_path: Path, convsim: Convsim) -> None:
    store(tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    index.chmod(0o444)
    assert convsim("init", index, "--iterations", 1).code == 0


def test_the_only_checkpoint_of_a_folder_is_no_link_out_of_it(tmp_path: Path, convsim: Convsim) -> None:
    before = store(tmp_path / "precious.safetensors")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "model.safetensors").symlink_to(tmp_path / "precious.safetensors")
    outcome = convsim("init", tmp_path / "unpacked", "--iterations", 1)
    assert outcome.code == 2
    assert "is outside the folder that you gave; save elsewhere with --output" in outcome.error
    assert (tmp_path / "precious.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"import torch\n"])
def test_a_checkpoint_replaces_no_other_kind_of_file_unasked(content: bytes, tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    outcome = convsim("init", "--arch", "cnn:4", "-o", path, "--iterations", 1)
    assert outcome.code == 2
    assert f"{path} is not a checkpoint; save elsewhere with --output, or overwrite it with --force" in outcome.error
    assert path.read_bytes() == content
    path.write_bytes(b"")  # as tempfile leaves it
    for _ in range(2):
        assert convsim("init", "--arch", "cnn:4", "-o", path, "--iterations", 1).code == 0


def test_a_suffix_is_refused_before_a_network_is_built(tmp_path: Path, convsim: Convsim) -> None:
    for arch in ("cnn:4", "nowhere:network"):
        outcome = convsim("init", "--arch", arch, "-o", tmp_path / "x.png")
        assert (outcome.code, "x.png: unknown suffix .png" in outcome.error) == (2, True)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_name_without_room_for_a_backup_is_refused_before_any_work(
    sharded: bool, tmp_path: Path, convsim: Convsim
) -> None:
    path = shard = tmp_path / f"{'a' * (254 - len('.safetensors'))}.safetensors"
    before = store(shard)
    if sharded:
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"a.weight": shard.name}}))
    outcome = convsim("init", path, "--iterations", 10**9)
    assert outcome.code == 2
    assert ".bak: the name of the backup is too long" in outcome.error
    assert shard.read_bytes() == before
    assert convsim("init", path, "--iterations", 1, "--no-backup").code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.safetensors.index.json"])
def test_what_was_replaced_while_it_was_changed_is_kept(name: str, tmp_path: Path) -> None:
    def save(value: float) -> None:
        for file, kernel in ((name, "0.weight"), ("a.safetensors", "0.weight"), ("b.safetensors", "1.weight")):
            tensors = {kernel: torch.full((4, 3, 3, 3), value)}
            if file.endswith(".pt"):
                torch.save(tensors, tmp_path / "new")
            elif file.endswith(".json"):
                index = {"weight_map": {"0.weight": "a.safetensors", "1.weight": "b.safetensors"}}
                (tmp_path / "new").write_text(json.dumps(index))
            else:
                save_file(tensors, tmp_path / "new")
            (tmp_path / "new").replace(tmp_path / file)

    save(1.0)
    opened = open_checkpoint(tmp_path / name)
    save(2.0)
    newer = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="another process changed it"):
        opened.write(tmp_path / name, [("0.weight", torch.full((4, 3, 3, 3), 3.0))])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == newer


@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.safetensors.index.json"])
def test_an_open_checkpoint_can_be_written_twice(name: str, backup: bool, tmp_path: Path) -> None:
    state = {"0.weight": torch.zeros(4, 3, 3, 3), "1.weight": torch.zeros(4, 3, 3, 3)}
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    elif name.endswith(".json"):
        for kernel in state:
            save_file({kernel: state[kernel]}, tmp_path / f"{kernel[0]}.safetensors")
        index = {"weight_map": {kernel: f"{kernel[0]}.safetensors" for kernel in state}}
        (tmp_path / name).write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / name)
    opened = open_checkpoint(tmp_path / name)
    for number, kernel in enumerate(state):
        opened.write(
            opened.path, [(kernel, torch.full((4, 3, 3, 3), number + 1.0))], {"a": "b" * number}, backup=backup
        )
    found = open_checkpoint(tmp_path / name)
    assert [found.load(kernel).mean().item() for kernel in state] == [1.0, 2.0]
