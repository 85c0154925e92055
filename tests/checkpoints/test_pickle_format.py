"""Pickles of real training code: what is harmless is read and saved as it was, all else is named with a way out."""

from __future__ import annotations

import importlib
import io
import mmap
import os
import pickle
import shlex
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PosixPath
from time import process_time
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from conftest import Convsim
from safetensors.torch import save_file
from torch import nn

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError
from convsim_cli.networks.architectures import build_network

KERNEL = torch.randn(4, 3, 3, 3)
HARMLESS: dict[str, Any] = {
    "built-in values": [frozenset([1]), range(3), slice(1, None), b"", b"a", 1j, {1, 2}],
    "namespace": Namespace(lr=0.1, betas=(0.9, 0.99), out=PosixPath("/runs/a"), nested=Namespace(a=[1])),
    "path": PosixPath("runs") / "a b",
    "scalars": [np.float64(0.3), np.float32(1.5), np.int64(-7), np.bool_(True), np.str_("é"), np.float16("nan")],
    "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), ">i4")), np.zeros(0), np.array(3.0)],
    "random state": np.random.RandomState(3).get_state(),
    "defaultdict": defaultdict(list, {"loss": [1.0, np.float64(2.0)], 3: []}),
    "nested defaultdict": {"a": defaultdict(dict, {1: defaultdict(float, {2: 0.5})}), "b": defaultdict(None, {1: 2})},
}


def same(a: Any, b: Any) -> bool:
    """Whether two objects are of one type and content throughout."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, defaultdict):
        return a.default_factory is b.default_factory and same(dict(a), dict(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if isinstance(a, Namespace) else bool(a == b)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_objects_beside_tensors_are_read_and_saved_as_they_were(
    kind: str, zipped: bool, tmp_path: Path
) -> None:
    path, content = tmp_path / "model.pt", {"state_dict": {"a.weight": KERNEL}, "other": HARMLESS[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    before = torch.load(path, weights_only=False)
    init_checkpoint(path, iterations=1)
    saved = torch.load(path, weights_only=False)
    assert same(saved["other"], before["other"])
    assert not torch.equal(saved["state_dict"]["a.weight"], KERNEL)
    assert open_checkpoint(path).tensors


def test_the_globals_that_a_user_has_allowed_stay_allowed(tmp_path: Path) -> None:
    torch.save({"a.weight": KERNEL, "args": Namespace()}, tmp_path / "model.pt")
    with torch.serialization.safe_globals([Namespace]):
        allowed = set(torch.serialization.get_safe_globals())
        open_checkpoint(tmp_path / "model.pt")
        assert set(torch.serialization.get_safe_globals()) == allowed


class Forged:
    """Pickles as a call of something harmless with arguments that it never has."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


SCALAR, DTYPE = np.float64(1).__reduce__()[0], np.dtype("f8")  # type: ignore[index]
FORGED = {
    "object dtype": lambda: np.array([object], dtype=object)[:0],
    "structured dtype": lambda: np.zeros(2, dtype=[("a", "f4")]),
    "dates": lambda: np.datetime64("2020-01-01"),
    "a forged dtype": lambda: Forged(np.dtype, "O8", False, True),
    "a dtype that is no text": lambda: Forged(np.dtype, 3),
    "too few bytes": lambda: Forged(SCALAR, DTYPE, b"1234"),
    "a factory that is called": lambda: Forged(defaultdict, print),
    "a factory with arguments": lambda: Forged(defaultdict, partial(print, "pwned")),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_only_looks_harmless_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": KERNEL, "other": FORGED[kind]()}, path)
    with pytest.raises(CheckpointError, match=r"plain data|not known to be harmless") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "python -c" not in str(caught.value)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


NOTHING, POINTERS = b")\x81", b"c_codecs\nencode\n" + text("A" * 8) + text("latin1") + b"\x86R"
OBJECTS = (  # a numpy.dtype of pointers, made of an argparse.Namespace whose class is set afterwards
    b"cargparse\nNamespace\n" + NOTHING + b"}(" + text("code") + text("O8") + text("order") + text("|") + b"u"
    b"}" + text("__class__") + b"cnumpy\ndtype\ns\x86b"
)
POINTED = (
    b"}(" + text("data") + POINTERS + text("shape") + b"K\x01\x85" + text("fortran") + b"\x89" + text("dtype") + OBJECTS
)
DISGUISED = {
    "scalar": b"cnumpy.core.multiarray\nscalar\n" + NOTHING + POINTED + b"ub",
    "array": b"cargparse\nNamespace\n" + NOTHING + POINTED + b"u}" + text("__class__") + b"cnumpy\nndarray\ns\x86b",
    "dtype": OBJECTS,
    "empty scalar": b"cnumpy.core.multiarray\nscalar\n" + NOTHING,
    "empty array": b"cnumpy\nndarray\n" + NOTHING,
    "empty dtype": b"cnumpy\ndtype\n" + NOTHING,
    "factory": b"ccollections\nOrderedDict\n)R}" + text("_convsim_factory") + b"c_codecs\nencode\nsb",
}


def save_beside_kernel(path: Path, other: bytes) -> Path:
    """Save a kernel and what these opcodes make."""
    made = io.BytesIO()
    torch.save({"a.weight": KERNEL, "other": 7}, made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(b"K\x07", other) if name.endswith(".pkl") else content)
    return path


@pytest.mark.parametrize("kind", DISGUISED)
def test_a_disguised_stand_in_reaches_no_numpy_and_is_refused_in_one_line(
    kind: str, tmp_path: Path, convsim: Convsim
) -> None:
    path = save_beside_kernel(tmp_path / "model.pt", DISGUISED[kind])
    before = path.read_bytes()
    outcome = convsim("init", path, "--iterations", 1)
    assert outcome.code == 2, outcome.err
    assert "is not plain data" in outcome.error
    assert path.read_bytes() == before


def with_attribute(made: Any, name: str) -> Any:
    """An object with an attribute that may hide what its class has of that name."""
    vars(made)[name] = 3
    return made


@pytest.mark.parametrize("name", ["detach", "numel", "is_floating_point"])
def test_an_attribute_that_hides_a_tensor_s_method_is_data(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(OrderedDict({"a.weight": with_attribute(KERNEL.clone(), name)}), path)
    init_checkpoint(path, method="dct", no_backup=True)
    assert not torch.equal(open_checkpoint(path).load("a.weight"), KERNEL)
    assert getattr(torch.load(path, weights_only=True)["a.weight"], name) == 3


UNSAVABLE = {
    "lists within lists": b"]" * 3000 + b"a" * 2999,
    "a dictionary with an attribute items": b"ccollections\nOrderedDict\n)R}" + text("items") + b"cbuiltins\nint\nsb",
}


@pytest.mark.parametrize("kind", UNSAVABLE)
def test_what_loads_but_cannot_be_saved_is_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    path = save_beside_kernel(tmp_path / "model.pt", UNSAVABLE[kind])
    before, layers = path.read_bytes(), iter([("a.weight", KERNEL)])
    with pytest.raises(CheckpointError, match=r"model\.pt: holds what cannot be saved again \(.*\); save model"):
        open_checkpoint(path).write(path, layers)
    assert list(layers)
    assert path.read_bytes() == before


def test_a_dictionary_under_a_key_that_is_no_text_or_number_is_kept(tmp_path: Path) -> None:
    inner = {"b.weight": KERNEL.clone()}
    torch.save({"a.weight": KERNEL, with_attribute(torch.ones(2), "dim"): inner, 7: inner}, tmp_path / "model.pt")
    assert "others under 7 (" in open_checkpoint(tmp_path / "model.pt").notes[0]


MINE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
"""


@pytest.fixture
def pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What people save: each is refused, for another reason."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("mine").Net()
    yield {
        "module": net,
        "model": {"model": net, "epoch": 3, "loss": np.float64(0.1)},
        "ema": {"epoch": 3, "ema": {"module": net}, "optimizer": torch.optim.Adam(net.parameters())},
        "object": {"state_dict": OrderedDict(net.state_dict()), "config": partial(print)},
    }
    sys.modules.pop("mine")


@pytest.mark.parametrize("kind", ["module", "model", "ema", "object"])
def test_objects_of_unknown_classes_are_named_and_no_command_loads_them(
    kind: str, tmp_path: Path, pickles: dict[str, Any]
) -> None:
    torch.save(pickles[kind], tmp_path / "my model's.pth")
    with pytest.raises(CheckpointError, match="loading it would run ") as caught:
        open_checkpoint(tmp_path / "my model's.pth")
    said = str(caught.value)
    assert ("functools.partial" if kind == "object" else "mine.Net") in said
    assert "ask its author for a weights-only file" in said
    assert "python -c" not in said


def run_command(message: str) -> None:
    """Run the command that ends a message as a shell would, in this process."""
    name, option, script, *arguments = shlex.split(message[message.index("python -c") :])
    assert (name, option) == ("python", "-c")
    former, sys.argv = sys.argv, ["-c", *arguments]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(script, {})
    finally:
        sys.argv = former


@pytest.mark.slow
def test_the_command_survives_a_real_shell(tmp_path: Path) -> None:
    path = tmp_path / 'my model\'s $HOME `x` "y".pth'
    torch.save({"a.weight": KERNEL}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    command = str(caught.value)[str(caught.value).index("python -c") :]
    script = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n{command}'
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    assert torch.equal(open_checkpoint(path.with_suffix(".converted.pt")).load("a.weight"), KERNEL)


def test_a_cuda_tensor_is_converted_where_there_is_no_cuda(tmp_path: Path) -> None:
    path, options = tmp_path / "model.pt", {"pickle_protocol": 3, "_use_new_zipfile_serialization": False}
    torch.save({"state_dict": {"a.weight": KERNEL}, "f": b"bytes"}, path, **options)
    path.write_bytes(path.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    run_command(str(caught.value))
    assert torch.equal(open_checkpoint(tmp_path / "model.converted.pt").load("a.weight"), KERNEL)


@pytest.mark.parametrize("protocol", [4, 5])
def test_the_command_imports_nothing_but_what_was_found(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": KERNEL}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    torch.save({"a.weight": KERNEL, "b": Forged(os.mkdir, str(tmp_path / "run"))}, path, pickle_protocol=protocol)
    with pytest.raises(SystemExit, match="mkdir"):
        run_command(str(caught.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_of_arrays_is_converted_by_the_command(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "zoo.pkl"
    content = {"model": {"conv1_w": KERNEL.numpy(), "names": ["a"]}, "blobs": [KERNEL.numpy(), np.float32(1)]}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"zoo\.pkl: a plain pickle \(of numpy arrays\)") as caught:
        open_checkpoint(path)
    assert "damaged" not in str(caught.value)
    assert "run code" not in str(caught.value)
    run_command(str(caught.value))
    assert torch.equal(open_checkpoint(tmp_path / "zoo.converted.pt").load("conv1_w"), KERNEL)


def test_a_plain_pickle_of_tensors_is_not_converted_as_it_holds_pickles(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a.weight": KERNEL}))
    with pytest.raises(CheckpointError, match=r"would run torch\.storage\._load_from_bytes, not known") as caught:
        open_checkpoint(tmp_path / "a.pkl")
    assert "python -c" not in str(caught.value)


def test_a_newer_pickle_protocol_is_not_called_damage(tmp_path: Path) -> None:
    torch.save({"a.weight": KERNEL}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"pickled in a way that torch\.load does not read safely") as caught:
        open_checkpoint(tmp_path / "a.pt")
    run_command(str(caught.value))
    assert torch.equal(open_checkpoint(tmp_path / "a.converted.pt").load("a.weight"), KERNEL)


def test_programs_are_named_and_no_command_loads_them(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), tmp_path / "exported.pt2")
        torch.jit.save(torch.jit.script(net), tmp_path / "script.pt")
    for name, what in {"exported.pt2": "a torch.export archive", "script.pt": "a TorchScript program"}.items():
        with pytest.raises(CheckpointError, match=f"{name}: {what}, which runs code when it is loaded; ask") as caught:
            open_checkpoint(tmp_path / name)
        assert "python -c" not in str(caught.value)


def test_an_archive_of_arrays_is_converted_by_the_command(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", weight=KERNEL.numpy())
    with pytest.raises(CheckpointError, match=r"arrays\.npz: a NumPy archive") as caught:
        open_checkpoint(tmp_path / "arrays.npz")
    run_command(str(caught.value))
    assert open_checkpoint(tmp_path / "arrays.converted.pt").tensors["weight"].shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (b"GGUF", "a GGUF file"), (b"\x1f\x8b\x08", "a gzip archive")],
)
def test_files_of_other_kinds_are_named(start: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=f"{what}.*, not a checkpoint"):
        open_checkpoint(tmp_path / "model.h5")


def test_a_nested_tensor_beside_kernels_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a.weight": KERNEL, "b.weight": nested}, path)
    assert [layer["name"] for layer in init_checkpoint(path, method="dct", no_backup=True).layers] == ["a.weight"]
    assert torch.load(path, weights_only=True)["b.weight"].is_nested


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path, convsim: Convsim) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: a pipe or a device; save its output to a file first" in convsim("measure", tmp_path / "pipe").error


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_no_file_is_mapped_into_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("mapped")

    path = tmp_path / name
    torch.save({"a.weight": KERNEL}, path) if name.endswith("pt") else save_file({"a.weight": KERNEL}, path)
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    assert torch.equal(open_checkpoint(path).load("a.weight"), KERNEL)
    init_checkpoint(path, iterations=1)
    assert not torch.equal(open_checkpoint(path).load("a.weight"), KERNEL)


def containers() -> dict[str, tuple[Any, str]]:
    """Content of a file, and the key under which its state dict is."""
    state = {"conv.weight": KERNEL}
    moments = {"state": {0: {"exp_avg": KERNEL.clone(), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "a list": ([state], "0"),
        "a tuple": ((state, {"lr": 0.1}), "0"),
        "a list in a dictionary": ({"models": [state], "epoch": 3}, "models.0"),
        "a number among the keys": ({"net": state, 3: "three"}, "net"),
        "a number as the key": ({7: {"weights": state}}, "7.weights"),
        "a number among the names": ({"conv.weight": KERNEL, 3: torch.zeros(2)}, ""),
        "moments under another name": ({"net": state, "opt": moments}, "net"),
    }


@pytest.mark.parametrize("kind", containers())
def test_state_dicts_are_found_in_every_container(kind: str, tmp_path: Path) -> None:
    content, key = containers()[kind]
    path = tmp_path / "model.pt"
    torch.save(content, path)
    checkpoint = open_checkpoint(path, key or None)
    assert list(checkpoint.tensors) == list(open_checkpoint(path).tensors) == ["conv.weight"]
    assert not open_checkpoint(path).notes
    checkpoint.write(path, [("conv.weight", torch.zeros(4, 3, 3, 3))])
    saved, _ = torch.load(path, weights_only=True), content
    kernels = [tensor for tensor in tensors_of(saved) if tensor.shape == KERNEL.shape]
    assert [bool(tensor.any()) for tensor in kernels] == ([False, True] if "moments" in kind else [False])
    assert type(saved) is type(content)


def tensors_of(node: Any) -> list[torch.Tensor]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else []
    return [node] if isinstance(node, torch.Tensor) else [found for child in children for found in tensors_of(child)]


def test_a_state_dict_under_thousands_of_keys_is_judged_once(tmp_path: Path) -> None:
    state = {f"n{number}": torch.zeros(1) for number in range(2000)}
    torch.save([state] * 30_000, tmp_path / "model.pt")
    start = process_time()
    open_checkpoint(tmp_path / "model.pt")
    assert process_time() - start < 3


def test_a_sparse_kernel_is_listed_as_skipped(tmp_path: Path, convsim: Convsim) -> None:
    kernels = {name: torch.randn(4, 3, 3, 3) for name in ("a.weight", "b.weight")}
    torch.save({**kernels, "b.weight": kernels["b.weight"].to_sparse()}, tmp_path / "m.pt")
    document = convsim("measure", tmp_path / "m.pt", "--samples", 1, "--json").document
    assert [layer["name"] for layer in document["layers"]] == ["a.weight"]
    assert [(entry["name"], entry["reason"][:6]) for entry in document["skipped"]] == [("b.weight", "sparse")]


def test_a_sparse_kernel_of_a_network_is_named(tmp_path: Path, convsim: Convsim) -> None:
    state = build_network("cnn:4").state_dict()
    kernel = next(iter(state))
    torch.save({**state, kernel: state[kernel].to_sparse()}, tmp_path / "m.pt")
    outcome = convsim("measure", tmp_path / "m.pt", "--arch", "cnn:4", "--samples", 1)
    assert outcome.code == 2
    assert f"{kernel} is sparse; save it dense" in outcome.error
