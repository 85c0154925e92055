"""Malformed, hostile and malicious files: one line that names the file, whatever is in it, and nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import Convsim
from forks import call_in_fork
from safetensors.torch import save

from convsim_cli.checkpoints.base import Checkpoint
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError, ConvsimError
from convsim_cli.kernels import file_kernels
from convsim_cli.networks.load import looks_trained

WHOLE = save({"a.weight": torch.randn(4, 3, 3, 3), "b.bias": torch.randn(4)}, {"format": "pt"})
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def read_all(path: Path) -> Checkpoint:
    """All that `init` and `measure` read of a file."""
    checkpoint = open_checkpoint(path)
    file_kernels(checkpoint.tensors, None, checkpoint.unfit)
    looks_trained(checkpoint)
    for name in checkpoint.tensors:
        checkpoint.load(name)
    return checkpoint


def made(header: bytes | dict[str, Any], data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


MALFORMED = {
    "nothing but a length": struct.pack("<Q", 20),
    "header longer than the file": made({"a": ENTRY}, length=10_000),
    "header of a length beyond all": made({"a": ENTRY}, length=2**63),
    "header of no length": struct.pack("<Q", 0) + b"{" + bytes(20),
    "header that is no JSON": made(b'{"a": {"dtype": '),
    "header that is not an object": made(b"[1, 2, 3]"),
    "header that is no UTF-8": made(b'{"\xff\xfe": 1}'),
    "entry that is no object": made({"a": 3}),
    "entry without a shape": made({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "unknown dtype": made({"a": {**ENTRY, "dtype": "F33"}}),
    "negative shape": made({"a": {**ENTRY, "shape": [-2, -2]}}),
    "shape that overflows": made({"a": {**ENTRY, "shape": [2**40, 2**40]}}),
    "shape that does not fit its bytes": made({"a": {**ENTRY, "shape": [3, 3]}}),
    "offsets beyond the file": made({"a": {**ENTRY, "data_offsets": [16, 32]}}),
    "offsets in the wrong order": made({"a": {**ENTRY, "data_offsets": [16, 0]}}),
    "tensors that overlap": made({"a": ENTRY, "b": ENTRY}),
    "a hole between tensors": made({"a": ENTRY, "b": {**ENTRY, "data_offsets": [24, 40]}}, bytes(40)),
    "bytes after the last tensor": made({"a": ENTRY}, bytes(99)),
    "data cut short": made({"a": ENTRY}, bytes(9)),
    "the same name twice": made(
        b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}"
    ),
    "the same name twice, the first of another shape": made(
        b'{"a": ' + json.dumps({**ENTRY, "shape": [4, 1]}).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}"
    ),
    "a field twice": made(b'{"a": {"dtype": "F32", "shape": [2, 2], "shape": [2, 2], "data_offsets": [0, 16]}}'),
    "a number of 5,000 digits": made(
        b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "x": ' + b"1" * 5000 + b"}}"
    ),
    "half a character in a name": made({"a\ud800": ENTRY}),
    "half a character in the metadata": made({"__metadata__": {"a": "\udfff"}, "a": ENTRY}),
    "metadata that is not text": made({"__metadata__": {"a": 3}, "a": ENTRY}),
    "braces within braces": made(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no tensor at all": made({}, b""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_safetensors_file_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    try:
        read_all(path)
    except ConvsimError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert name == "no tensor at all", "was taken for a good file"


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def growth(path: Path) -> tuple[str, int]:
    """Return whether a file is read or refused, and by how much the process grows over a small file's reading."""
    small = path.with_name("small.safetensors")
    small.write_bytes(WHOLE)
    read_all(small)
    before = peak()
    try:
        read_all(path)
    except ConvsimError as error:
        assert str(path) in str(error)
        return "refused", peak() - before
    return "read", peak() - before


MOST = 100_000_000  # bytes of a header, by the format's definition
ONE = json.dumps({"a": ENTRY}).encode()


@pytest.mark.parametrize(
    ("header", "length", "expected", "copies"),
    [
        ("spaces", MOST - 1_000_000, "read", 2.25),
        ("one text", MOST - 1_000_000, "read", 3.25 if sys.version_info >= (3, 11) else 4.25),  # json copies once more
        ("spaces", MOST + 1_000_000, "refused", 0.1),
        ("one text", MOST + 1_000_000, "refused", 0.1),
    ],
)
def test_a_header_takes_a_few_times_its_size_in_memory(
    header: str, length: int, expected: str, copies: float, tmp_path: Path
) -> None:
    """In a process of its own, whose peak is no other's. Beyond it the file itself, which is mapped, is counted."""
    path = tmp_path / "model.safetensors"
    start, end = (ONE, b"") if header == "spaces" else (b'{"__metadata__": {"text": "', b'"}, ' + ONE[1:])
    fill = b" " * (length - len(start) - len(end))
    path.write_bytes(struct.pack("<Q", length) + start + fill + end + bytes(16))
    found, grown = call_in_fork(growth, path)
    assert found == expected
    assert grown < copies * length


def test_a_damaged_header_is_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(made(b'{"a": [' + b"[], " * 1000 + b"[]]}"))
    monkeypatch.setattr(json, "dumps", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ConvsimError, match="'a' has the unknown dtype"):
        open_checkpoint(path)


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """A file with one to four accidents: bytes changed, cut out, doubled, put in, or the end missing."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(min(len(data), chance.choice([16, 300, 10**9])) or 1)
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + chance.randint(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + chance.randint(1, 40)]
        elif kind == 3:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 9)))
        else:
            del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def assert_read_or_refused(whole: bytes, path: Path, seeds: range) -> None:
    """Read a file with accidents, one seed after the other: what is refused is refused in one line."""
    for seed in seeds:
        path.write_bytes(mutated(whole, random.Random(seed)))
        try:
            read_all(path)
        except ConvsimError as error:
            assert "\n" not in str(error), seed


def test_mutated_safetensors_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    assert_read_or_refused(WHOLE, tmp_path / "model.safetensors", cases(2000))


@pytest.mark.parametrize("zipped", [True, False])
def test_mutated_pickles_are_read_or_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"a.weight": torch.randn(4, 3, 3, 3)}}, path, _use_new_zipfile_serialization=zipped)
    assert_read_or_refused(path.read_bytes(), path, cases(300))


def test_a_zip_that_only_python_would_refuse_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.randn(4, 3, 3, 3)}, path)
    whole = bytearray(path.read_bytes())
    locator = whole.rindex(b"PK\x06\x07")  # of the zip64 directory: the number of its disk is next
    whole[locator + 4] = 1
    path.write_bytes(whole)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.is_zipfile(path)
    assert list(read_all(path).tensors) == ["a.weight"]


class Payload:
    """What a malicious pickle does on being loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize(
    "kind", ["plain.pt", "zip.pt", "legacy.pt", "named.safetensors", "zip.safetensors", "deep.ckpt"]
)
def test_a_malicious_pickle_is_never_executed(kind: str, tmp_path: Path) -> None:
    witness, path = tmp_path / "executed", tmp_path / kind
    payload = {"state_dict": {"a.weight": torch.randn(4, 3, 3, 3)}, "epoch": Payload(witness)}
    if kind.startswith("zip") or kind.startswith("deep"):
        torch.save({"outer": {"inner": payload}} if kind.startswith("deep") else payload, path)
    elif kind.startswith("legacy"):
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError):
        read_all(path)
    assert not witness.exists()
    torch.load(path, weights_only=False) if not kind.endswith("safetensors") and kind != "plain.pt" else None
    assert witness.exists() or kind.endswith("safetensors") or kind == "plain.pt"  # the payload does what it says


def test_a_zip_with_a_payload_in_place_of_its_pickle_is_never_executed(tmp_path: Path) -> None:
    witness, path = tmp_path / "executed", tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(witness)))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError):
        read_all(path)
    assert not witness.exists()


def test_a_pickle_of_a_whole_module_is_refused_with_its_classes_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Conv2d(3, 4, 3), path)
    with pytest.raises(CheckpointError, match=r"loading it would run torch\.nn\.modules\.conv\.Conv2d"):
        read_all(path)


def test_dictionaries_that_hold_themselves_are_read_at_once(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pt", {"a.weight": torch.randn(4, 3, 3, 3)}
    itself: dict[str, Any] = dict(weights)
    itself |= {f"key{number}": itself for number in range(12)}
    tower: dict[str, Any] = weights
    for _ in range(7):
        tower = {f"key{number}": tower for number in range(12)}
    for content, more in ((itself, 3), (tower, 2)):
        torch.save(content, path)
        checkpoint = read_all(path)
        assert list(checkpoint.tensors) == ["a.weight"]
        [note] = checkpoint.notes
        assert f" and {more} more (choose with `key`)" in note
        assert note.count(",") == 8


@pytest.mark.parametrize("name", ["1" * 5000 + ".weight", "0" * 5000 + "7", "layer" + "9" * 5000])
def test_names_of_thousands_of_digits_are_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({name: torch.randn(4, 3, 3, 3), "layer1": torch.zeros(1)}))
    assert sorted(read_all(path).tensors) == sorted([name, "layer1"])


def test_a_tensor_without_values_is_named(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.empty(4, 3, 3, 3, device="meta")}, path)
    outcome = convsim("measure", path)
    assert outcome.code == 2
    assert f"{path}: a.weight has a shape but no values" in outcome.error


def test_a_running_mean_expanded_beyond_all_memory_is_no_obstacle(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.pt"
    state = {"a.weight": torch.randn(4, 3, 3, 3), "bn.running_mean": torch.ones(1).expand(10**13)}
    torch.save(state, path)
    assert convsim("init", path, "--iterations", 1).code == 0


def test_a_large_tensor_named_like_a_statistic_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = tmp_path / "model.safetensors", 1 << 26
    path.write_bytes(made({"bn.running_mean": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b""))
    os.truncate(path, path.stat().st_size + size)
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(type(checkpoint), "load", lambda *_: pytest.fail("read"))
    assert not looks_trained(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int8, torch.bfloat16])
def test_statistics_of_any_type_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for value in (0, 1):
        path.write_bytes(save({"bn.num_batches_tracked": torch.tensor([0, value]).to(dtype)}))
        assert looks_trained(open_checkpoint(path)) == bool(value)
