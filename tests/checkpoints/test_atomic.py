from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, BinaryIO, cast

import pytest
import torch
from conftest import IRREGULAR, Start
from forks import call_in_fork, run_code

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.journal import Scratch, remove_folder
from convsim_cli.checkpoints.pickle_format import write_pickle
from convsim_cli.errors import InputError, WriteError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "file"
    former = os.umask(0o027)
    try:
        replace_file(target, lambda file: file.write(b"new"))
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o604)
        replace_file(target, lambda file: file.write(b"newer"))
        assert stat.S_IMODE(target.stat().st_mode) == 0o604
    finally:
        os.umask(former)
    assert target.read_bytes() == b"newer"
    assert names(tmp_path) == ["file"]


def test_a_symbolic_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "blob", tmp_path / "model"
    real.write_bytes(b"old")
    link.symlink_to(real)
    replace_file(link, lambda file: file.write(b"new"), backup=tmp_path / "model.bak")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert (tmp_path / "model.bak").read_bytes() == b"old"
    assert names(tmp_path / "store") == ["blob"]


def test_a_backup_is_the_former_file_itself_and_overwrites_no_older_one(tmp_path: Path) -> None:
    target, backup = tmp_path / "file", tmp_path / "file.bak"
    target.write_bytes(b"0")
    made = []
    for number in range(1, 4):
        inode = target.stat().st_ino
        made.append(replace_file(target, lambda file, text=str(number): file.write(text.encode()), backup))
        assert made[-1] is not None
        assert made[-1].stat().st_ino == inode
    assert made == [backup, tmp_path / "file.bak.1", tmp_path / "file.bak.2"]
    assert [path.read_bytes() for path in made if path] == [b"0", b"1", b"2"]
    assert target.read_bytes() == b"3"
    assert names(tmp_path) == ["file", "file.bak", "file.bak.1", "file.bak.2"]


def test_a_dangling_link_is_a_name_that_is_taken(tmp_path: Path) -> None:
    target, backup = tmp_path / "file", tmp_path / "file.bak"
    target.write_bytes(b"old")
    backup.symlink_to(tmp_path / "elsewhere")
    assert replace_file(target, lambda file: file.write(b"new"), backup) == tmp_path / "file.bak.1"
    assert backup.is_symlink()


REPLACE_OFTEN = """
import sys
from pathlib import Path
from convsim_cli.checkpoints.atomic import replace_file
folder, number = Path(sys.argv[1]), sys.argv[2]
for case in range(20):
    text = f"{number}.{case}".encode()
    replace_file(folder / "file", lambda file: file.write(text), folder / "file.bak")
"""


@pytest.mark.slow
def test_processes_that_save_at_once_keep_every_file(tmp_path: Path, start: Start) -> None:
    (tmp_path / "file").write_bytes(b"first")
    children = [start(tmp_path, number, code=REPLACE_OFTEN) for number in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    kept = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(names(tmp_path)) == 81
    assert sorted(kept) == sorted([b"first", *(f"{n}.{case}".encode() for n in range(4) for case in range(20))])


def test_without_locks_a_late_backup_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    target, backup = tmp_path / "file", tmp_path / "file.bak"
    target.write_bytes(b"old")
    (tmp_path / ".convsim-backup.tmp").mkdir()
    (tmp_path / ".convsim-backup.tmp" / "file").write_bytes(b"of another process, running or not")
    monkeypatch.setattr(fcntl, "flock", no_lock)
    keep = Scratch.keep

    def keep_late(scratch: Scratch, real: Path, place: Path) -> None:
        keep(scratch, real, place)
        backup.write_bytes(b"made by another process")

    monkeypatch.setattr(Scratch, "keep", keep_late)
    with pytest.raises(WriteError, match=r"File exists\); the original is intact"):
        replace_file(target, lambda file: file.write(b"new"), backup)
    assert (target.read_bytes(), backup.read_bytes()) == (b"old", b"made by another process")


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_whatever_stops_the_writing_leaves_the_former_file_and_no_other(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        replace_file(target, write, tmp_path / "file.bak")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(_: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match=f"{target}: cannot be written .No space left on device."):
        replace_file(target, write)
    assert target.read_bytes() == b"old"


def test_only_a_dead_processs_leftovers_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".convsim-0000000000000000.tmp").mkdir()
    (tmp_path / ".convsim-0000000000000000.tmp" / "file").write_bytes(b"left by a killed process")
    target = tmp_path / "file"

    def write(file: BinaryIO) -> None:
        file.write(b"outer")
        replace_file(tmp_path / "other", lambda inner: inner.write(b"inner"))  # sweeps while this one is still written

    replace_file(target, write)
    assert target.read_bytes() == b"outer"
    assert names(tmp_path) == ["file", "other"]


def test_data_is_on_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "data") or fsync(fd)
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: calls.append("rename") or replace(self, to))
    replace_file(tmp_path / "file", lambda file: file.write(b"x"))
    assert calls == ["data", "rename", "folder"]


def test_the_backup_in_the_making_is_not_swept_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, backup = tmp_path / "file", tmp_path / "file.bak"
    target.write_bytes(b"old")
    link = os.link

    def link_and_sweep(one: Path, other: Path) -> None:
        link(one, other)
        replace_file(tmp_path / "other", lambda file: file.write(b"another process"))

    monkeypatch.setattr(os, "link", link_and_sweep)
    replace_file(target, lambda file: file.write(b"new"), backup)
    assert (target.read_bytes(), backup.read_bytes()) == (b"new", b"old")
    assert names(tmp_path) == ["file", "file.bak", "other"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flushes, renames and links from now on, each with the name of its file."""
    calls: list[str] = []
    fsync, replace, link = os.fsync, Path.replace, os.link

    def record_fsync(descriptor: int) -> None:
        calls.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_replace(path: Path, to: Path) -> Path:
        calls.append(f"rename {to.name}")
        return replace(path, to)

    def record_link(path: Path, to: Path) -> None:
        link(path, to)
        calls.append(f"link {to.parent.name[:9]}/{to.name}")

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    monkeypatch.setattr(Path, "replace", record_replace)
    return calls


def test_a_backup_that_is_a_copy_is_on_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    (tmp_path / "file").write_bytes(b"old")
    calls = recorded(monkeypatch)
    monkeypatch.setattr(os, "link", no_link)
    replace_file(tmp_path / "file", lambda file: file.write(b"new"), tmp_path / "file.bak")
    assert calls == ["flush file", "flush file.bak", "rename file.bak", "rename file", f"flush {tmp_path.name}"]
    assert (tmp_path / "file.bak").read_bytes() == b"old"


def test_the_folder_of_a_link_where_the_backup_is_is_swept_and_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    for folder in (store, links):
        folder.mkdir()
        (folder / ".convsim-0000000000000000.tmp").mkdir()
        (folder / ".convsim-0000000000000000.tmp" / "left").write_bytes(b"by a killed process")
    (store / "blob").write_bytes(b"old")
    (links / "file").symlink_to(store / "blob")
    calls = recorded(monkeypatch)
    replace_file(links / "file", lambda file: file.write(b"new"), links / "file.bak")
    assert calls == [
        "flush blob",
        "link .convsim-/file.bak",
        "link links/file.bak",
        "rename blob",
        "flush links",
        "flush store",
    ]
    assert (names(store), names(links)) == (["blob"], ["file", "file.bak"])


REPLACE = """
import os, sys
from pathlib import Path
from convsim_cli.checkpoints.atomic import replace_file
os.setgroups([5000])
os.setegid(5002)
os.seteuid(1002)
replace_file(Path(sys.argv[1]), lambda file: file.write(b"new"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can make files of others")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "kept"),
    [
        (1001, 5000, 0o6775, (1002, 5000, 0o2775)),  # another's file: what ran as its owner does not run as me
        (1001, 5001, 0o6775, (1002, 5002, 0o775)),  # of a group that I am not in, too
        (1002, 5000, 0o6775, (1002, 5000, 0o6775)),
    ],
)
def test_the_group_is_kept_where_the_owner_cannot_be(
    owner: int, group: int, mode: int, kept: tuple[int, int, int]
) -> None:
    with TemporaryDirectory() as name:  # in a place that every user may enter
        folder, path = Path(name), Path(name) / "file"
        folder.chmod(0o777)
        path.write_bytes(b"old")
        os.chown(path, owner, group)
        path.chmod(mode)
        assert run_code(REPLACE, path) == (0, "", "")
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == kept
        assert path.read_bytes() == b"new"


def test_owner_group_and_every_bit_of_the_mode_are_kept_by_the_superuser(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(path, 1001, 5000)
    path.chmod(0o6755)
    before = path.stat()
    replace_file(path, lambda file: file.write(b"new"))
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


class Interrupted:
    """Raises KeyboardInterrupt as one of the functions that create a new file returns."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame: FrameType, event: str, value: object) -> Interrupted | None:
        if frame.f_code.co_name not in ("create", "fdopen"):
            return None
        self.left -= event == "return"
        if self.left == 0 and event == "return":
            sys.settrace(None)
            del value  # what would be returned goes too, as if the signal had come just before
            raise KeyboardInterrupt
        return self


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_while_a_new_file_is_created_is_no_failed_write(tmp_path: Path) -> None:
    target, events = tmp_path / "file", 0
    target.write_bytes(b"old")
    while target.read_bytes() == b"old":
        events += 1
        sys.settrace(Interrupted(events))
        try:
            with suppress(KeyboardInterrupt):
                replace_file(target, lambda file: file.write(b"new"))
        finally:
            sys.settrace(None)
    assert events > 2
    assert names(tmp_path) == ["file"]


class Presses:
    """A file at whose nth write the user presses Ctrl-C."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.file, self.left = file, number

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def interrupted_pickle(target: Path, number: int) -> tuple[str, int]:
    """How a save of a pickle ends with Ctrl-C at its nth write, and how many writes it had left until then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed: list[Presses] = []

    def write(file: BinaryIO) -> None:
        pressed.append(Presses(file, number))
        write_pickle(cast("BinaryIO", pressed[0]), {"a": torch.ones(3), "b": torch.ones(2)})

    try:
        replace_file(target, write)
    except BaseException as error:
        return type(error).__name__, pressed[0].left
    return "saved", pressed[0].left


def test_an_interruption_while_a_pickle_is_written_is_no_failed_write(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for number in itertools.count(1, 3):
        target.write_bytes(b"old")
        ended, left = call_in_fork(interrupted_pickle, target, number)
        if left > 0:
            break
        assert (number, ended, target.read_bytes()) == (number, "KeyboardInterrupt", b"old")
    assert (ended, names(tmp_path)) == ("saved", ["file"])
    assert number > 5


@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_a_regular_file_is_replaced(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    IRREGULAR[kind](target)
    before = target.lstat()
    with pytest.raises(InputError, match=f"file: is {kind}; choose a new file or a regular one to replace"):
        replace_file(target, lambda file: file.write(b"new"))
    assert os.path.samestat(target.lstat(), before)
    assert names(tmp_path) == ["file"]


def test_an_access_list_of_the_folder_does_not_open_a_file_to_others(tmp_path: Path) -> None:
    entries = [(1, 7, -1), (2, 7, 1234), (4, 0, -1), (0x10, 7, -1), (0x20, 0, -1)]  # user 1234 may do everything
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", listed)
    except OSError:
        pytest.skip("no access lists on this file system")
    before = os.listxattr(path)
    replace_file(path, lambda file: file.write(b"new"))
    assert os.listxattr(path) == before
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_tells_whose_folder_it_is_goes_last_whatever_is_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".convsim-backup.tmp"
    folder.mkdir()
    for name in (".convsim-turn", "(1).pt.bak", "z.pt.bak"):
        (folder / name).touch()
    removed: list[str] = []
    monkeypatch.setattr(os, "unlink", lambda name, **_: removed.append(name))
    with suppress(OSError):
        remove_folder(folder, os.open(folder, os.O_RDONLY))
    assert removed[-1] == ".convsim-turn"
