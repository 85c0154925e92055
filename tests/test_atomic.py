from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from convsim_cli.atomic import replace_file
from convsim_cli.errors import WriteError


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


def test_the_backup_is_the_former_file_itself_and_replaces_an_older_one(tmp_path: Path) -> None:
    target, backup = tmp_path / "file", tmp_path / "file.bak"
    target.write_bytes(b"one")
    backup.write_bytes(b"zero")
    inode = target.stat().st_ino
    replace_file(target, lambda file: file.write(b"two"), backup)
    assert backup.read_bytes() == b"one"
    assert backup.stat().st_ino == inode
    assert names(tmp_path) == ["file", "file.bak"]


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


def test_leftovers_of_a_killed_process_are_swept_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    (tmp_path / ".convsim-0000000000000000.tmp").write_bytes(b"left by a killed process")
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
