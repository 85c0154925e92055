"""What the advice about a file that is not loaded names, and what it never proposes: nothing here is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pytest
import torch

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.checkpoints.pickle_globals import COMPUTED, LongPickleError, PickleGlobals, TornPickleError
from convsim_cli.errors import CheckpointError

KERNEL = torch.ones(4, 3, 3, 3)
RUNS_CODE = ("weights_only", "pickle.load", "torch.load", "jit.load", "export.load", "python -c", "can be imported")


class Call:
    """Pickles as a call, here never made."""

    def __init__(self, call: Any, *arguments: Any, state: Any = None) -> None:
        self.call, self.arguments, self.state = call, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments, self.state


def raw(pickled: bytes) -> bytes:
    return pickled


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")
    return file.getvalue()


def legacy(pickled: bytes) -> bytes:
    """The stream of an older torch.save, with another object in it."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, 2) for part in start) + pickled + pickle.dumps([], 2)


KINDS = {"raw": raw, "zip": zipped, "legacy": legacy}


def said_of(content: bytes, folder: Path, name: str = "model.pt") -> str:
    """What is said of a file, in one printable line."""
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder / name)
    said = str(caught.value)
    assert said.isprintable()
    return said


def assert_runs_nothing(said: str, *names: str) -> None:
    """The globals are named, the consequence is said, and no command is proposed."""
    assert "loading it would run " in said
    assert "not known to be harmless" in said
    assert "ask its author for a weights-only file" in said
    assert not [word for word in RUNS_CODE if word in said]
    assert not [name for name in names if name not in said]


def python_2(name: str, protocol: int) -> str:
    return name.replace("builtins", "__builtin__") if protocol < 3 else name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("call", "name"), [(eval, "builtins.eval"), (os.system, "posix.system")])
def test_advice_names_what_would_run_and_proposes_no_command(
    kind: str, protocol: int, call: Any, name: str, tmp_path: Path
) -> None:
    content = {"a.weight": np.ones((4, 3, 3, 3)), "epoch": Call(call, "print('run')")}
    said = said_of(KINDS[kind](pickle.dumps(content, protocol)), tmp_path)
    assert_runs_nothing(said, python_2(name, protocol))
    assert "Unsupported" not in said


HIDDEN: dict[str, Callable[[int], bytes]] = {
    "in a state": lambda protocol: pickle.dumps(Call(dict, state={"a": Call(eval, "1")}), protocol),
    "in a tuple": lambda protocol: pickle.dumps(((Call(eval, "1"), 2), 3), protocol),
    "in the memo": lambda protocol: pickle.dumps([eval, eval, Call(eval, "1")], protocol),
    "among many others": lambda protocol: pickle.dumps([*"abc", dict, set, Call(eval, "1"), [1] * 5000], protocol),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.parametrize("kind", ["raw", "zip"])
def test_a_payload_is_found_wherever_it_hides(kind: str, where: str, protocol: int, tmp_path: Path) -> None:
    said = said_of(KINDS[kind](HIDDEN[where](protocol)), tmp_path)
    assert_runs_nothing(said, python_2("builtins.eval", protocol))


@pytest.mark.parametrize("second", [pickle.dumps(Call(eval, "1"), 4), b"cbuiltins\neval\n."])
def test_a_second_pickle_of_a_raw_file_is_listed_too(second: bytes, tmp_path: Path) -> None:
    assert_runs_nothing(said_of(pickle.dumps({"a": np.ones(3)}, 4) + second, tmp_path), "builtins.eval")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


EVAL = text("builtins") + text("eval")
BY_HAND: dict[str, tuple[bytes, str]] = {
    "INST": (b"\x80\x02(S'1'\nibuiltins\neval\n.", "builtins.eval"),
    "OBJ": (b"\x80\x02(cbuiltins\neval\nS'1'\no.", "builtins.eval"),
    "EXT1": (b"\x80\x02\x82\x07)R.", "copyreg extension 7"),
    "EXT2": (b"\x80\x02\x83\x07\x01)R.", "copyreg extension 263"),
    "EXT4": (b"\x80\x02\x84\x07\x01\x00\x00)R.", "copyreg extension 263"),
    "memoized texts": (
        b"\x80\x04" + text("builtins") + b"\x940" + text("eval") + b"\x940h\x00h\x01\x93.",
        "builtins.eval",
    ),
    "texts by number": (
        b"\x80\x04" + text("builtins") + b"q\x090" + text("eval") + b"p8\n0j\x09\0\0\0g8\n\x93.",
        "builtins.eval",
    ),
    "texts put anew": (b"\x80\x04" + text("set") + b"q\x000" + EVAL + b"q\x000h\x00\x93.", "builtins.eval"),
    "a text between": (b"\x80\x04" + text("builtins") + text("set") + b"0" + text("eval") + b"\x93.", "builtins.eval"),
    "marks between": (b"\x80\x04" + EVAL + b"(" + text("set") + b"1\x93.", "builtins.eval"),
    "a mark that is popped": (b"\x80\x04" + EVAL + b"(0\x93.", "builtins.eval"),
    "old texts": (b"\x80\x04S'builtins'\nU\x04eval\x93.", "builtins.eval"),
    "lines of text": (b"\x80\x04Vbuiltins\nVev\\u0061l\n\x93.", "builtins.eval"),
    "long texts": (b"\x80\x04X\x08\0\0\0builtins\x8d\x04\0\0\0\0\0\0\0eval\x93.", "builtins.eval"),
    "a text that is doubled": (b"\x80\x04" + text("eval") + b"2\x93.", "eval.eval"),
    "no text": (b"\x80\x04" + text("builtins") + text("e") + b"\x85\x93.", COMPUTED),
    "a text nowhere": (b"\x80\x04" + text("builtins") + b"h\x05\x93.", COMPUTED),
    "a text of bytes": (b"\x80\x04" + text("builtins") + b"C\x04eval\x93.", COMPUTED),
    "a text too long": (b"\x80\x04" + text("builtins") + b"X\x00\x04\0\0" + b"a" * 1024 + b"\x93.", COMPUTED),
    "an escape": (b"\x80\x02ccollections\nOrdered\\x44ict\n.", "collections.Ordered"),
    "attributes of a class": (
        b"\x80\x02ctorch\nTensor\n(uN}X\x01\0\0\0ac_codecs\nencode\ns\x86b.",
        "changes to torch.Tensor",
    ),
    "cut after it": (b"\x80\x02cposix\nsystem\n(X\x07\0\0\0abc", "posix.system"),
    "garbage after it": (b"\x80\x02cposix\nsystem\n\xff\xff", "posix.system"),
    "a nested pickle": (pickle.dumps({"a": KERNEL}), "torch.storage._load_from_bytes"),
}


@pytest.mark.parametrize("how", BY_HAND)
@pytest.mark.parametrize("kind", ["raw", "zip"])
def test_every_opcode_that_reaches_a_global_is_followed(kind: str, how: str, tmp_path: Path) -> None:
    content, name = BY_HAND[how]
    assert_runs_nothing(said_of(KINDS[kind](content), tmp_path), name)


@pytest.mark.parametrize("how", [how for how in BY_HAND if BY_HAND[how][1] == "builtins.eval" and how != "OBJ"])
def test_the_pickles_made_by_hand_are_what_the_unpickler_reads(how: str) -> None:
    asked = []

    class Seen(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.append(f"{module}.{name}")
            return lambda *_: None

    Seen(io.BytesIO(BY_HAND[how][0])).load()
    assert asked == ["builtins.eval"]


def test_the_globals_of_real_pickles_are_those_that_the_unpickler_asks_for() -> None:
    content = {"a": np.ones(3), "b": np.float32(1), "c": {1, 2}, "d": Path("/x"), "e": b"abc", "f": KERNEL}
    for protocol in range(6):
        asked = set()

        class Seen(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                asked.add(f"{module}.{name}")  # noqa: B023
                return super().find_class(module, name)

        pickled = pickle.dumps(content, protocol)
        Seen(io.BytesIO(pickled)).load()
        found = PickleGlobals()
        found.read(io.BytesIO(pickled))
        assert (found.names, found.protocol) == (asked, protocol if protocol > 1 else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a\x1b[2J\x1b]0;owned\x07", "é\u202e", "x" * 400, "x" * 2000, "a b", '$(id)`id`"'])
def test_hostile_names_are_escaped_and_shortened(kind: str, name: str, tmp_path: Path) -> None:
    said = said_of(KINDS[kind](b"\x80\x02cos\n" + name.encode() + b"\n)R."), tmp_path)
    assert_runs_nothing(said, "os.")
    assert len(said) < 400 + len(str(tmp_path))
    assert said.isascii() or "…" in said


def test_names_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    assert_runs_nothing(said_of(b"\x80\x04" + text("os\nx") + text("a\r\nb") + b"\x93.", tmp_path), r"os\nx.a\r\nb")


def test_ten_thousand_globals_are_counted_and_three_are_named(tmp_path: Path) -> None:
    content = b"\x80\x02(" + b"".join(b"cmine\nf%05d\n" % number for number in reversed(range(10_000))) + b"l."
    start = perf_counter()
    said = said_of(content, tmp_path)
    assert perf_counter() - start < 5
    assert_runs_nothing(said, "run mine.f00000, mine.f00001, mine.f00002 and 9997 more, not known")


def test_a_zip_with_two_pickles_of_one_name_is_judged_by_both(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Call(eval, "1"), 4))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("model/data.pkl", pickle.dumps({}, 4))
        archive.writestr("model/DATA.PKL", pickle.dumps(Call(os.system, "1"), 4))
    assert_runs_nothing(said_of(file.getvalue(), tmp_path), "builtins.eval", "posix.system")


def test_a_pickle_of_gigabytes_is_listed_without_reading_its_arrays(tmp_path: Path) -> None:
    path, size = tmp_path / "zoo.pkl", 3 << 30
    with path.open("wb") as file:  # a sparse file: no gigabytes on the disk
        file.write(b"\x80\x04\x8e" + struct.pack("<Q", size))
        file.seek(size, os.SEEK_CUR)
        file.write(b"0cbuiltins\neval\n.")
    tracemalloc.start()
    start = perf_counter()
    with path.open("rb") as file:
        found = PickleGlobals()
        found.read(file)
    assert found.names == {"builtins.eval"}
    assert perf_counter() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("piece", [b"}", b"}\x94", b"(", b"\x8c\x40" + b"x" * 64, b"cmine\nf\n"])
def test_endless_pickles_are_given_up_in_bounded_time(piece: bytes) -> None:
    file = io.BytesIO(b"\x80\x04" + piece * (5_000_000 // len(piece)))
    start = process_time()
    with pytest.raises(LongPickleError):
        PickleGlobals().read(file)
    assert process_time() - start < 20


@pytest.mark.slow
def test_a_pickle_too_long_to_list_gets_no_command(tmp_path: Path) -> None:
    said = said_of(b"\x80\x04]\x94" + b"0}" * 700_000 + b".", tmp_path)
    assert "too long to list the globals in it; ask its author" in said
    assert "python -c" not in said


def test_a_zip_whose_pickle_expands_is_not_expanded(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\x80\x04" + b"}0" * (40 << 20) + b"}.")
    said = said_of(file.getvalue(), tmp_path)
    assert "a zip archive whose entries are compressed" in said
    assert "python -c" not in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"0.",
        b"\x85.",
        b"t.",
        b"pX\n.",
        b"gX\n.",
        b"\x8b\xff\xff\xff\xff.",
        b"cos\n",
        b"\xff",
    ],
)
def test_torn_pickles_are_called_torn(content: bytes) -> None:
    with pytest.raises(TornPickleError):
        PickleGlobals().read(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["script", "exported"])
def test_programs_are_named_and_no_command_loads_them(kind: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))
        archive.writestr("model/constants.pkl" if kind == "script" else "model/archive_format", b"pt2")
    said = said_of(file.getvalue(), tmp_path)
    assert "which runs code when it is loaded; ask its author" in said
    assert not [word for word in RUNS_CODE if word in said]


def test_a_tar_of_an_early_torch_is_named_without_a_command(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old", "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    said = said_of((tmp_path / "old").read_bytes(), tmp_path)
    assert "a tar archive" in said
    assert not [word for word in RUNS_CODE if word in said]


def test_the_names_in_an_archive_do_not_steer_a_terminal(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("\x1b[2J", b"")
    assert r"it holds \x1b[2J" in said_of(file.getvalue(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", ["out of memory", "not enough memory"])
def test_a_global_that_is_named_like_an_error_is_one_that_would_run(words: str, kind: str, tmp_path: Path) -> None:
    assert_runs_nothing(said_of(KINDS[kind](b"\x80\x02c" + words.encode() + b"\nsystem\n)R."), tmp_path), words)


def test_torchs_own_advice_to_load_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    said = said_of(zipped(b"\x80\x02}K\x01a."), tmp_path)  # appends to a dictionary, which torch refuses
    assert "pickled in a way that torch.load does not read safely; ask its author" in said
    assert not [word for word in RUNS_CODE if word in said.replace("torch.load does not", "")]


LONG_TEXT = "".join(map(chr, range(0x100, 0x100 + 250)))


def calls(function: str, text: str, argument: bytes, count: int = 3) -> bytes:
    """A pickle of a list of calls that all take one text from the memo."""
    module, name = function.rsplit(".", 1)
    data = text.encode()
    start = b"\x80\x02]" + f"c{module}\n{name}\n".encode() + b"q\x01" + b"0"
    start += b"X" + len(data).to_bytes(4, "little") + data + b"q\x02" + b"0"
    return start + b"".join(b"h\x01h\x02" + argument + b"Ra" for _ in range(count)) + b"."


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        ("builtins.set", b"\x85"),
        ("collections.Counter", b"\x85"),
        ("_codecs.encode", b"X\x06\x00\x00\x00latin1\x86"),
        ("_codecs.encode", b"X\x08\x00\x00\x00punycode\x86"),
    ],
)
def test_a_text_of_the_memo_is_multiplied_by_no_call(function: str, argument: bytes) -> None:
    found = PickleGlobals()
    found.read(io.BytesIO(calls(function, LONG_TEXT, argument)))
    assert found.refused == f"a call of {function} that makes more than the file holds"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_plain_data_of_every_protocol_makes_no_more_than_it_holds(protocol: int) -> None:
    value = [{"a", "b"}, Counter("aab"), b"x" * 600, bytearray(b"y" * 600), bytearray(b"ab"), b"ab", b""]
    value += [PosixPath("/data/set"), OrderedDict(a=1), frozenset("ab"), torch.Size([3, 4])]
    found = PickleGlobals()
    found.read(io.BytesIO(pickle.dumps([*value, *value], protocol)))
    assert found.refused is None
