from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import time
import warnings
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from threading import Timer

import pytest
import torch
from conftest import Convsim
from forks import fork
from safetensors.torch import load_file, save_file

from convsim_cli.checkpoints import journal
from convsim_cli.checkpoints.atomic import finish_saves, replace_file
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError, ConvsimWarning, WriteError

SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
INDEX = "model.safetensors.index.json"
NAMES = ["0.weight", "1.weight"]


def save_new(folder: Path, value: float = 1.0) -> None:
    """Make a checkpoint of two shards, with one value throughout."""
    folder.mkdir()
    for shard, name in zip(SHARDS, NAMES, strict=True):
        save_file({name: torch.full((4, 3, 3, 3), value)}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip(NAMES, SHARDS, strict=True))}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_new(tmp_path / "model")
    return tmp_path / "model"


def values(folder: Path, suffix: str = "") -> list[float]:
    return [
        load_file(folder / f"{shard}{suffix}")[name].mean().item() for shard, name in zip(SHARDS, NAMES, strict=True)
    ]


def everything(folder: Path) -> dict[str, object]:
    """Every name below a folder, with what it is and holds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_ino, status.st_nlink, content)
    return found


def die_in_save(folder: Path, moves: int) -> None:
    """Save twos, and die as by SIGKILL once so many shards have taken their places."""
    die_after(Path, "replace", moves)
    changes = [(name, torch.full((4, 3, 3, 3), 2.0)) for name in NAMES]
    open_checkpoint(folder).write(folder / INDEX, changes, backup=True)


def die_in_completion(folder: Path, moves: int) -> None:
    die_after(os, "replace", moves)
    finish_saves(folder)


def die_after(owner: object, name: str, calls: int) -> None:
    real, left = getattr(owner, name), [calls]

    def call(*arguments: object, **options: object) -> object:
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        return real(*arguments, **options)

    setattr(owner, name, call)


def interrupt(folder: Path, moves: int = 1, function: Callable[[Path, int], None] = die_in_save) -> None:
    process = fork(function, folder, moves)
    process.join()
    assert process.exitcode == 9
    assert (folder / ".convsim-journal").is_dir()


@pytest.mark.parametrize("moves", [0, 1])
def test_every_command_that_reads_refuses_an_interrupted_save(moves: int, folder: Path, convsim: Convsim) -> None:
    interrupt(folder, moves)
    before = everything(folder)
    train = ("train", "--arch", "cnn:4", "--dataset", "digits", "--epochs", 1, "--run-dir", folder.parent / "runs")
    for given, command in (
        (folder, ("measure", folder)),
        (folder / INDEX, ("measure", folder / INDEX)),
        (folder / SHARDS[1], ("measure", folder / SHARDS[1])),
        (folder, ("init", folder, "--dry-run")),
        (folder, (*train, "--weights", folder)),
    ):
        outcome = convsim(*command)
        assert outcome.code == 2
        assert f"{given}: a save to {folder} was interrupted; to complete it, run" in outcome.error
        assert outcome.error.endswith(f"convsim init {given} --recover")
        assert everything(folder) == before


def test_an_interrupted_save_does_not_replace_newer_files(folder: Path, convsim: Convsim) -> None:
    interrupt(folder, 0)
    for shard, name in zip(SHARDS, NAMES, strict=True):
        save_file({name: torch.full((4, 3, 3, 3), 3.0)}, folder / "new")
        (folder / "new").replace(folder / shard)
    before = everything(folder)
    other = folder / "other.safetensors"
    save_file({"0.weight": torch.rand(4, 3, 3, 3)}, other)
    for command in (("init", other, "--iterations", 1), ("init", folder, "--recover"), ("measure", folder)):
        outcome = convsim(*command)
        assert outcome.code == 2
        assert f"{SHARDS[0]} was replaced since, so the save cannot be completed; restore or fetch" in outcome.error
    assert values(folder) == [3.0, 3.0]
    assert {name: found for name, found in everything(folder).items() if name in before} == before


def test_what_completes_an_interrupted_save_says_so(folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    outcome = convsim("init", folder, "--iterations", 1)
    assert outcome.code == 0
    assert f"an interrupted save was completed; it wrote {SHARDS[1]}" in outcome.err


@pytest.mark.parametrize("moves", [0, 1])
def test_recover_completes_an_interrupted_save_and_stops(moves: int, folder: Path, convsim: Convsim) -> None:
    interrupt(folder, moves)
    outcome = convsim("init", folder, "--recover", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["recovered"] == [str(folder / shard) for shard in SHARDS[moves:]]
    assert f"completed an interrupted save to {folder}: moved {', '.join(SHARDS[moves:])}" in outcome.err
    assert (values(folder), values(folder, ".bak")) == ([2.0, 2.0], [1.0, 1.0])
    assert len(list(folder.iterdir())) == 5  # no journal is left
    before = everything(folder)
    again = convsim("init", folder, "--recover")
    assert (again.code, again.out) == (0, "")
    assert "no interrupted save; nothing to do" in again.err
    assert everything(folder) == before


def test_recover_completes_the_first_save_to_a_new_folder(folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    shutil.rmtree(folder, ignore_errors=True)
    save_new(folder)
    new = folder.parent / "new"
    process = fork(die_in_first_save, folder, new)
    process.join()
    assert [path.name for path in new.iterdir()] == [".convsim-journal"]
    assert convsim("init", new / INDEX, "--recover").code == 0
    assert values(new) == [2.0, 2.0]


def die_in_first_save(folder: Path, new: Path) -> None:
    die_after(Path, "replace", 0)
    open_checkpoint(folder).write(new / INDEX, [(name, torch.full((4, 3, 3, 3), 2.0)) for name in NAMES])


def test_recover_takes_a_checkpoint_and_nothing_else(folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    before = everything(folder)
    for arguments, message in (
        (["--recover"], "--recover requires a local CHECKPOINT"),
        (["--arch", "cnn1", "--recover"], "--recover requires a local CHECKPOINT"),
        ([folder, "--recover", "-o", folder.parent / "x"], "only completes an interrupted save; remove --output"),
        ([folder, "--recover", "--dry-run"], "remove --dry-run"),
        ([folder.parent / "missing.pt", "--recover"], "missing.pt: no such file"),
    ):
        outcome = convsim("init", *arguments)
        assert outcome.code == 2
        assert message in outcome.error
    assert everything(folder) == before


@pytest.mark.parametrize("how", ["in place", "output", "another file", "library"])
def test_whatever_writes_completes_an_interrupted_save_first(how: str, folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    other = folder.parent / "other"
    save_new(other, 5.0)
    if how == "in place":
        assert convsim("init", folder, "--iterations", 1).code == 0
        assert values(folder, ".bak.1") == [2.0, 2.0]
    elif how == "output":
        assert convsim("init", other, "-o", folder, "--iterations", 1).code == 0
        assert values(folder)[0] > 4
    elif how == "another file":
        with pytest.warns(ConvsimWarning, match="an interrupted save was completed"):
            replace_file(folder / "notes", lambda file: file.write(b"x"))
        assert values(folder) == [2.0, 2.0]
    else:
        with pytest.warns(ConvsimWarning, match="an interrupted save was completed"):
            checkpoint = open_checkpoint(folder, for_writing=True)
        assert checkpoint.load(NAMES[1]).mean().item() == 2.0
    assert values(folder, ".bak") == [1.0, 1.0]
    assert not (folder / ".convsim-journal").exists()


def test_shards_behind_links_are_completed_where_they_are(folder: Path, convsim: Convsim) -> None:
    links = folder.parent / "links"
    links.mkdir()
    shutil.copy(folder / INDEX, links)
    for shard in SHARDS:
        (links / shard).symlink_to(folder / shard)
    interrupt(folder)
    outcome = convsim("measure", links)
    assert outcome.code == 2
    assert f"{links}: a save to {folder} was interrupted" in outcome.error
    assert convsim("init", links, "--recover").code == 0
    assert values(links) == [2.0, 2.0]


def die_in_second_manifest(folder: Path) -> None:
    die_after(journal, "write_manifest", 1)
    open_checkpoint(folder).write(folder / INDEX, [(name, torch.full((4, 3, 3, 3), 2.0)) for name in NAMES])


def test_nothing_is_committed_before_the_manifests_of_all_folders(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder / SHARDS[1]).rename(folder.parent / "other" / SHARDS[1])
    (folder / SHARDS[1]).symlink_to(folder.parent / "other" / SHARDS[1])
    process = fork(die_in_second_manifest, folder)
    process.join()
    assert process.exitcode == 9
    finish_saves(folder)
    assert values(folder) == [1.0, 1.0]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_completion_that_is_killed_is_completed_by_the_next(moves: int, folder: Path) -> None:
    interrupt(folder, 0)
    interrupt(folder, moves, die_in_completion)
    with pytest.raises(CheckpointError, match="was interrupted"):
        open_checkpoint(folder)
    finish_saves(folder)
    assert (values(folder), values(folder, ".bak")) == ([2.0, 2.0], [1.0, 1.0])
    assert not (folder / ".convsim-journal").exists()


def test_once_all_files_have_moved_reading_goes_on_and_writing_sweeps(folder: Path) -> None:
    place = folder / ".convsim-journal"
    place.mkdir(0o700)
    (place / ".convsim-manifest").touch()
    (place / ".convsim-0123456789abcdef").touch()
    before = everything(folder)
    assert open_checkpoint(folder).tensors
    assert everything(folder) == before
    replace_file(folder / "other", lambda file: file.write(b"x"))
    assert not place.exists()


def test_a_save_that_cannot_be_completed_here_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    interrupt(folder)
    before = everything(folder)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be completed \(Read-only file system\); once you have write"):
        open_checkpoint(folder, for_writing=True)
    assert everything(folder) == before


def assert_left_alone(folder: Path, reason: str, convsim: Convsim) -> None:
    """Reading warns and goes on, writing one file too, --recover refuses, and the journal and all beside it stay."""
    before = everything(folder)
    measured = convsim("measure", folder / SHARDS[0], "--samples", 1)
    assert measured.code == 0
    [warning] = [line for line in measured.err.splitlines() if "convsim: warning:" in line]
    assert f"{folder}/.convsim-journal is not an interrupted save of this folder: " in warning
    assert reason in warning
    assert everything(folder) == before
    recovered = convsim("init", folder, "--recover")
    assert recovered.code == 2
    assert reason in recovered.error
    replace_file(folder / "other", lambda file: file.write(b"x"))
    (folder / "other").unlink()
    assert everything(folder) == before


def test_a_forged_journal_replaces_nothing(folder: Path, convsim: Convsim) -> None:
    (folder / ".bashrc").write_text("mine")
    place = folder / ".convsim-journal"
    place.mkdir()
    (place / ".bashrc").write_text("theirs")
    shutil.copy(folder / SHARDS[0], place)
    assert_left_alone(folder, "it has no manifest", convsim)


def test_a_journal_from_an_archive_replaces_nothing(folder: Path, tmp_path: Path, convsim: Convsim) -> None:
    interrupt(folder)
    shutil.make_archive(str(tmp_path / "archive"), "tar", folder)
    shutil.unpack_archive(tmp_path / "archive.tar", tmp_path / "unpacked", filter="tar")
    assert_left_alone(tmp_path / "unpacked", "it was made elsewhere and copied here", convsim)


def test_a_foreign_journal_is_named_once_however_its_folder_is_spelled(
    folder: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".convsim-journal").mkdir()
    (folder / ".convsim-journal" / SHARDS[0]).write_bytes(b"theirs")
    monkeypatch.chdir(folder)
    assert convsim("measure", SHARDS[0], "--samples", 1).err.count("is not an interrupted save") == 1


def test_a_journal_that_was_moved_to_another_folder_replaces_nothing(folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    other = folder.parent / "other"
    save_new(other, 5.0)
    (folder / ".convsim-journal").rename(other / ".convsim-journal")
    assert_left_alone(other, "it was made elsewhere and copied here", convsim)


def rewrite_manifest(folder: Path, /, **changes: object) -> None:
    path = folder / ".convsim-journal" / ".convsim-manifest"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def name_a_null_byte(folder: Path) -> None:
    manifest = json.loads((folder / ".convsim-journal" / ".convsim-manifest").read_text())
    rewrite_manifest(folder, files={**manifest["files"], "\0.pt": 3})


def name_a_shell_s_file(folder: Path) -> None:
    path = folder / ".convsim-journal" / ".bashrc"
    path.write_text("theirs")
    manifest = json.loads((folder / ".convsim-journal" / ".convsim-manifest").read_text())
    entry = [path.stat().st_ino, path.stat().st_size, blake2b(b"theirs", digest_size=32).hexdigest()]
    rewrite_manifest(folder, files={**manifest["files"], ".bashrc": entry})


def change_a_file(folder: Path) -> None:
    with (folder / ".convsim-journal" / SHARDS[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def change_an_inode(folder: Path) -> None:
    path = folder / ".convsim-journal" / SHARDS[1]
    shutil.copy(path, folder.parent / "copy")
    (folder.parent / "copy").replace(path)


def put_at_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / SHARDS[1]).unlink()
        make(folder / SHARDS[1])

    return put


def take_a_backup_s_place(folder: Path) -> None:
    backup = folder / f"{SHARDS[0]}.bak"
    backup.replace(folder / ".convsim-journal" / backup.name)  # as if it had not been moved
    backup.write_bytes(b"the user's")


INSIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda place: (place / "folder").mkdir(), "folder in it is not a regular file"),
    "a FIFO": (lambda place: os.mkfifo(place / "fifo"), "fifo in it is not a regular file"),
    "a link": (lambda place: (place / "a.pt").symlink_to("/etc/hostname"), "a.pt in it is not a regular file"),
    "a manifest that is a link": (
        lambda place: (
            (place / ".convsim-manifest").rename(place.parent.parent / "m")
            and (place / ".convsim-manifest").symlink_to(place.parent.parent / "m")
        ),
        ".convsim-manifest in it is not a regular file",
    ),
    "one file more": (lambda place: (place / "a.pt").touch(), "its manifest does not name a.pt"),
    "a second name": (lambda place: os.link(place / SHARDS[1], place.parent.parent / "x"), "has another hard link"),
    "an open door": (lambda place: place.chmod(0o770), r"others may write to it (mode 0770)"),
}
OUTSIDE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another parent": (lambda folder: rewrite_manifest(folder, folder=1), "made elsewhere"),
    "another journal": (lambda folder: rewrite_manifest(folder, journal=1), "made elsewhere"),
    "no list of files": (lambda folder: rewrite_manifest(folder, files=3), "its manifest is damaged"),
    "files without entries": (lambda folder: rewrite_manifest(folder, files={SHARDS[1]: 3}), "has changed"),
    "a name that no file has": (name_a_null_byte, "\\x00.pt has changed or is missing"),
    "a file of a shell": (name_a_shell_s_file, ".bashrc is not named like a file of a checkpoint"),
    "changed content": (change_a_file, f"{SHARDS[1]} has changed or is missing"),
    "a file made anew": (change_an_inode, f"{SHARDS[1]} has changed or is missing"),
    "a moved file that is gone": (lambda folder: (folder / f"{SHARDS[0]}.bak").unlink(), "or is missing"),
    "a FIFO in its place": (put_at_place(os.mkfifo), f"{SHARDS[1]} beside it is not a regular file"),
    "a folder in its place": (put_at_place(Path.mkdir), f"{SHARDS[1]} beside it is not a regular file"),
    "a link in its place": (
        put_at_place(lambda path: path.symlink_to("/dev/null")),
        f"{SHARDS[1]} beside it is not a regular file",
    ),
    "a backup in its place": (take_a_backup_s_place, f"{SHARDS[0]}.bak has been created beside it"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_a_journal_with_anything_strange_in_it_is_left_alone(case: str, folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    tamper, reason = INSIDE[case]
    tamper(folder / ".convsim-journal")
    assert_left_alone(folder, reason, convsim)


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_journal_that_does_not_fit_its_manifest_is_left_alone(case: str, folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    tamper, reason = OUTSIDE[case]
    tamper(folder)
    assert_left_alone(folder, reason, convsim)


@pytest.mark.parametrize("kind", ["link", "file", "FIFO"])
def test_what_is_no_folder_is_no_journal_and_is_not_opened(kind: str, folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    place = folder / ".convsim-journal"
    place.rename(folder / "real")
    if kind == "link":
        place.symlink_to("real")
    elif kind == "file":
        place.touch()
    else:
        os.mkfifo(place)
    assert_left_alone(folder, "it is not a folder that you can open", convsim)
    with pytest.raises(WriteError, match=r"not a folder that you can open .*; the original is intact"):
        save_both(folder)
    assert values(folder) == [2.0, 1.0]


def save_both(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, for_writing=True)
    checkpoint.write(folder / INDEX, [(name, torch.full((4, 3, 3, 3), 3.0)) for name in NAMES])


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can make files of others")
def test_another_user_s_journal_in_a_sticky_folder_is_left_alone(folder: Path, convsim: Convsim) -> None:
    interrupt(folder)
    folder.chmod(0o1777)
    os.chown(folder / ".convsim-journal", 1001, -1)
    assert_left_alone(folder, "it belongs to another user (uid 1001)", convsim)


def test_a_save_of_several_files_replaces_only_checkpoint_files(folder: Path, tmp_path: Path) -> None:
    mine, new = tmp_path / ".bashrc", tmp_path / "new"
    mine.write_text("mine")
    new.mkdir()
    (new / SHARDS[0]).symlink_to(mine)
    (tmp_path / "model.safetensors").write_text("mine")
    (new / SHARDS[1]).symlink_to(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(WriteError, match="bashrc is not named like a file of a checkpoint"):
        checkpoint.write(new / INDEX, [(NAMES[0], torch.zeros(4, 3, 3, 3))])
    assert (mine.read_text(), (tmp_path / "model.safetensors").read_text()) == ("mine", "mine")
    assert not list(tmp_path.glob(".convsim-*"))


@pytest.mark.parametrize("name", [".convsim-0123456789abcdef.tmp", ".convsim-backup.tmp", ".convsim-notes.tmp"])
@pytest.mark.parametrize("kind", ["FIFO", "file"])
def test_only_folders_are_opened_and_swept(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    os.mkfifo(tmp_path / name) if kind == "FIFO" else (tmp_path / name).touch()
    replace_file(path, lambda file: file.write(b"new"), tmp_path / "model.pt.bak")
    assert (path.read_bytes(), (tmp_path / "model.pt.bak").read_bytes()) == (b"new", b"old")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.pt", "model.pt.bak", name}


@pytest.mark.parametrize("name", [".convsim-notes.tmp", ".convsim-0123456789ABCDEF.tmp", ".convsim-01234567.tmp"])
def test_folders_that_convsim_did_not_name_are_not_swept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("the user's")
    replace_file(tmp_path / "other", lambda file: file.write(b"x"))
    assert (tmp_path / name / "file").read_text() == "the user's"


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can make files of others")
@pytest.mark.parametrize("name", [".convsim-0123456789abcdef.tmp", ".convsim-backup.tmp"])
def test_another_user_s_scratch_folder_is_neither_swept_nor_waited_for(name: str, tmp_path: Path) -> None:
    theirs, path = tmp_path / name, tmp_path / "model.pt"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    os.chown(theirs, 1001, -1)
    path.write_bytes(b"old")
    descriptor = os.open(theirs, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        replace_file(path, lambda file: file.write(b"new"), tmp_path / "model.pt.bak")
    finally:
        os.close(descriptor)
    replace_file(tmp_path / "other", lambda file: file.write(b"x"))  # no longer locked
    assert (theirs / "file").read_text() == "theirs"
    assert (path.read_bytes(), (tmp_path / "model.pt.bak").read_bytes()) == (b"new", b"old")


@pytest.mark.parametrize("name", [".convsim-journal", ".convsim-backup.tmp"])
def test_waiting_for_another_process_is_said(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "notes").touch()
    (folder / name).mkdir(0o700)
    (folder / name / ".convsim-turn").touch()
    descriptor, said = os.open(folder / name, os.O_RDONLY), []
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def warn(message: str, category: type, **_: object) -> None:
        said.append((message, category))
        os.close(descriptor)  # the other process is done

    monkeypatch.setattr(warnings, "warn", warn)
    began = time.monotonic()
    replace_file(folder / "notes", lambda file: file.write(b"x"), folder / "notes.bak")
    assert said == [(f"waiting for another process that is saving to {folder}", ConvsimWarning)]
    assert time.monotonic() - began > 2
    assert sorted(path.name for path in folder.iterdir()) == [*SHARDS, INDEX, "notes", "notes.bak"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_reader_waits_for_a_save_that_is_running(moves: int, folder: Path) -> None:
    interrupt(folder, moves)
    descriptor = os.open(folder / ".convsim-journal", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def finish() -> None:
        for path in (folder / ".convsim-journal").iterdir():
            path.unlink() if path.name.startswith(".convsim-") else path.replace(folder / path.name)
        (folder / ".convsim-journal").rmdir()
        os.close(descriptor)

    Timer(0.3, finish).start()
    checkpoint = open_checkpoint(folder)
    assert [checkpoint.load(name).mean().item() for name in NAMES] == [2.0, 2.0]


def test_an_interrupted_save_after_the_one_waited_for_is_seen(folder: Path) -> None:
    interrupt(folder)
    place, next_one = folder / ".convsim-journal", folder / "next"
    place.rename(next_one)
    place.mkdir(0o700)
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def finish() -> None:
        place.rmdir()
        next_one.rename(place)
        os.close(descriptor)

    Timer(0.3, finish).start()
    with pytest.raises(CheckpointError, match="was interrupted"):
        open_checkpoint(folder)
