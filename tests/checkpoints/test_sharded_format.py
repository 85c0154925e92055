from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from convsim_cli.checkpoints.atomic import Replacements
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.journal import Scratch
from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint
from convsim_cli.errors import CheckpointError, ConvsimWarning, InputError, WriteError

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
    index = (folder / INDEX).stat().st_ino
    outcome = convsim("init", folder, "--iterations", 5, "--exclude", "conv10*", "--json")
    assert outcome.code == 0, outcome.err
    after = everything(folder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"conv1.weight"}
    assert [name for name in SHARDS if (folder / name).stat().st_ino != inodes[name]] == SHARDS[:1]
    backup = folder / f"{SHARDS[0]}.bak"
    assert backup.stat().st_ino == inodes[SHARDS[0]]
    assert outcome.document["backup"] == str(folder / "*.safetensors.bak")
    assert (folder / INDEX).stat().st_ino == index
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SHARDS, INDEX, backup.name])


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


def test_a_folder_that_exists_keeps_backups_of_its_shards_and_index(folder: Path, convsim: Convsim) -> None:
    new = folder.parent / "new"
    for iterations, suffix in ((1, None), (2, ".bak"), (3, ".bak.1")):
        former = {path.name: path.read_bytes() for path in new.iterdir()} if suffix else {}
        document = convsim("init", folder, "-o", new, "--iterations", iterations, "--json").document
        assert document["backup"] == (str(new / f"*.safetensors{suffix}") if suffix else None)
        for name in [*SHARDS, INDEX] if suffix else []:
            assert (new / f"{name}{suffix}").read_bytes() == former[name]
    assert convsim("init", folder, "-o", new, "--iterations", 4, "--no-backup", "--json").document["backup"] is None
    names = [f"{name}{suffix}" for name in (*SHARDS, INDEX) for suffix in ("", ".bak", ".bak.1")]
    assert sorted(path.name for path in new.iterdir()) == sorted(names)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SHARDS, INDEX])


def test_every_shard_is_on_disk_before_the_first_takes_its_place(
    folder: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def record_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        fsync(descriptor)

    def record_replace(self: Path, to: Path) -> Path:
        calls.append("rename")
        return replace(self, to)

    def record_rename(self: Path, to: Path) -> Path:
        calls.append("journal")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(Path, "rename", record_rename)
    assert convsim("init", folder, "--iterations", 1, "--no-backup").code == 0
    assert calls == ["data"] * 3 + ["folder", "journal", "folder"] + ["rename"] * 2 + ["folder"]  # and the manifest


def test_what_stops_the_work_leaves_every_shard_and_no_other_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def changes() -> Iterator[tuple[str, Tensor]]:
        yield "conv1.weight", torch.zeros(8, 3, 3, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(checkpoint.path, changes())
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
        (f'{{"weight_map": {{"a": "{SHARDS[0]}"}}}}', "does not contain it"),
        ("[" * 100_000, "not a readable index of shards"),
        (json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}), "which is not a valid file name"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "fetch the missing shard|which is not a valid file name"),
        ('{"weight_map": {"a": "a\\u0000.safetensors"}}', "fetch the missing shard|which is not a valid file name"),
    ],
)
def test_an_index_that_cannot_be_followed_is_one_line(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_shard_that_is_there_but_no_file_is_not_called_missing(folder: Path) -> None:
    place = folder / SHARDS[0]
    place.unlink()
    place.symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: a broken link to gone, but {INDEX} names it"):
        open_checkpoint(folder)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(
        CheckpointError, match=f"{SHARDS[0]}: not a regular file, but {INDEX} names it; fetch the shard"
    ):
        open_checkpoint(folder)


def test_shards_go_to_a_folder_and_a_single_file_does_not(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for output in (tmp_path / "x.safetensors", tmp_path / "missing" / "new"):
        with pytest.raises(InputError, match=r"choose a folder|create it first"):
            checkpoint.target_for(output)
    with pytest.raises(InputError, match="is a folder; choose a new file or a regular one to replace"):
        open_checkpoint(folder / SHARDS[0]).target_for(tmp_path)
    (tmp_path / "v1.5").mkdir()
    for name in ("v1.5", "resnet-v1.6"):
        assert checkpoint.target_for(tmp_path / name) == tmp_path / name / INDEX


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("links", [False, True], ids=["another index beside the shards", "links to the shards"])
def test_an_output_that_would_overwrite_shards_of_the_source_is_refused(
    folder: Path, convsim: Convsim, links: bool
) -> None:
    output = folder / "new.safetensors.index.json"
    if links:
        output = folder.parent / "links"
        output.mkdir()
        (output / SHARDS[0]).symlink_to(folder / SHARDS[0])
    before = contents(folder)
    outcome = convsim("init", folder, "-o", output, "--iterations", 2)
    assert outcome.code == 2
    assert f"{SHARDS[0]} beside it belongs to the checkpoint itself; choose another folder" in outcome.error
    assert "or remove --output to save in place" in outcome.error
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match="belongs to the checkpoint itself"):
        checkpoint.write(output / INDEX if links else output, [("conv1.weight", torch.zeros(8, 3, 3, 3))], {})
    assert contents(folder) == before


def test_shards_that_are_links_out_of_the_folder_are_saved_only_by_force(folder: Path, convsim: Convsim) -> None:
    before, links = contents(folder), folder.parent / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    refused = convsim("init", links, "--iterations", 2)
    assert (refused.code, contents(folder)) == (2, before)
    assert f"{folder / SHARDS[0]}, which is outside the folder that you gave" in refused.error
    assert convsim("init", links, "--iterations", 2, "--force").code == 0
    assert all((links / name).is_symlink() for name in before)
    assert sorted(before) == sorted(contents(folder))
    assert not torch.equal(load_file(folder / SHARDS[0])["conv1.weight"], torch.zeros(8, 3, 3, 3))
    for name in (SHARDS[0], SHARDS[2]):
        assert contents(folder)[name] != before[name]
        assert (links / f"{name}.bak").read_bytes() == before[name]


def test_a_failed_save_to_a_new_folder_leaves_no_folder(folder: Path, convsim: Convsim) -> None:
    new = folder.parent / "new"
    outcome = convsim("init", folder, "-o", new, "--optimizer", "sgd", "--lr", 1e8)
    assert (outcome.code, new.exists()) == (1, False)


def test_a_folder_that_cannot_be_made_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WriteError, match=r"new: cannot be created \(Read-only file system\)"):
        checkpoint.write(folder.parent / "new" / INDEX, [], {})


def save(folder: Path, value: float) -> None:
    """Save a value to the two kernels, keeping backups."""
    changes = [("conv1.weight", torch.full((8, 3, 3, 3), value)), ("conv10.weight", torch.full((8, 8, 3, 3), value))]
    checkpoint = open_checkpoint(folder)
    cast = [(name, tensor.to(checkpoint.load(name).dtype)) for name, tensor in changes]
    checkpoint.write(checkpoint.path, cast, backup=True)


def values(folder: Path, suffix: str = "") -> list[float]:
    """The value of each of the two kernels, one throughout."""
    found = []
    for shard, name in ((SHARDS[0], "conv1.weight"), (SHARDS[2], "conv10.weight")):
        tensor = load(Path(folder / f"{shard}{suffix}").read_bytes())[name]
        assert bool((tensor == tensor.flatten()[0]).all())
        found.append(tensor.flatten()[0].item())
    return found


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


@pytest.mark.parametrize("end", ["failure", "failure without links", "kill"])
@pytest.mark.parametrize("number", range(6))
def test_a_save_that_ends_at_any_move_leaves_shards_of_one_save(
    folder: Path, number: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six moves: the turn, the journal, two backups and two shards."""
    save(folder, 1.0)
    save(folder, 2.0)
    left = [number]
    replace, rename, link = Path.replace, Path.rename, os.link

    def counted(real: Callable[[Path, Path], Path | None], path: Path, to: Path) -> Path | None:
        left[0] -= 1
        if left[0] == -1 and end == "kill":
            raise Killed
        if left[0] == -1:
            raise OSError(5, "Input/output error")
        return real(path, to)

    def link_counted(path: Path, to: Path) -> None:
        if end == "failure without links":
            raise OSError(1, "Operation not permitted")
        counted(link, path, to) if to.parent == folder and left[0] >= 0 else link(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, to: counted(replace, path, to))
        patch.setattr(Path, "rename", lambda path, to: counted(rename, path, to))
        patch.setattr(os, "link", link_counted)
        if end == "kill":
            patch.setattr(Replacements, "_move_back", lambda *_: None)
            patch.setattr(Scratch, "unmake_journal", lambda _: None)
            patch.setattr(Scratch, "remove", lambda scratch: os.close(scratch._descriptor))
        with pytest.raises(Killed if end == "kill" else WriteError) as caught:
            save(folder, 3.0)
    ended = (end == "kill" and number > 1) or (end == "failure without links" and number == 5)
    if end != "kill":
        text = "to complete the save, run convsim init" if ended else "the original is intact"
        assert text in str(caught.value)
        assert ended or values(folder) == [2.0, 2.0]
    if ended:
        before = contents(folder)
        with pytest.raises(CheckpointError, match=r"was interrupted; to complete it, run convsim init .* --recover"):
            open_checkpoint(folder)
        assert contents(folder) == before  # reading writes nothing
    with pytest.warns(ConvsimWarning, match="was completed") if ended else nullcontext():
        open_checkpoint(folder, for_writing=True)
    assert values(folder) == ([3.0, 3.0] if ended else [2.0, 2.0])
    save(folder, 4.0)
    assert values(folder) == [4.0, 4.0]
    saved = 4 if ended else 3
    assert [values(folder, f".bak.{n}") for n in range(1, saved)] == [[n, n] for n in range(1, saved)]
    backups = [f"{SHARDS[shard]}.bak{number}" for shard in (0, 2) for number in ("", ".1", ".2", ".3")[:saved]]
    assert sorted(contents(folder)) == sorted([*SHARDS, INDEX, *backups])


def test_the_shards_of_one_save_share_a_backup_number(folder: Path, convsim: Convsim) -> None:
    first = convsim("init", folder, "--iterations", 1, "--exclude", "conv10*", "--json").document
    planned = convsim("init", folder, "--include", "conv10*", "--dry-run", "--json").document
    second = convsim("init", folder, "--iterations", 1, "--include", "conv10*", "--json").document
    assert first["backup"] == str(folder / "*.safetensors.bak")
    assert planned["backup"] == second["backup"] == str(folder / "*.safetensors.bak.1")
    assert sorted(path.name for path in folder.glob("*.bak*")) == [f"{SHARDS[0]}.bak", f"{SHARDS[2]}.bak.1"]


def test_a_folder_that_cannot_be_flushed_by_its_file_system_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answer[0], os.strerror(answer[0]))
        fsync(descriptor)

    answer = [0]
    monkeypatch.setattr(os, "fsync", refuse_folders)
    for value, answer[0] in enumerate((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
        save(folder, float(value))
    assert values(folder) == [2.0, 2.0]
    answer[0] = errno.EIO
    with pytest.raises(WriteError, match="Input/output error"):
        save(folder, 3.0)
    assert values(folder) == [2.0, 2.0]  # the journal could not be said to be on disk: nothing was moved


def shards_of(folder: Path, value: float) -> None:
    folder.mkdir(exist_ok=True)
    for shard, name in (("1.safetensors", "a.weight"), ("2.safetensors", "b")):
        save_file({name: torch.full((4, 3, 3, 3), value)}, folder / shard)
    index = {"weight_map": {"a.weight": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_copy_holds_no_shard_that_another_process_saved_meanwhile(tmp_path: Path) -> None:
    shards_of(tmp_path / "old", 1.0)
    shards_of(tmp_path / "new", 2.0)
    checkpoint = open_checkpoint(tmp_path / "old")
    for shard in ("1.safetensors", "2.safetensors"):
        (tmp_path / "new" / shard).replace(tmp_path / "old" / shard)
    output = checkpoint.target_for(tmp_path / "copy")
    checkpoint.write(output, [("a.weight", torch.full((4, 3, 3, 3), 3.0))])
    assert load_file(tmp_path / "copy" / "1.safetensors")["a.weight"].eq(3).all()
    assert load_file(tmp_path / "copy" / "2.safetensors")["b"].eq(1).all()


def test_shards_that_a_save_replaces_while_they_are_opened_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards_of(tmp_path / "old", 1.0)
    shards_of(tmp_path / "new", 2.0)
    open_shard = SafetensorsCheckpoint.__init__

    def opened(self: SafetensorsCheckpoint, file: Path) -> None:
        open_shard(self, file)
        for shard in (tmp_path / "new").glob("*.safetensors"):
            shard.replace(tmp_path / "old" / shard.name)

    monkeypatch.setattr(SafetensorsCheckpoint, "__init__", opened)
    with pytest.raises(CheckpointError, match="another process changed it while it was read"):
        open_checkpoint(tmp_path / "old")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-LFS pointer"),
        (b"", "an empty file"),
        (b"<html>", "a web page"),
    ],
)
def test_a_shard_that_is_something_else_is_named(content: bytes, said: str, folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: .*{said}"):
        open_checkpoint(folder)


def test_tensors_that_the_index_leaves_out_are_named(folder: Path, convsim: Convsim) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["conv1.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    outcome = convsim("measure", folder, "--samples", 1)
    assert outcome.code == 0
    assert f"does not name these tensors of {SHARDS[0]}: conv1.weight; they are left out" in outcome.err
