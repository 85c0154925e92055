"""What a file is that cannot be loaded as a checkpoint, and how to convert it. Only damage is called damage."""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import shlex
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SIGNATURES = (  # how files of other kinds begin, and what they are
    (b"version https://git-lfs", "a git-LFS pointer (run git lfs pull)"),
    (b"\x89HDF", "an HDF5 file (of Keras, for instance)"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
    (b"\xfd7zXZ", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
)
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how the stream of an older torch.save begins, after its protocol
_PLAIN = r"(numpy|builtins|__builtin__|collections|copy_reg|copyreg|_codecs)(\.|$)"  # modules in a pickle of arrays

_FROM_TORCH = (
    "import sys, torch; plain = lambda x: plain(x.state_dict()) if hasattr(x, 'state_dict') else "
    "{str(k): plain(v) for k, v in x.items() if isinstance(v, (dict, torch.Tensor)) or hasattr(v, 'state_dict')} "
    "if isinstance(x, dict) else x; "
    "torch.save(plain(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])"
)
_FROM_ARRAYS = (
    "import sys, pickle, torch; number = lambda v: isinstance(v, torch.Tensor) or "
    "getattr(getattr(v, 'dtype', v), 'kind', '') in [*'biufc']; "
    "plain = lambda x: {str(k): plain(v) for k, v in (x.items() if isinstance(x, dict) else enumerate(x)) if "
    "isinstance(v, (dict, list, tuple)) or number(v)} if isinstance(x, (dict, list, tuple)) else torch.as_tensor(x); "
    "torch.save(plain(pickle.load(open(sys.argv[1], 'rb'), encoding='latin1')), sys.argv[2])"
)
_FROM_EXPORT = "import sys, torch; torch.save(dict(torch.export.load(sys.argv[1]).state_dict), sys.argv[2])"
_FROM_NPZ = (
    "import sys, numpy, torch; "
    "torch.save({k: torch.as_tensor(v) for k, v in numpy.load(sys.argv[1]).items()}, sys.argv[2])"
)
_FROM_SCRIPT = "import sys, torch; torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), sys.argv[2])"

_ARCHIVES = (  # what a zip without a pickle is, by a name in it, and what converts it
    (r"/archive_format$|serialized_exported_program\.json$", "a torch.export archive, not a state dict", _FROM_EXPORT),
    (r"\.npy$", "a NumPy archive of arrays", _FROM_NPZ),
    (r"(^|/)model\.weights\.h5$", "a Keras archive", None),
)


def describe_unknown(start: bytes) -> str:
    """Return what a file is that begins so, where no format recognizes it."""
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            return what
    if start.lstrip()[:1] == b"<":
        return "a web page (download the raw file instead)"
    return "an unknown kind of file"


def is_pickle(start: bytes) -> bool:
    """Return whether a file that begins so is a pickle, also one of the text protocols 0 and 1."""
    return start.startswith((b"PK", b"\x80", b"(dp", b"(lp", b"}q", b"]q", b"ccollections\n", b"cnumpy"))


def why_not_loaded(path: Path, error: Exception) -> str:
    """Return why torch could not load a pickle or a zip archive, and what to do."""
    message = " ".join(str(error).split())
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(0)
        if start.startswith(b"PK"):
            return _why_not_archive(path, message)
        if _TORCH_MAGIC in start:
            return _why_not_torch(path, message, _globals_in(file, pickles=4))  # magic, version, system and content
        found = _globals_in(file)
    return _damage(message) if found is None else _why_not_plain(path, found)


def can_be_mapped(path: Path) -> bool:
    """Return whether a file can be mapped into memory: some network and FUSE file systems refuse."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            return True
    except (OSError, ValueError):
        return False


def _why_not_archive(path: Path, message: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            content = next((name for name in names if name.endswith("/data.pkl")), None)
            found = _globals_in(io.BytesIO(archive.read(content))) if content else None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, zlib.error):
        return _damage(message)
    if any(name.endswith("/constants.pkl") for name in names):
        return f"a TorchScript program, not a state dict; convert it: {_command(_FROM_SCRIPT, path)}"
    if content:
        return _why_not_torch(path, message, found)
    for pattern, what, script in _ARCHIVES:
        if any(re.search(pattern, name) for name in names):
            return what + (f"; convert it: {_command(script, path)}" if script else "")
    return f"a zip archive without a checkpoint (it holds {', '.join(names[:3]) or 'nothing'})"


def _why_not_plain(path: Path, found: set[str]) -> str:
    others = sorted(name for name in found if not re.match(_PLAIN, name))
    what = "torch tensors" if others and others[0].startswith("torch.") else others[0] if others else "numpy arrays"
    return (
        f"a plain pickle (of {what}), which is not how torch.save writes; if you trust where it came from, convert it: "
        f"{_command(_FROM_ARRAYS, path)}"
    )


def _why_not_torch(path: Path, message: str, found: set[str] | None) -> str:
    refused = re.search(r"GLOBAL (\S+)", message)
    if not refused and found is None:
        return _damage(message)
    if not refused:
        reason = re.search(r"Unsupported \w+ \w+", message)
        return (
            f"is pickled in a way that torch.load does not read safely ({reason[0] if reason else message[:120]}); if "
            f"you trust where it came from, convert it: {_command(_FROM_TORCH, path)}"
        )
    package = refused[1].split(".")[0]
    known = package in ("torch", "numpy", "collections", "builtins") or "." not in refused[1]
    return (
        f"holds Python objects beside tensors ({refused[1]}), which could run code, and is not loaded; if you trust "
        f"where it came from{'' if known else f' and its package {package} can be imported'}, convert it: "
        f"{_command(_FROM_TORCH, path)}"
    )


def _damage(message: str) -> str:
    return f"damaged or cut short ({message[:120]}); fetch it again"


def _command(script: str, path: Path) -> str:
    """Return a command that converts a file, to copy into a shell."""
    return f'python -c "{script}" {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix(".converted.pt")))}'


def _globals_in(file: BinaryIO, pickles: int = 1) -> set[str] | None:
    """Return the names that pickles refer to, without loading them; None where they do not parse to their ends."""
    try:
        return {name for _ in range(pickles) for name in _globals(pickletools.genops(file))}
    except Exception:  # whatever a torn pickle makes the parser raise
        return None


def _globals(operations: Iterator[tuple[Any, Any, int | None]]) -> Iterator[str]:
    strings: list[str] = []  # in the order in which they are put on the stack
    memo: dict[int, object] = {}
    last: object = None
    for opcode, argument, _ in operations:
        if opcode.name == "GLOBAL":
            yield argument.replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        else:
            last = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET") else argument
            if isinstance(last, str):
                strings.append(last)
