"""Files that change while they are read, take more than there is, or wait for ever: one line, and bounded memory."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from conftest import Convsim
from forks import call_in_fork
from safetensors.torch import load_file, save_file

from convsim_cli.checkpoints import diagnose
from convsim_cli.checkpoints.diagnose import Source
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError, ConvsimError, ReadError

KERNEL = torch.randn(8, 3, 3, 3)
SUFFIXES = (".pt", ".safetensors")


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    return path


def cut(path: Path, _: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def replace_by_folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def replace_by_file(path: Path, other: Path) -> None:
    other.replace(path)


CHANGES = (cut, rewrite, replace_by_folder, replace_by_link, replace_by_file)
IN_PLACE = (cut, rewrite)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changes_while_it_is_opened_is_named_or_read_whole(
    suffix: str, change: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / f"model{suffix}", {"a.weight": KERNEL, "b.weight": KERNEL + 1})
    other = save(tmp_path / f"other{suffix}", {"c.weight": torch.zeros(64, 3, 3, 3)})
    described = diagnose.is_index

    def late(name: Path) -> bool:  # is asked once the first bytes are read
        monkeypatch.setattr("convsim_cli.checkpoints.formats.is_index", described)
        change(path, other)
        return described(name)

    monkeypatch.setattr("convsim_cli.checkpoints.formats.is_index", late)
    if change in IN_PLACE:
        with pytest.raises(CheckpointError, match=r"model\..*: another process changed it while it was read"):
            open_checkpoint(path)
    else:
        assert torch.equal(open_checkpoint(path).load("b.weight"), KERNEL + 1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_open_file_that_changes_gives_its_own_tensors_or_is_named(
    suffix: str, change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path = save(tmp_path / f"model{suffix}", {"a.weight": KERNEL, "b.weight": KERNEL + 1})
    other = save(tmp_path / f"other{suffix}", {"c.weight": torch.zeros(64, 3, 3, 3)})
    checkpoint = open_checkpoint(path)
    change(path, other)
    if suffix == ".safetensors" and change in IN_PLACE:
        with pytest.raises(CheckpointError, match="another process changed it"):
            checkpoint.load("b.weight")
    else:
        assert torch.equal(checkpoint.load("b.weight"), KERNEL + 1)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device"])
def test_no_pipe_or_device_is_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("/dev/tty0" if kind == "device" and Path("/dev/tty0").exists() else tmp_path / "pipe")
    if name.startswith("shard"):
        (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConvsimError):
        open_checkpoint(tmp_path / "a.index.json" if name.startswith("shard") else path)


@pytest.mark.parametrize("when", ["before", "while it is opened"])
def test_a_pipe_is_not_opened_nor_read_where_it_takes_a_file_s_name(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model.pt", {"a.weight": KERNEL})
    opened = os.open

    def replace_by_pipe(name: Any, *arguments: Any, **more: Any) -> int:
        if isinstance(name, str | Path) and Path(name) == path:
            assert when != "before"
            path.unlink()
            os.mkfifo(path)
        return opened(name, *arguments, **more)

    if when == "before":
        path.unlink()
        os.mkfifo(path)
    monkeypatch.setattr(os, "open", replace_by_pipe)
    with pytest.raises(CheckpointError, match=r"model.pt: a pipe or a device; save its output to a file first"):
        Source(path)


def sparse(path: Path, size: int) -> Path:
    """A file with a small kernel beside a tensor of so many bytes, which takes no room on the disk."""
    kernel = KERNEL.numpy().tobytes()
    header: dict[str, Any] = {
        "a.weight": {"dtype": "F32", "shape": [8, 3, 3, 3], "data_offsets": [size, size + len(kernel)]},
        "embedding": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size, os.SEEK_CUR)
        file.write(kernel)
    return path


def test_a_file_larger_than_memory_is_changed_and_stays_sparse(tmp_path: Path, convsim: Convsim) -> None:
    path = sparse(tmp_path / "large.safetensors", 50 << 30)
    assert convsim("measure", path, "--samples", 1).code == 0
    outcome = convsim("init", path, "--iterations", 1)
    assert outcome.code == 0, outcome.err
    assert path.stat().st_blocks * 512 < 1 << 20
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["embedding"].shape == ((50 << 30) // 4,)
    assert not torch.equal(checkpoint.load("a.weight"), KERNEL)


def peak_of(path: Path) -> tuple[str, int, float]:
    """What is said of a file, by how many bytes the process grows, and how many seconds that takes."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10

    save(path.with_name("small.pt"), {"a.weight": KERNEL})
    open_checkpoint(path.with_name("small.pt"))
    before, began, said = peak(), process_time(), "read"
    try:
        open_checkpoint(path)
    except ConvsimError as error:
        said = str(error)
    return said, peak() - before, process_time() - began


class Call:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


LARGE = 300_000_000
COUNTED = {
    "a counter of a range": lambda: Call(Counter, range(LARGE)),
    "a list of a range": lambda: Call(list, range(LARGE)),
    "a tuple of a range": lambda: Call(tuple, range(LARGE)),
    "a set of a range": lambda: Call(set, range(LARGE)),
    "a size of a range": lambda: Call(torch.Size, range(LARGE)),
    "a bytearray of zeros": lambda: Call(bytearray, 100 * LARGE),
    "bytes of zeros": lambda: Call(bytes, 100 * LARGE),
    "a dictionary copied again and again": lambda: copies(OrderedDict),
    "a list copied again and again": lambda: copies(set),
    "bytes encoded again and again": lambda: encoded(40),
    "a tensor by its size": lambda: Call(torch.Tensor, 10**12),
    "a typed tensor by its size": lambda: Call(torch.FloatTensor, 10**12),
    "a storage by its size": lambda: Call(torch.UntypedStorage, 10**13),
    "a text of nested tuples": lambda: Call(str, nested(40)),
    "a key of nested tuples": lambda: {nested(40): 1},
    "a call within a call": lambda: Call(torch._tensor._rebuild_from_type_v2, bytearray, bytearray, (10**12,), {}),
}


def copies(kind: Any) -> list[Call]:
    shared = [(number, 0) for number in range(100_000)]
    return [Call(kind, shared) for _ in range(3_000)]


def encoded(times: int) -> Any:
    import _codecs

    made: Any = b"a"
    for _ in range(times):
        made = Call(_codecs.encode, made, "hex")
    return made


def nested(depth: int) -> Any:
    made: Any = (1, 2)
    for _ in range(depth):
        made = (made, made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", COUNTED)
def test_no_call_in_a_pickle_makes_more_than_the_file_holds(kind: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    if kind == "a key of nested tuples":
        write_pickled(path, key_of_nested_tuples(), legacy)
    else:
        torch.save({"a.weight": KERNEL, "other": COUNTED[kind]()}, path, _use_new_zipfile_serialization=not legacy)
    said, grown, seconds = call_in_fork(peak_of, path)
    assert re.search("is not plain data|not known to be harmless", said)
    assert grown < 20 * path.stat().st_size + (50 << 20)
    assert seconds < 20


def test_an_older_stream_is_checked_however_its_magic_number_is_spelled(tmp_path: Path) -> None:
    path, spelled = tmp_path / "model.pt", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    torch.save({"a.weight": KERNEL, "b": Call(bytearray, LARGE)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert whole.count(spelled) == 1
    path.write_bytes(whole.replace(spelled, b"\x8a\x0b" + spelled[2:-1] + b"\0."))
    said, grown, _ = call_in_fork(peak_of, path)
    assert "a call of builtins.bytearray" in said
    assert grown < 50 << 20


DEEP = 100_000
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00"  # calls its first argument with its third
CHAINS = {
    "tuples as a key": b"}" + b")" + b"\x85" * DEEP + b"Ns.",
    "slices": b"cbuiltins\nslice\nq\x00" + b"h\x00" * DEEP + b"N" + b"\x85R" * DEEP + b".",
    "tuples in a call": FROM_TYPE + b"h\x00N" * DEEP + b"N" + b"\x87" * DEEP + b"R.",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHAINS)
def test_no_depth_of_tuples_or_slices_overflows_the_stack(kind: str, tmp_path: Path) -> None:
    write_pickled(tmp_path / "model.pt", b"\x80\x02" + CHAINS[kind], legacy=False)
    assert "which is not plain data" in call_in_fork(peak_of, tmp_path / "model.pt")[0]


def test_a_tensor_whose_offset_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.tensor(1.0)}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("model/data.pkl")
    assert b"K\x00))" in content  # the offset, before an empty shape and empty strides
    write_pickled(path, content.replace(b"K\x00))", b"N))"), legacy=False)
    with pytest.raises(CheckpointError, match="does not fit into its storage"):
        open_checkpoint(path)


def key_of_nested_tuples() -> bytes:
    doubled = b"q\x00h\x00\x86" * 40
    return b"\x80\x02}K\x01\x85" + doubled + b"K\x01s."


def write_pickled(path: Path, content: bytes, legacy: bool) -> None:
    """A file of torch.save with another pickle in it."""
    if legacy:
        start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + content + pickle.dumps([], 2))
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/version", "3\n")


def changed_pickle(path: Path, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write a checkpoint whose pickle is changed."""
    made = io.BytesIO()
    torch.save({"a.weight": torch.zeros(5, 7, 3, 3)}, made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)


IMPOSSIBLE = {
    "a size beyond the storage": (b"K\x05K\x07K\x03K\x03t", b"M\xff\xffK\x07K\x03K\x03t"),
    "a stride beyond the storage": (b"K?K\tK\x03K\x01t", b"J\xff\xff\xff\x7fK\tK\x03K\x01t"),
    "a negative stride": (b"K?K\tK\x03K\x01t", b"J\xff\xff\xff\xffK\tK\x03K\x01t"),
    "a storage beyond its record": (b"M;\x01", b"J\xff\xff\xff\x7f"),
    "a storage that is missing": (b"X\x01\0\0\x000", b"X\x01\0\0\x007"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_tensor_that_its_storage_cannot_hold_is_named(kind: str, tmp_path: Path) -> None:
    path, (former, new) = tmp_path / "model.pt", IMPOSSIBLE[kind]

    def change(pickled: bytes) -> bytes:
        assert pickled.count(former) == 1
        return pickled.replace(former, new)

    changed_pickle(path, change)
    with pytest.raises(CheckpointError, match=r"damaged.* storage.*; fetch it again$") as caught:
        open_checkpoint(path)
    assert ("does not fit into its storage" in str(caught.value)) == ("beyond the storage" in kind or "stride" in kind)


def test_an_archive_that_expands_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("model/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(600):
                entry.write(bytes(1 << 20))
        archive.writestr("model/version", "3\n")
    said, grown, _ = call_in_fork(peak_of, path)
    assert "entries are compressed, or larger than the file" in said
    assert grown < 100 << 20


@pytest.mark.parametrize("damage", [0x70, 0xFF])
@pytest.mark.parametrize("place", ["of the directory's end", "of an entry"])
def test_an_offset_beyond_the_end_of_an_archive_is_damage(place: str, damage: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    if place == "of an entry":
        write_pickled(path, b"\x80\x02}.", legacy=False)
        whole = bytearray(path.read_bytes())
        entry = whole.index(b"PK\x01\x02")
        end = entry + 46 + len("model/data.pkl")
        struct.pack_into("<H", whole, entry + 30, 12)
        struct.pack_into("<L", whole, entry + 42, 0xFFFFFFFF)  # the offset stands in the extra field
        whole[end:end] = struct.pack("<HHQ", 1, 8, damage << 56)
    else:
        save(path, {"a.weight": KERNEL})
        whole = bytearray(path.read_bytes())
        whole[whole.rindex(b"PK\x06\x07") + 15] = damage
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_checkpoint(path)


@pytest.mark.parametrize("place", [20, 24])  # of the packed and the full size in an entry of the directory
def test_a_directory_that_lies_about_sizes_is_refused(place: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    changed_pickle(path, bytes)
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02")
    struct.pack_into("<L", whole, entry + place, 3_000_000_000)
    path.write_bytes(whole)
    said, grown, _ = call_in_fork(peak_of, path)
    assert "damaged" in said or "larger than the file" in said
    assert grown < 50 << 20


REASONS = {
    errno.EMFILE: (ReadError, "Too many open files; close other files or raise the limit"),
    errno.ENFILE: (ReadError, "Too many open files in system"),
    errno.ENOMEM: (ReadError, "Cannot allocate memory"),
    errno.EIO: (ReadError, "Input/output error"),
    errno.EACCES: (CheckpointError, "Permission denied"),
    errno.ELOOP: (CheckpointError, "Too many levels of symbolic links"),
    errno.ENAMETOOLONG: (CheckpointError, "File name too long"),
    errno.ENOTDIR: (CheckpointError, "Not a directory"),
    errno.ENXIO: (CheckpointError, "No such device or address; it is a socket or a device, not a file"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("number", REASONS)
def test_what_the_system_reports_is_named_for_what_it_is(
    number: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (kind, reason) = save(tmp_path / f"model{suffix}", {"a.weight": KERNEL}), REASONS[number]
    opened = os.open

    def refuse(name: Any, *arguments: Any, **more: Any) -> int:
        if Path(os.fsdecode(name)) == path:
            raise OSError(number, os.strerror(number), str(path))
        return opened(name, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConvsimError, match=re.escape(reason)) as caught:
        open_checkpoint(path)
    assert type(caught.value) is kind
    assert "damaged" not in str(caught.value)


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix, name in ((".pt", "load"), (".safetensors", "empty")):
        for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")):
            path = save(tmp_path / f"model{suffix}", {"a.weight": KERNEL})
            with monkeypatch.context() as patch, pytest.raises(ReadError, match="not enough memory to read it; free"):

                def fail(*_: object, error: Exception = error, **__: object) -> Any:
                    raise error

                patch.setattr(torch, name, fail)
                open_checkpoint(path).load("a.weight")


def test_too_little_memory_to_compute_is_said(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model.pt", {"a.weight": KERNEL})

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 1 byte"
        )

    monkeypatch.setattr(torch, "randn", fail)
    outcome = convsim("measure", path)
    assert outcome.code == 1
    assert outcome.error.startswith("convsim: error: not enough memory (")


def test_an_archive_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"a.weight": KERNEL})
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/0", archive.read("model/data/0"))
    with pytest.raises(
        CheckpointError, match=r"model\.pt: damaged \(model/data/0 appears twice in it\); fetch it again"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("size", [0, 2**40, 2**64 - 1])
def test_a_forged_size_of_a_storage_in_a_stream_is_damage(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": KERNEL}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert whole.count(struct.pack("<Q", KERNEL.numel())) == 1
    path.write_bytes(whole.replace(struct.pack("<Q", KERNEL.numel()), struct.pack("<Q", size)))
    with pytest.raises(CheckpointError, match=r"model\.pt: damaged"):
        open_checkpoint(path)


def test_paths_that_lead_nowhere_are_named_with_exit_code_2(tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "dangling.pt").symlink_to("gone.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "file").write_text("x")
    expected = {
        "dangling.pt": "dangling.pt: a link to gone.pt, which does not exist",
        "loop.pt": "Too many levels of symbolic links",
        "file/model.pt": "Not a directory",
        "n" * 300: "File name too long",
        "n" * 5000: "File name too long",
    }
    for name, reason in expected.items():
        for command in ("measure", "init"):
            outcome = convsim(command, f"{tmp_path}/{name}")
            assert (outcome.code, reason in outcome.error) == (2, True), outcome.err
            assert len(outcome.error) < 700
    path = save(tmp_path / "model.pt", {"a.weight": KERNEL})
    for name, reason in expected.items():
        for source in (("--arch", "cnn:4"), (path,)):
            outcome = convsim("init", *source, "-o", f"{tmp_path}/{name.removesuffix('.pt')}.pt")
            assert outcome.code == 2, outcome.err
            assert re.search(f"is a broken link|does not exist|{reason}", outcome.error)


def test_a_folder_without_search_permission_is_named_with_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "closed" / "model.pt"
    path.parent.mkdir()
    save(path, {"a.weight": KERNEL})
    path.parent.chmod(0)
    tmp_path.parent.parent.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    tmp_path.chmod(0o755)
    try:
        for kind, said in call_in_fork(without_rights, path):
            assert kind == "CheckpointError", said
            assert re.search(r"closed.*\(Permission denied\)", said)
    finally:
        path.parent.chmod(0o755)


def without_rights(path: Path) -> list[tuple[str, str]]:
    """What reading a file, and saving beside it, raise for a user who is not the superuser."""
    from convsim_cli.checkpoint_init import init_checkpoint

    if os.geteuid() == 0:
        os.setuid(65534)
    found = []
    for call in (
        lambda: open_checkpoint(path),
        lambda: open_checkpoint(path.parent),
        lambda: init_checkpoint(path),
        lambda: init_checkpoint(None, path, arch="cnn:4"),
    ):
        try:
            call()
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    assert len(found) == 4
    return found


def test_a_read_only_file_system_is_named_without_advising_force(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": KERNEL})
    found = os.statvfs(path)
    read_only = os.statvfs_result((*found[:8], found.f_flag | os.ST_RDONLY, found.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    outcome = convsim("init", path)
    assert outcome.code == 2
    assert "is on a read-only file system; save elsewhere with --output" in outcome.error
    assert "--force" not in outcome.error


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_hard_linked_file_is_shared_and_requires_force(suffix: str, tmp_path: Path, convsim: Convsim) -> None:
    path = save(tmp_path / f"model{suffix}", {"a.weight": KERNEL})
    other = tmp_path / "elsewhere.copy"
    other.hardlink_to(path)
    outcome = convsim("init", path, "--iterations", 1)
    assert outcome.code == 2
    assert f"{path} has 2 hard links, of which only this one would be changed" in outcome.error
    before = other.read_bytes()
    assert path.read_bytes() == before
    assert convsim("init", path, "--iterations", 1, "--force").code == 0
    assert other.read_bytes() == before
    assert convsim("init", path, "--iterations", 1).code == 0


def test_a_backup_that_is_a_hard_link_is_no_reason_to_refuse(tmp_path: Path, convsim: Convsim) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": KERNEL})
    path.with_name("model.safetensors.bak").hardlink_to(path)
    assert convsim("init", path, "--iterations", 1).code == 0
    assert torch.equal(load_file(path.with_name("model.safetensors.bak"))["a.weight"], KERNEL)


def test_extended_attributes_stay_with_a_file(tmp_path: Path, convsim: Convsim) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": KERNEL})
    try:
        os.setxattr(path, "user.origin", b"zoo")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    assert convsim("init", path, "--iterations", 1).code == 0
    assert os.getxattr(path, "user.origin") == b"zoo"


def test_an_index_with_a_name_twice_is_refused(tmp_path: Path, convsim: Convsim) -> None:
    save(tmp_path / "a.safetensors", {"a.weight": KERNEL})
    save(tmp_path / "b.safetensors", {"a.weight": KERNEL})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "a.safetensors", "a.weight": "b.safetensors"}}')
    outcome = convsim("measure", index)
    assert outcome.code == 2
    assert "'a.weight' appears twice" in outcome.error


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.pt"])
def test_a_sparse_file_is_not_read_into_memory_to_explain_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"PK\x03\x04" if name == "model.pt" else b"{")
        file.seek(20 << 30)
        file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, (1 << 32) - 2, 100, 0))
    said, grown, _ = call_in_fork(peak_of, path)
    assert "damaged or cut short (a zip" in said if name == "model.pt" else "an index of 2147483" in said
    assert grown < 50 << 20


def test_no_file_of_the_users_is_deleted_or_waited_for(tmp_path: Path, convsim: Convsim) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": KERNEL})
    (tmp_path / ".convsim-notes.tmp").write_text("mine")
    (tmp_path / ".convsim-backup.tmp").mkdir()
    (tmp_path / ".convsim-backup.tmp" / "notes").write_text("mine")
    os.mkfifo(tmp_path / ".convsim-x.tmp")
    os.mkfifo(tmp_path / f".convsim-{'0' * 16}.tmp")
    before = {entry.name for entry in tmp_path.iterdir()}
    assert convsim("init", path, "--iterations", 1).code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == before | {"model.safetensors.bak"}
    assert (tmp_path / ".convsim-backup.tmp" / "notes").read_text() == "mine"
