"""Open files to read, explain why one is not a checkpoint, and how to convert it. Only damage is called damage.

Also here: how the files of checkpoints are named, and which checkpoint a folder holds if there is only one candidate.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shlex
import struct
import tarfile
import weakref
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from convsim_cli.checkpoints.pickle_globals import (
    MISFIT,
    LongPickleError,
    PickleGlobals,
    RefusedError,
    TornPickleError,
    harmless_names,
)
from convsim_cli.errors import CheckpointError, IrregularFileError, ReadError, is_out_of_memory, open_regular, quoted

_ADVICE = {  # what to do about an error of the system
    errno.EMFILE: "; close other files or raise the limit of this process (ulimit -n)",
    errno.ENFILE: "; close files in other programs",
    errno.ENOMEM: "; free memory and try again",
    errno.ELOOP: "; its links lead to each other",
    errno.ENXIO: "; it is a socket or a device, not a file",
}
_OF_THE_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR),
    errno.ENXIO,
)

_SIGNATURES = (  # how files of other kinds begin, and what they are
    (b"version https://git-lfs", "a git-LFS pointer (run git lfs pull)"),
    (b"\x89HDF", "an HDF5 file (of Keras, for instance)"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive (unpack it)"),
    (b"7z\xbc\xaf", "a 7-Zip archive (unpack it)"),
    (b"\xfd7zXZ", "an xz archive (unpack it)"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive (unpack it)"),
    (b"Rar!", "a RAR archive (unpack it)"),
)
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how the stream of an older torch.save begins, after its protocol
_LEGACY_PICKLES = 5  # that it begins with: magic number, protocol, system, content and the keys of its storages
_MEMBERS = 16  # of a tar archive that are looked at
_ZIP_END = struct.Struct("<10xH4xL2x")  # number of entries, and where they begin
_ZIP_ENTRY = struct.Struct("<10xH8xLLHHH8xL")  # method, sizes, lengths of what follows, and the entry's place
_LONGEST_LOADED = 50_000_000  # opcodes and bytes of text that torch, at a few microseconds each, is let to load
_LARGEST = 1 << 26  # bytes of the pickles in an archive
_SHOWN = 3  # globals that a message names
_WIDEST, _WIDEST_CALL = 60, 120  # characters of a name in it, and of a call
_LONGEST_PATH = 300  # characters of a path that the system refuses

_ONLY = (  # an unpickler that imports only what was found in the file, and was known to be harmless
    "import sys, pickle, torch; known = '{names}'.split(); Only = type('Only', (pickle.Unpickler,), {{'find_class': "
    "lambda self, *name: pickle.Unpickler.find_class(self, *name) if '.'.join(name) in known else sys.exit(name)}}); "
)
_FROM_TORCH = _ONLY + (
    "only = type('only', (), {{'Unpickler': Only, 'load': staticmethod(lambda *a, **k: Only(*a, **k).load())}}); "
    "torch.save(torch.load(sys.argv[1], map_location='cpu', pickle_module=only, weights_only=False), sys.argv[2])"
)
_FROM_ARRAYS = _ONLY + (
    "number = lambda v: getattr(getattr(v, 'dtype', v), 'kind', '') in [*'biufc']; "
    "plain = lambda x: {{str(k): plain(v) for k, v in (x.items() if isinstance(x, dict) else enumerate(x)) if "
    "isinstance(v, (dict, list, tuple)) or number(v)}} if isinstance(x, (dict, list, tuple)) else torch.as_tensor(x); "
    "torch.save(plain(Only(open(sys.argv[1], 'rb'), encoding='latin1').load()), sys.argv[2])"
)
_FROM_NPZ = (
    "import sys, numpy, torch; torch.save({k: torch.as_tensor(v) for k, v in "
    "numpy.load(sys.argv[1], allow_pickle=False).items()}, sys.argv[2])"
)
_FROM_NPY = (
    "import sys, numpy, torch; torch.save({'array': torch.as_tensor(numpy.load(sys.argv[1], allow_pickle=False))}, "
    "sys.argv[2])"
)
_ASK = (
    "ask its author for a weights-only file (safetensors, or model.state_dict() saved by torch.save); convert it "
    "yourself only if you trust its origin, in the environment it was made in"
)

_CHANGED = "another process changed it while it was read; try again when it is done"
_PROGRAMS = (  # what a zip is that runs code when it is loaded, by a name in it
    (r"/constants\.pkl$", "a TorchScript program"),
    (r"/archive_format$|serialized_exported_program\.json$", "a torch.export archive"),
)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise in one line what the system reports of a path: CheckpointError if the user can change it, or ReadError."""
    try:
        yield
    except FileNotFoundError as error:
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to {path.readlink()}, which does not exist") from error
        siblings = []
        with suppress(OSError):
            siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.name != path.name]
        close = get_close_matches(path.name, siblings, n=1)
        raise CheckpointError(f"{path}: no such file" + (f"; did you mean {close[0]}?" if close else "")) from error
    except IrregularFileError as error:
        raise CheckpointError(f"{path}: a pipe or a device; save its output to a file first") from error
    except OSError as error:
        kind = CheckpointError if error.errno in _OF_THE_PATH else ReadError
        reason = f"{os.strerror(error.errno) if error.errno else error}{_ADVICE.get(error.errno or 0, '')}"
        shown = str(path) if len(str(path)) <= _LONGEST_PATH else f"{str(path)[:_LONGEST_PATH]}…"
        raise kind(f"{shown}: cannot be read ({reason})") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ReadError(f"{path}: not enough memory to read it{_ADVICE[errno.ENOMEM]}") from error


class Source:
    """A regular file that is open to read, closed when nothing refers to it any more.

    All reads go to this open file, whatever happens to its name, and never through a memory map, which crashes the
    process if the file is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            self.file = open_regular(path)
        weakref.finalize(self, self.file.close)
        self.descriptor = self.file.fileno()
        self._state = self._read_state()
        self.size = self._state[2]

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """Yield the file, and raise CheckpointError if its content has changed since it was opened; see `explained`."""
        with explained(self.path):
            try:
                yield self.file
            except Exception as error:
                if self._state != self._read_state():
                    raise self._changed() from error
                raise
            if self._state != self._read_state():
                raise self._changed()

    def check_place(self) -> None:
        """Raise CheckpointError if another file has taken the name since this one was opened."""
        check_place(self.path, os.fstat(self.descriptor))

    def _read_state(self) -> tuple[int, int, int, int]:
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: {_CHANGED}")


def check_place(path: Path, opened: os.stat_result) -> None:
    """Raise CheckpointError if a path is not that of a file that was opened there. opened: its state."""
    try:
        found = path.stat()
    except OSError:
        found = None
    if found is None or not os.path.samestat(found, opened):
        raise CheckpointError(f"{path}: {_CHANGED}")


def describe_unknown(path: Path, start: bytes) -> str:
    """Describe a file that no format recognizes, from its first bytes."""
    if start.startswith(b"\x93NUMPY"):
        return f"a NumPy array without a name (convert it: {_command(_FROM_NPY, path)})"
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            return what
    if start[257:262] == b"ustar":
        return _describe_tar(path)
    if start.lstrip()[:1] == b"<":
        return "a web page (download the raw file instead)"
    return "an unknown kind of file"


def _describe_tar(path: Path) -> str:
    try:
        with tarfile.open(path, "r:") as archive:
            members = {member.name.removeprefix("./") for member, _ in zip(archive, range(_MEMBERS), strict=False)}
    except (tarfile.TarError, OSError):
        return "a tar archive that is damaged or cut short (fetch it again)"
    if {"storages", "tensors", "pickle"} <= members:
        return f"a tar archive that an early torch.save wrote ({_ASK})"
    return f"a tar archive (unpack it; it holds {', '.join(map(_shown, sorted(members)[:3])) or 'nothing'})"


def is_pickle(start: bytes) -> bool:
    """Return whether a file with these first bytes is a pickle, including text protocols 0 and 1."""
    return start.startswith((b"PK", b"\x80", b"(dp", b"(lp", b"}q", b"]q", b"ccollections\n", b"cnumpy"))


class DamagedError(ValueError):
    """An archive that torch must not load; the message is the whole reason."""


def check_pickle(file: BinaryIO) -> None:
    """Raise ValueError for a pickle or a zip archive of `torch.save` that takes more memory than the file's size.

    Torch would unpack compressed entries, make what a pickle asks for, and read beyond the end of a storage.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    found = PickleGlobals(_LONGEST_LOADED)
    sizes: dict[str, int] = {}
    if zipped:
        entries = list(_zip_entries(file, size))
        if any(entry.method or entry.packed != entry.size for entry in entries) or sum(e.size for e in entries) > size:
            raise DamagedError(
                "a zip archive whose entries are compressed, or larger than the file, which torch.save never writes; "
                f"{_ASK}"
            )
        [(twice, times)] = Counter(entry.name.lower() for entry in entries).most_common(1) or [("", 0)]
        if times > 1:
            raise DamagedError(f"damaged ({_shown(twice)} appears twice in it); fetch it again")
        for entry in entries:
            name = entry.name.lower()  # torch finds it in any case
            key = name.rpartition("/data/")[2]
            sizes[key] = min(sizes.get(key, entry.size), entry.size)
            if name.endswith("data.pkl"):
                found.read(io.BytesIO(_packed(file, entry)), 1)
    else:  # torch tells the older stream by the value of its first pickle, however that is spelled
        found.read(file, _LEGACY_PICKLES)
    if found.refused == MISFIT:
        raise DamagedError(f"damaged (it holds {MISFIT}); fetch it again")
    if found.refused:
        raise RefusedError(found.refused)
    for key, (elements, width) in found.storages.items() if zipped else ():
        held = sizes.get(key.lower(), 0)
        if elements * width > held:
            has = f"{held} bytes of storage {_shown(key)}, which has {elements * width}"
            raise DamagedError(f"damaged or cut short ({has}); fetch it again")
    if sum(prod(storage) for storage in found.storages.values()) > size:
        raise DamagedError("damaged or cut short (its storages are larger than the file); fetch it again")


class _ZipEntry(NamedTuple):
    name: str
    method: int
    packed: int
    size: int
    offset: int


def _zip_entries(file: BinaryIO, size: int) -> Iterator[_ZipEntry]:
    """Yield the entries of a zip archive, found as torch's reader finds them: Python's is stricter.

    Raises BadZipFile.
    """
    file.seek(max(0, size - (1 << 16) - _ZIP_END.size))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _ZIP_END.size + 4))
    if end < 0:
        raise zipfile.BadZipFile
    count, start = _ZIP_END.unpack_from(tail, end)
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        if (place := int.from_bytes(tail[end - 12 : end - 4], "little")) > size:
            raise zipfile.BadZipFile
        file.seek(place)
        large = file.read(56)
        if len(large) == 56 and large.startswith(b"PK\x06\x06"):
            count, start = struct.unpack_from("<Q8xQ", large, 32)
    file.seek(min(start, size))
    for _ in range(count):
        header = file.read(_ZIP_ENTRY.size)
        if len(header) < _ZIP_ENTRY.size or not header.startswith(b"PK\x01\x02"):
            raise zipfile.BadZipFile
        method, packed, full, *lengths, offset = _ZIP_ENTRY.unpack(header)
        name, extra, _ = (file.read(length) for length in lengths)
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<HH", extra)
            if kind == 1:  # the values that do not fit into 32 bits, in this order
                values = iter(struct.unpack_from(f"<{length // 8}Q", extra.ljust(4 + length, b"\0"), 4))
                full, packed, offset = (next(values, n) if n == 0xFFFFFFFF else n for n in (full, packed, offset))
            extra = extra[4 + length :]
        if offset > size:
            raise zipfile.BadZipFile
        yield _ZipEntry(name.decode("utf-8", "replace"), method, packed, full, offset)


def _packed(file: BinaryIO, entry: _ZipEntry) -> bytes:
    """Return the bytes of an entry as they are stored. Raises struct.error where the file ends before it."""
    file.seek(entry.offset + 26)
    lengths = struct.unpack("<HH", file.read(4))  # of a name and more, which may differ from those in the directory
    file.seek(sum(lengths), os.SEEK_CUR)
    return file.read(entry.packed)


def why_not_loaded(path: Path, file: BinaryIO, error: Exception) -> str:
    """Return why torch could not load a pickle or a zip archive, and what to do.

    Nothing that a file holds stands in a command, and a command loads only what is known to be harmless.
    """
    file.seek(0, os.SEEK_END)  # makes the buffer learn its place anew: torch has read beside it
    file.seek(0)
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"PK"):
        return _why_not_archive(path, file, error)
    found, of_torch = PickleGlobals(), _TORCH_MAGIC in start
    trouble: Exception | None = None
    try:
        found.read(file, _LEGACY_PICKLES if of_torch else None)
    except (TornPickleError, LongPickleError) as problem:
        trouble = problem
    return _why_not_pickle(path, error, found, trouble, of_torch)


def _why_not_archive(path: Path, file: BinaryIO, error: Exception) -> str:
    found = PickleGlobals()
    trouble: Exception | None = None
    try:
        entries = list(_zip_entries(file, file.seek(0, os.SEEK_END)))
        names = [entry.name for entry in entries]
        # a name may appear twice, and readers do not agree on which one counts: all are read
        pickles = [entry for entry in entries if entry.name.lower().endswith(".pkl")]
        if sum(max(entry.packed, entry.size) for entry in pickles) > _LARGEST:
            raise LongPickleError
        for entry in pickles:
            content = _packed(file, entry)
            if entry.method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size)
            elif entry.method != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile
            found.read(io.BytesIO(content))
    except (TornPickleError, LongPickleError) as problem:
        trouble = problem
    except (zipfile.BadZipFile, struct.error, zlib.error):
        return "damaged or cut short (a zip archive that cannot be unpacked); fetch it again"
    for pattern, what in _PROGRAMS:
        if any(re.search(pattern, name) for name in names):
            return f"{what}, which runs code when it is loaded; {_ASK}"
    files = (*PICKLES, *SAFETENSORS)
    inner = next((name for name in sorted(names, key="policy.pth".__ne__) if name.lower().endswith(files)), None)
    if inner and not any(name.endswith("/data.pkl") for name in names):
        return f"an archive with a checkpoint inside (as Stable-Baselines3 saves); unzip it and use {_shown(inner)}"
    if pickles:
        return _why_not_pickle(path, error, found, trouble, of_torch=True)
    if isinstance(error, DamagedError):
        return str(error)
    if any(name.endswith(".npy") for name in names):
        return f"a NumPy archive of arrays; convert it: {_command(_FROM_NPZ, path)}"
    if any(re.search(r"(^|/)model\.weights\.h5$", name) for name in names):
        return "a Keras archive"
    return f"a zip archive without a checkpoint (it holds {', '.join(map(_shown, names[:3])) or 'nothing'})"


def _why_not_pickle(
    path: Path, error: Exception, found: PickleGlobals, trouble: Exception | None, of_torch: bool
) -> str:
    harmless = harmless_names()
    unknown = []
    for name in sorted(found.names):
        module, _, attribute = name.rpartition(".")
        of_python_3 = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
        if not harmless.intersection((name, ".".join(of_python_3))):
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        return (
            f"loading it would run {', '.join(map(_shown, unknown[:_SHOWN]))}{more}, not known to be harmless; {_ASK}"
        )
    if isinstance(error, DamagedError):
        return str(error)
    if isinstance(trouble, LongPickleError):
        return f"loading it could run code: its pickle is too long to list the globals in it; {_ASK}"
    if isinstance(error, RefusedError):
        return f"holds {_shown(str(error), _WIDEST_CALL)}, which is not plain data; {_ASK}"
    if trouble:
        return "damaged or cut short (its pickle does not end); fetch it again"
    names = " ".join(sorted(found.names))
    if not of_torch and not any(name.startswith("numpy.") for name in found.names):
        return f"a plain pickle without arrays, not written by torch.save; {_ASK}"
    if not of_torch:
        return (
            "a plain pickle (of numpy arrays), not written by torch.save; if you trust where it came from, "
            f"convert it: {_command(_FROM_ARRAYS.format(names=names), path)}"
        )
    if found.protocol != 2 or "Unsupported operand" in str(error):
        return (
            f"pickled in a way that torch.load does not read safely (protocol {found.protocol}); if you trust where it "
            f"came from, convert it: {_command(_FROM_TORCH.format(names=names), path)}"
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"pickled in a way that torch.load does not read safely; {_ASK}"
    return f"damaged or cut short ({_shown(' '.join(str(error).split()), 120)}); fetch it again"


def _shown(text: str, widest: int = _WIDEST) -> str:
    """Return text from a file in plain characters, shortened: it must not control a terminal."""
    plain = text.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= widest else f"{plain[: widest - 1]}…"


def _command(script: str, path: Path) -> str:
    """Return a command that converts a file, to copy into a shell."""
    return f'python -c "{script}" {quoted(path)} {quoted(path.with_suffix(".converted.pt"))}'


_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # Hugging Face's names; a variant such as fp16 comes last
SAFETENSORS, PICKLES = (".safetensors",), (".pt", ".pth", ".th", ".bin", ".ckpt")  # suffixes
_BACKUP = re.compile(r"\.bak(\.\d+)?$")
_DIGEST = re.compile(r"[0-9a-f]{30,128}")  # how a store names a file; some use the first two digits as the folder
MERGE_ZERO = (
    "if you trust where they came from, merge them with the zero_to_fp32.py of DeepSpeed's own package, not with one "
    "that lies beside them, and use its output"
)
_OF_DISTRIBUTED = {  # what a .metadata holds besides plain data, if it is one of tensors alone
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
    ),
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
}
_LISTED = 6  # names in an error, at most


def is_index(path: Path) -> bool:
    """Return whether a file is named like an index of shards."""
    return _INDEX.search(path.name) is not None


def is_backup(name: str) -> bool:
    """Return whether a file is named like a backup."""
    return _BACKUP.search(name) is not None


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file is named like one of a checkpoint, behind a store's link too, or like its backup."""
    name = _BACKUP.sub("", name)
    suffixed = name.lower().endswith((*SAFETENSORS, *PICKLES)) or is_index(Path(name))
    return "/" not in name and (suffixed or _DIGEST.fullmatch(name) is not None)


def describe_distributed(folder: Path) -> str:
    """Describe a folder of `.distcp` files, and how to convert it if that runs no code that they hold.

    Torch loads `.metadata` and everything but tensors as plain pickles.
    """
    found = PickleGlobals()
    try:
        with open_regular(folder / ".metadata") as file:
            found.read(file)
    except (OSError, TornPickleError):
        return "a distributed checkpoint whose .metadata is missing or damaged; fetch it again"
    except LongPickleError:
        found.names.add("more than can be listed")
    unknown = sorted(found.names - harmless_names() - _OF_DISTRIBUTED)
    if unknown or found.refused:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        what = f"{', '.join(map(_shown, unknown[:_SHOWN]))}{more}" if unknown else _shown(str(found.refused))
        return f"a distributed checkpoint; converting it would load {what}, not known to be harmless; {_ASK}"
    target = shlex.quote(f"{folder.resolve()}.pt")
    return (
        "a distributed checkpoint; convert it: "
        f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted(folder)} {target}"
    )


def checkpoint_in(folder: Path, suffixes: Sequence[str]) -> Path:
    """Return the only index of shards in a folder, or without an index its only checkpoint file.

    suffixes: of checkpoint files. Raises CheckpointError that names what was found instead.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if any(path.suffix == ".distcp" for path in files):
        raise CheckpointError(f"{folder}: {describe_distributed(folder)}")
    found = [path for path in files if is_index(path)] or [p for p in files if p.name.lower().endswith(tuple(suffixes))]
    if len(found) == 1:
        return found[0]
    if not found and any(path.name == "zero_to_fp32.py" for path in files):
        raise CheckpointError(f"{folder}: a folder of DeepSpeed's shards; {MERGE_ZERO}")
    names = ", ".join(path.name for path in found[:_LISTED]) + (", …" if len(found) > _LISTED else "")
    holds = f"a folder with {len(found)} checkpoints ({names})" if found else "a folder without a checkpoint"
    raise CheckpointError(f"{folder}: {holds}; choose a checkpoint file")
