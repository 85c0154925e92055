from __future__ import annotations

import json
import os
import struct
import warnings
from collections import OrderedDict
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from conftest import Convsim, same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.checkpoints.formats import StateDict, open_checkpoint
from convsim_cli.checkpoints.pickle_format import _shared_memory
from convsim_cli.errors import CheckpointError, ConvsimWarning, InputError
from convsim_cli.networks.architectures import build_network

DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
)


def state_dict() -> dict[str, Tensor]:
    odd = {f"buffer.{dtype}": torch.ones(3, dtype=dtype) for dtype in DTYPES}
    return {"conv.weight": torch.randn(8, 3, 3, 3), "scalar": torch.tensor(7), "empty": torch.zeros(0, 4), **odd}


def rewrite(source: Path, target: Path, name: str) -> Tensor:
    """Replace one tensor of a checkpoint by twos, and return the twos."""
    checkpoint = open_checkpoint(source)
    twos = torch.full_like(checkpoint.load(name), 2)
    checkpoint.write(target, [(name, twos)], {"convsim.version": "test"})
    return twos


def test_safetensors_keep_every_other_byte_and_their_metadata(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state_dict(), path, {"format": "pt", "author": "ü", "convsim.version": "old"})
    twos = rewrite(path, out, "conv.weight")
    before, after = load_file(path), load_file(out)
    assert same_bits(before | {"conv.weight": twos}, after)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "author": "ü", "convsim.version": "test"}


def test_layers_of_a_safetensors_file_come_in_their_natural_order(tmp_path: Path) -> None:
    save_file(
        {name: torch.zeros(1) for name in ("layer10.a", "layer2.b", "layer2.a", "9.a", "stem")},
        tmp_path / "a.safetensors",
    )
    tensors = open_checkpoint(tmp_path / "a.safetensors").tensors
    assert list(tensors) == ["9.a", "layer2.a", "layer2.b", "layer10.a", "stem"]


def test_rewriting_a_mapped_file_leaves_mapped_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state_dict(), path)
    mapped = load_file(path)["conv.weight"]
    copy = mapped.clone()
    twos = rewrite(path, path, "conv.weight")
    assert torch.equal(mapped, copy)
    assert torch.equal(load_file(path)["conv.weight"], twos)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_keep_format_structure_sharing_and_every_other_tensor(tmp_path: Path, zipped: bool) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "b.pth"
    known = {name: tensor for name, tensor in state_dict().items() if zipped or "float8" not in name}
    weights = OrderedDict((f"module.{name}", tensor) for name, tensor in known.items())
    weights["module.tied"] = weights["module.conv.weight"]
    weights._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    optimizer = {"state": {0: {"exp_avg": torch.randn(8, 3, 3, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": optimizer}, path, _use_new_zipfile_serialization=zipped)
    before = torch.load(path, weights_only=True)
    assert open_checkpoint(path).unfit == {"module.tied": "shared with module.conv.weight"}
    twos = rewrite(path, out, "module.conv.weight")
    after = torch.load(out, weights_only=True)
    before["state_dict"]["module.conv.weight"].copy_(twos)
    assert same_bits(before, after)
    changed = after["state_dict"]
    assert changed["module.tied"].data_ptr() == changed["module.conv.weight"].data_ptr()
    assert out.read_bytes()[:2] == path.read_bytes()[:2]


def test_nested_state_dicts_are_found_and_a_choice_between_several_is_said(tmp_path: Path) -> None:
    weights = {"conv.weight": torch.randn(8, 3, 3, 3)}
    torch.save({"ema": weights, "nested": {"state_dict": weights}}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["conv.weight"]
    [note] = checkpoint.notes
    assert "loaded the tensors under nested.state_dict" in note
    assert "ema" in note


def test_a_state_dict_with_kernels_goes_before_one_with_other_tensors(tmp_path: Path) -> None:
    weights = {"conv.weight": torch.randn(8, 3, 3, 3)}
    endless: dict[str, Any] = {"mean_image": torch.zeros(3, 32, 32), "model_ema": weights}
    endless["itself"] = endless
    torch.save(endless, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").tensors) == ["conv.weight"]


def test_kernels_that_share_memory_cannot_be_changed_alone(tmp_path: Path) -> None:
    whole = torch.randn(8, 3, 3, 3)
    expanded = torch.randn(1, 3, 3, 3).expand(4, 3, 3, 3)
    sparse = torch.eye(4).to_sparse()
    torch.save({"all": whole, "half": whole[:4], "other": whole[4:], "wide": expanded, "s": sparse}, tmp_path / "a.pt")
    unfit = open_checkpoint(tmp_path / "a.pt").unfit
    assert set(unfit) == {"half", "other", "wide"}
    assert unfit["half"] == "shared with all"
    assert "expanded" in unfit["wide"]


@pytest.mark.parametrize("strides", [(1000, 100, 1, 1), (0, 1000, 3, 1), (9, 3, 3, 1)])
def test_a_kernel_that_overlaps_itself_is_skipped(strides: tuple[int, ...], tmp_path: Path) -> None:
    overlapping = torch.randn(9000).as_strided((8, 8, 3, 3), strides)
    sliced = torch.randn(16, 16, 3, 5)[::2, ::2, :, :3].transpose(0, 1)
    torch.save({"0.weight": torch.randn(4, 8, 3, 3), "b": overlapping, "c": sliced}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").unfit) == ["b"]


def test_with_a_network_too_a_kernel_that_overlaps_itself_is_skipped(tmp_path: Path) -> None:
    state = build_network("cnn:4").state_dict()
    name = next(name for name, tensor in state.items() if tensor.shape[:2] == (4, 4))
    state[name] = torch.randn(1000).as_strided((4, 4, 3, 3), (100, 10, 1, 1))
    torch.save(state, tmp_path / "a.pt")
    before = torch.load(tmp_path / "a.pt")[name]
    done = init_checkpoint(tmp_path / "a.pt", arch="cnn:4", method="dct", no_backup=True)
    assert [entry["name"] for entry in done.skipped] == [name]
    assert torch.equal(torch.load(tmp_path / "a.pt")[name], before)


def test_tensors_that_change_with_a_kernel_are_named(tmp_path: Path) -> None:
    path, kernel = tmp_path / "a.pt", torch.randn(8, 3, 3, 3)
    flat = torch.zeros(9)
    state = {"conv.weight": kernel, "tied.weight": kernel, "flat": kernel.view(8, 27), "other": flat[:4]}
    torch.save({"state_dict": state, "best": {"conv.weight": kernel}, "params": [kernel, flat]}, path)
    with pytest.warns(ConvsimWarning, match="changed with it: state_dict.flat, best.conv.weight, params.0$"):
        open_checkpoint(path, "state_dict").write(path, [("conv.weight", torch.ones_like(kernel))])
    saved = torch.load(path)
    assert saved["best"]["conv.weight"].data_ptr() == saved["state_dict"]["tied.weight"].data_ptr()


def test_empty_metadata_is_no_obstacle(tmp_path: Path) -> None:
    header = json.dumps(
        {"__metadata__": None, "a": {"dtype": "F32", "shape": [2, 1, 1, 1], "data_offsets": [0, 8]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "a").sum() == 4


def test_a_fresh_state_dict_is_saved_with_its_shared_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    for name in ("a.safetensors", "a.pt"):
        StateDict(tmp_path / name, {"a": weight, "b": weight}).write(tmp_path / name, ())
        loaded = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(loaded["a"], weight)
        assert torch.equal(loaded["b"], weight)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def zip_bytes(content: object, folder: Path) -> bytes:
    torch.save(content, folder / "made")
    return (folder / "made").read_bytes()


def script_bytes(folder: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), folder / "made")
    return (folder / "made").read_bytes()


def bad_files(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    pickled = zip_bytes({"a": torch.randn(4, 4, 3, 3)}, folder)
    save_file({"a": torch.randn(4, 4, 3, 3)}, folder / "made")
    safe = (folder / "made").read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    return {
        "empty": ("a.pt", b"", "an empty file"),
        "lfs": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
        "html": ("a.pth", b"<!DOCTYPE html><html></html>", "web page"),
        "text": ("a.ckpt", b"hello, this is no checkpoint", "unknown kind of file"),
        "pickle named safetensors": ("a.safetensors", pickled, "contains a pickle"),
        "truncated safetensors": ("a.safetensors", safe[:-9], "cut short"),
        "torn header": ("a.safetensors", safe[:30], "cut short"),
        "wrong offsets": ("a.safetensors", struct.pack("<Q", len(header)) + header + bytes(16), "damaged"),
        "truncated zip": ("a.pt", pickled[:-100], "cut short"),
        "truncated legacy": ("a.pt", b"\x80\x02", "cut short"),
        "objects": ("a.pt", zip_bytes({"a": Payload()}, folder), "loading it would run "),
        "whole module": ("a.pt", zip_bytes(torch.nn.Conv2d(3, 4, 3), folder), "conv.Conv2d, not known"),
        "script": ("a.pt", script_bytes(folder), "a TorchScript program"),
        "no tensors": ("a.pt", zip_bytes({"lr": 0.1}, folder), "no dictionary of named tensors"),
    }


BAD = (
    "empty",
    "lfs",
    "html",
    "text",
    "pickle named safetensors",
    "truncated safetensors",
    "torn header",
    "wrong offsets",
    "truncated zip",
    "truncated legacy",
    "objects",
    "whole module",
    "script",
    "no tensors",
)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line_that_says_what_was_found_and_run_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, said = bad_files(tmp_path)[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert not (tmp_path / "pwned").exists()


def test_a_missing_file_is_named_with_the_closest_sibling(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no such file; did you mean model\.safetensors"):
        open_checkpoint(tmp_path / "modle.safetensors")


def test_a_target_named_after_the_other_format_is_refused(tmp_path: Path) -> None:
    save_file(state_dict(), tmp_path / "a.safetensors")
    torch.save(state_dict(), tmp_path / "a.pt")
    for source, target in (("a.safetensors", "b.pt"), ("a.pt", "b.safetensors")):
        with pytest.raises(InputError, match="written back in its own format"):
            open_checkpoint(tmp_path / source).write(tmp_path / target, [])
        assert not (tmp_path / target).exists()


def test_the_key_chooses_a_dictionary_and_the_others_are_kept(tmp_path: Path) -> None:
    kernels = {name: torch.randn(4, 3, 3, 3) for name in ("plain", "ema")}
    whole = {
        "state_dict": {"a.weight": kernels["plain"]},
        "ema": {"shadow": {"a.weight": kernels["ema"]}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    }
    path = tmp_path / "model.pt"
    torch.save(whole, path)
    usual = open_checkpoint(path)
    [note] = usual.notes
    assert "loaded the tensors under state_dict; there are others under ema.shadow (choose with `key`)" in note
    chosen = open_checkpoint(path, "ema.shadow")
    assert torch.equal(chosen.load("a.weight"), kernels["ema"])
    assert not chosen.notes
    chosen.write(path, [("a.weight", torch.zeros(4, 3, 3, 3))], {})
    written = torch.load(path, weights_only=True)
    assert not written["ema"]["shadow"]["a.weight"].any()
    assert torch.equal(written["state_dict"]["a.weight"], kernels["plain"])
    assert torch.equal(written["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    with pytest.raises(CheckpointError, match=r"has no tensors under 'ema\.shadw': did you mean 'ema\.shadow'"):
        open_checkpoint(path, "ema.shadw")


def test_a_file_replaced_meanwhile_is_written_back_whole(tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    state = {"a.weight": torch.randn(4, 3, 3, 3), "b": torch.randn(5)}
    save_file(state, path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, other, {"note": "a header of another length"})
    checkpoint = open_checkpoint(path)
    other.replace(path)
    twos = torch.full_like(state["a.weight"], 2)
    checkpoint.write(path, [("a.weight", twos)], {"convsim.version": "test"}, backup=True)
    found = load_file(path)
    assert torch.equal(found["a.weight"], twos)
    assert torch.equal(found["b"], state["b"])


def test_a_name_of_thousands_of_parts_is_refused_at_once(tmp_path: Path) -> None:
    save_file({"a." * 20_000 + "weight": torch.zeros(8, 8)}, tmp_path / "m.safetensors")
    start = process_time()
    with pytest.raises(CheckpointError, match="a name with 20,000 dots"):
        open_checkpoint(tmp_path / "m.safetensors")
    assert process_time() - start < 2


def test_thousands_of_kernels_in_one_storage_are_told_apart_in_time() -> None:
    values, count = torch.zeros(40_000), 20_000
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    state = {f"{n}.weight": values[n : n + 1].view(1, 1, 1) for n in order}
    state["shared.weight"] = values[5:9].view(1, 1, 4)
    start = process_time()
    reasons = _shared_memory(state)
    assert process_time() - start < 4
    assert list(reasons) == ["shared.weight"]


class Counted(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.kernels, self.classes = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 1}

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.classes(self.kernels(images).mean((2, 3)))
        return found


def test_what_a_network_keeps_beside_tensors_is_written_or_refused(tmp_path: Path, convsim: Convsim) -> None:
    new = ("init", "--arch", f"{__name__}:Counted", "--iterations", 1, "-o")
    assert convsim(*new, tmp_path / "m.pt").code == 0
    assert torch.load(tmp_path / "m.pt")["_extra_state"] == {"epoch": 1}
    assert "cannot hold _extra_state" in convsim(*new, tmp_path / "m.safetensors").error
    assert convsim("measure", tmp_path / "m.pt", "--arch", f"{__name__}:Counted").code == 0


def test_a_statistic_of_a_type_that_torch_lacks_is_no_hindrance(tmp_path: Path, convsim: Convsim) -> None:
    header = {"a.weight": {"dtype": "F32", "shape": [4, 3, 3, 3], "data_offsets": [0, 432]}}
    header |= {"b.running_mean": {"dtype": "F4", "shape": [4], "data_offsets": [432, 434]}}
    text = json.dumps(header).encode()
    data = torch.randn(108).numpy().tobytes() + b"ab"
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert convsim("init", tmp_path / "m.safetensors", "--iterations", 1).code == 0
    assert (tmp_path / "m.safetensors").read_bytes().endswith(b"ab")
