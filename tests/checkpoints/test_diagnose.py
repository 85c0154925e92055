"""What a file is that no format reads, and the way to one that can be read."""

from __future__ import annotations

import gzip
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from torch.distributed import checkpoint as distributed

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError

DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def archive(path: Path, names: list[str]) -> Path:
    content = path.with_name("content")
    content.write_bytes(b"x")
    with tarfile.open(path, "w") as file:
        for name in names:
            file.add(content, name)
    return path


def test_the_tar_of_an_early_torch_is_told_from_other_tars(tmp_path: Path) -> None:
    early = refusal(archive(tmp_path / "a.pth", ["sys_info", "pickle", "tensors", "storages"]))
    assert "a tar archive that an early torch.save wrote" in early
    assert "weights_only=False" not in early
    assert "unpack it; it holds model.pth" in refusal(archive(tmp_path / "b.tar", ["model.pth"]))


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_distributed_checkpoint_comes_with_its_conversion(named: str, tmp_path: Path) -> None:
    save_distributed({"model": torch.nn.Conv2d(3, 4, 3).state_dict()}, tmp_path)
    said = refusal(tmp_path if named == "folder" else tmp_path / "__0_0.distcp")
    assert f"{DCP} {tmp_path} {tmp_path}.pt" in said


@pytest.mark.parametrize("what", ["objects beside tensors", "a program", "more than can be listed"])
def test_a_distributed_checkpoint_that_may_run_code_has_no_command(what: str, tmp_path: Path) -> None:
    save_distributed({"step": [3], "model": torch.nn.Conv2d(3, 4, 3).state_dict()}, tmp_path)
    named = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"
    if what == "a program":
        (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        named = "os.system"
    elif what == "more than can be listed":
        (tmp_path / ".metadata").write_bytes(b"(" * 3_000_000 + b".")
        named = what
    said = refusal(tmp_path)
    assert "python" not in said
    assert f"would load {named}, not known to be harmless" in said


def test_a_distributed_checkpoint_without_its_metadata_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"PK\x03\x04")
    assert "whose .metadata is missing or damaged; fetch it again" in refusal(tmp_path)


def save_distributed(state: dict[str, object], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a single process
        distributed.save(state, checkpoint_id=folder)


def test_empty_weights_and_folders_of_deepspeed_name_its_script(tmp_path: Path) -> None:
    state = {"c.weight": torch.zeros(0), "c.bias": torch.zeros(0), "bn.running_mean": torch.zeros(4)}
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")
    assert "zero_to_fp32.py" in refusal(tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_to_fp32.py").touch()
    assert "zero_to_fp32.py" in refusal(tmp_path / "zero")


def test_an_archive_around_a_checkpoint_names_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as file:
        for name in ("data", "policy.optimizer.pth", "policy.pth", "pytorch_variables.pth"):
            file.writestr(name, b"x")
    assert "unzip it and use policy.pth" in refusal(tmp_path / "agent.zip")


def test_arrays_come_with_their_conversion(tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.zeros(3))
    numpy.savez(tmp_path / "b.npz", a=numpy.zeros(3))
    assert "convert it: python -c" in refusal(tmp_path / "a.npy")
    assert "convert it: python -c" in refusal(tmp_path / "b.npz")


def test_a_packed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.pth.gz", "wb") as file:
        file.write(b"x")
    assert "a gzip archive (unpack it), not a checkpoint (" in refusal(tmp_path / "a.pth.gz")
