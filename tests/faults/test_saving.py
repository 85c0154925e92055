"""A save that is killed, or meets a full disk: the old file or the new one, whole, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import Convsim, Start
from forks import CONTEXT, call_in_fork, fork
from safetensors.torch import load_file, save_file

from convsim_cli.checkpoints import atomic
from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.cli import run
from convsim_cli.errors import ConvsimWarning, WriteError


def is_whole(path: Path) -> bool:
    """One value throughout the kernel, and the other tensor as it was: the state between two saves."""
    tensors = load_file(path)
    return bool((tensors["a.weight"] == tensors["a.weight"].flatten()[0]).all()) and bool((tensors["b"] == 7).all())


def kill_after(seconds: float, save: Callable[[Path, float], None], path: Path) -> None:
    """Start a process that saves again and again, and kill it so long after its first save."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = fork(save_for_ever, save, path, sender)
    sender.close()
    receiver.recv()  # the first save is done, and with it all that is imported for it
    time.sleep(seconds)
    child.kill()
    child.join()


def save_for_ever(save: Callable[[Path, float], None], path: Path, done: Connection) -> None:
    """Save 1, 2, 3…, and say when the first is done."""
    save(path, 1.0)
    done.send(None)
    for value in count(2):
        save(path, float(value))


def save_one_file(path: Path, value: float) -> None:
    kernel = torch.full((64, 64, 9, 9), value)
    open_checkpoint(path).write(path, [("a.weight", kernel)], backup=True)


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(64, 64, 9, 9), "b": torch.full((1000,), 7.0)}, path)
    chance = random.Random(0)
    for case in cases(20):
        kill_after(chance.uniform(0, 0.05), save_one_file, path)
        assert is_whole(path), case
        backups = list(tmp_path.glob("model.safetensors.bak*"))
        assert all(is_whole(backup) for backup in backups), case
        for backup in backups:
            backup.unlink()
        assert len({entry.name for entry in tmp_path.iterdir()} - {path.name}) <= 1, case
    replace_file(tmp_path / "other", lambda file: file.write(b"x"))
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "other"}  # the next save has swept


def save_shards_slowly(index: Path, value: float) -> None:
    """Most of a save is then renames, and most kills come between two of them."""
    replace = Path.replace

    def replace_slowly(path: Path, to: Path) -> Path:
        time.sleep(0.002)
        return replace(path, to)

    kernels = [(f"{number}.weight", torch.full((16, 16, 3, 3), value)) for number in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace_slowly)
        open_checkpoint(index).write(index, kernels, backup=True)


@pytest.mark.slow
def test_a_killed_save_of_shards_is_all_old_or_all_new_to_the_next_writer(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    shards = [f"model-{number}-of-8.safetensors" for number in range(8)]
    for number, shard in enumerate(shards):
        save_file({f"{number}.weight": torch.zeros(16, 16, 3, 3)}, tmp_path / shard)
    index.write_text(json.dumps({"weight_map": {f"{number}.weight": shard for number, shard in enumerate(shards)}}))
    chance = random.Random(0)
    found = set()
    for case in cases(20):
        kill_after(chance.uniform(0, 0.1), save_shards_slowly, index)
        found |= {entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".convsim-")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvsimWarning)  # that a save was completed
            checkpoint = open_checkpoint(index, for_writing=True)
        kernels = [checkpoint.load(name) for name in checkpoint.tensors]
        assert len({value for kernel in kernels for value in kernel.unique().tolist()}) == 1, case
        saves: dict[str, list[float]] = {}
        for backup in tmp_path.glob("*.bak*"):
            saves.setdefault(backup.suffix, []).extend(next(iter(load_file(backup).values())).unique().tolist())
            backup.unlink()
        assert all(len(values) == 8 and len(set(values)) == 1 for values in saves.values()), case
    assert found  # some were killed on the way
    replace_file(tmp_path / "other", lambda file: file.write(b"x"))
    assert {entry.name for entry in tmp_path.iterdir()} == {index.name, "other", *shards}


def _failing(real: Callable[..., Any], number: int, once: bool) -> Callable[..., Any]:
    left = [1 if once else 10**9]

    def call(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


class Broken:
    """A file whose method fails."""

    def __init__(self, file: Any, method: str, number: int, once: bool) -> None:
        self._file = file
        setattr(self, method, _failing(getattr(file, method), number, once))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


STEPS = ("open", "write", "flush", "mode", "sync", "backup", "turn", "rename", "folder")


@pytest.mark.parametrize("once", [True, False], ids=["once", "for ever"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_a_save_that_fails_leaves_the_old_file_and_no_other(
    step: str, number: int, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backup = tmp_path / "model", tmp_path / "model.bak"
    path.write_bytes(b"old")
    backup.write_bytes(b"older")
    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(os, "open", _failing(os.open, number, once))
        elif step in ("write", "flush"):
            real = os.fdopen
            patch.setattr(os, "fdopen", lambda *arguments: Broken(real(*arguments), step, number, once))
        elif step == "mode":
            patch.setattr(os, "fchmod", _failing(os.fchmod, number, once))
        elif step == "sync":
            patch.setattr(os, "fsync", _failing(os.fsync, number, once))
        elif step == "backup":
            patch.setattr(os, "link", _failing(os.link, number, False))
            patch.setattr(shutil, "copy2", _failing(shutil.copy2, number, once))
        elif step == "turn":
            patch.setattr(Path, "rename", _failing(Path.rename, number, once))
        elif step == "rename":
            real, fail = Path.replace, _failing(Path.replace, number, once)
            patch.setattr(Path, "replace", lambda new, to: (fail if to == path else real)(new, to))
        else:
            patch.setattr(atomic, "flush_folder", _failing(atomic.flush_folder, number, once))
        with pytest.raises(WriteError, match="model: written, but" if step == "folder" else "original is intact"):
            replace_file(path, lambda file: file.write(b"new"), backup)
    done = step == "folder"  # the rename is done, and only its being on disk is in doubt
    assert path.read_bytes() == (b"new" if done else b"old")
    assert backup.read_bytes() == b"older"
    kept = {"model.bak.1": b"old"} if done else {}
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "model.bak", *kept}
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("call", ["mkdir", "open", "fdopen", "flock"])
def test_any_failed_system_call_of_a_save_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backup = tmp_path / "model", tmp_path / "model.bak"
    path.write_bytes(b"old")
    owner = {"flock": fcntl, "mkdir": Path}.get(call, os)  # Path.mkdir of Python 3.10 calls an os.mkdir of its own
    real = getattr(owner, call)
    for number in range(10):
        left = [number]

        def fail(*arguments: Any, left: list[int] = left, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOTSUP, "Operation not supported")
            return real(*arguments, **options)

        before = descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, fail)
            with contextlib.suppress(WriteError):
                replace_file(path, lambda file: file.write(b"new"), backup)
        assert descriptors() == before, number
        left_over = {entry.name for entry in tmp_path.iterdir()}
        assert {name for name in left_over if not name.startswith("model.bak")} == {"model"}, number
        if left[0] >= 0:
            assert number  # it was reached, and has failed once in each place
            break


def test_where_locks_are_not_offered_files_are_replaced_and_swept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    monkeypatch.setattr(fcntl, "flock", _failing(fcntl.flock, errno.ENOLCK, False))
    (tmp_path / ".convsim-0000000000000000.tmp").mkdir()
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "model",
        ".convsim-0000000000000000.tmp",
    }  # who knows who uses it


def init_on_a_full_disk(path: Path) -> tuple[int, str]:
    """Return the exit code of an init whose files may grow to 50 kB, and what it says."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return run(["init", str(path), "--iterations", "1", "-q"]), said.getvalue()


@pytest.mark.parametrize("name", ["model.safetensors", "zip.pt", "legacy.pt"])
def test_a_disk_that_is_really_full_is_one_line_and_exit_1(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = {"a.weight": torch.randn(64, 64, 3, 3)}
    if name.endswith(".pt"):
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pt")
    else:
        save_file(state, path)
    before = path.read_bytes()
    code, said = call_in_fork(init_on_a_full_disk, path)
    assert code == 1
    assert [line for line in said.splitlines() if "error" in line] == [
        f"convsim: error: {path}: cannot be written (File too large); the original is intact"
    ]
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("mode", [None, 0o400, 0o600, 0o644, 0o664, 0o755])
def test_an_old_file_keeps_its_mode_and_a_new_one_follows_the_umask(
    tmp_path: Path, umask: int, mode: int | None
) -> None:
    path = tmp_path / "model"
    if mode is not None:
        path.write_bytes(b"old")
        path.chmod(mode)
    former = os.umask(umask)
    try:
        replace_file(path, lambda file: file.write(b"new"))
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == (0o666 & ~umask if mode is None else mode)


def test_two_inits_on_one_file_at_once_leave_the_whole_result_of_one(
    tmp_path: Path, convsim: Convsim, start: Start
) -> None:
    path, rates = tmp_path / "model.safetensors", ("0.001", "0.002")
    save_file({"a.weight": torch.randn(32, 32, 3, 3), "b": torch.ones(3)}, path)
    kernel = load_file(path)["a.weight"]
    one, both = {}, {}
    for first, then in (rates, rates[::-1]):
        copy = tmp_path / "copy.safetensors"
        assert convsim("init", path, "-o", copy, "--iterations", 30, "--lr", first).code == 0
        one[first] = load_file(copy)["a.weight"]
        assert convsim("init", copy, "--no-backup", "--iterations", 30, "--lr", then).code == 0
        both[then] = load_file(copy)["a.weight"]
    children = [start("init", path, "-q", "--iterations", 30, "--lr", rate) for rate in rates]
    assert [child.wait() for child in children] == [0, 0]
    found, *kept = (load_file(tmp_path / f"model.safetensors{suffix}")["a.weight"] for suffix in ("", ".bak", ".bak.1"))
    outcomes = [(one[first], last) for first, then in (rates, rates[::-1]) for last in (one[then], both[then])]
    assert any(torch.equal(kept[1], former) and torch.equal(found, last) for former, last in outcomes)
    assert torch.equal(kept[0], kernel)  # the weights before both saves are kept, in either order
    assert not list(tmp_path.glob(".convsim-*"))


def test_ctrl_c_in_a_save_leaves_the_old_file(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(8, 8, 3, 3)}, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGINT))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    try:
        outcome = convsim("init", path, "--iterations", 1)
    finally:
        signal.signal(signal.SIGINT, former)
    assert (outcome.code, path.read_bytes()) == (130, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert open_checkpoint(path).tensors


@pytest.mark.parametrize("backed_up", [True, False], ids=["with a backup", "without"])
@pytest.mark.parametrize("moment", ["before", "after", "a step later"])
@pytest.mark.parametrize("rename", [1, 2])
def test_an_interrupted_rename_leaves_the_old_file_or_the_new_one(
    rename: int, moment: str, backed_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backup = tmp_path / "model", tmp_path / "model.bak"
    path.write_bytes(b"old")
    backup.write_bytes(b"older")
    real, link, remove, left = Path.replace, os.link, Path.unlink, [rename]

    def moved(move: Callable[[Path, Path], Any], source: Path, to: Path) -> Any:
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            raise KeyboardInterrupt
        found = move(source, to)
        if left[0] == 0 and moment == "after":
            raise KeyboardInterrupt
        return found

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if left[0] == 0 and moment == "a step later":
            left[0] = -1
            raise KeyboardInterrupt
        remove(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(Path, "replace", lambda self, to: moved(real, self, to))
    monkeypatch.setattr(os, "link", lambda self, to: moved(link, self, to) if to.parent == tmp_path else link(self, to))
    interrupted = nullcontext() if rename == 2 and not backed_up else pytest.raises(KeyboardInterrupt)
    with interrupted:
        replace_file(path, lambda file: file.write(b"new"), backup if backed_up else None)
    monkeypatch.undo()
    last = 2 if backed_up else 1
    done = rename > last or (rename == last and moment != "before")
    assert path.read_bytes() == (b"new" if done else b"old")
    assert backup.read_bytes() == b"older"
    kept = {"model.bak.1"} if done and backed_up else set()
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "model.bak", *kept}
    assert all((tmp_path / name).read_bytes() == b"old" for name in kept)


INTERRUPTED = """
import os, random, signal, sys, time
from pathlib import Path
from convsim_cli.checkpoints.atomic import replace_file
path, backup = Path(sys.argv[1], "model"), Path(sys.argv[1], "model.bak")
path.write_bytes(b"0")
chance, interrupted = random.Random(0), 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for case in range(1, int(sys.argv[2]) + 1):
    before, after = path.read_bytes(), str(case).encode()
    start = time.perf_counter()
    replace_file(Path(sys.argv[1], "other"), lambda file: file.write(after))
    took = time.perf_counter() - start  # flushing takes longer at one time than at another
    child = os.fork()
    if not child:
        code = 0
        try:
            signal.setitimer(signal.ITIMER_REAL, took * chance.uniform(0.01, 3))
            replace_file(path, lambda file: file.write(after), backup)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            code = 130
        os._exit(code)
    chance.random()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    interrupted += code != 0
    now = path.read_bytes()
    assert now == after or (code and now == before), (case, code, before, now)
    assert now == before or backup.read_bytes() == before, (case, code, before, now, backup.read_bytes())
    backup.unlink(missing_ok=True)
replace_file(path, lambda file: file.write(b"last"), backup)
print(interrupted, *sorted(os.listdir(sys.argv[1])))
"""


@pytest.mark.slow
def test_an_interruption_at_any_moment_leaves_one_whole_file(
    tmp_path: Path,
) -> None:
    many = len(cases(300))
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(many)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    interrupted, *left = ended.stdout.split()
    assert int(interrupted) > many / 10
    assert left == ["model", "model.bak", "other"]
