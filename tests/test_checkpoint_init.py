"""`init_checkpoint` from Python is as safe as `convsim init`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file, save_file
from torch import nn

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.checkpoint_measure import measure_checkpoint
from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import CheckpointError, ConvsimWarning, InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of two kernels and a counter of batch normalization."""
    state = {"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(8, 8, 3, 3)}
    save_file({**state, "bn.num_batches_tracked": torch.tensor(0)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_in_place_it_keeps_every_former_file_and_returns_where(path: Path) -> None:
    former = [path.read_bytes()]
    first = init_checkpoint(str(path), iterations=2)
    former.append(path.read_bytes())
    second = init_checkpoint(path, path, iterations=2)
    assert (first.checkpoint, first.output) == (path, path)
    assert first.backup == Path(f"{path}.bak")
    assert second.backup == Path(f"{path}.bak.1")
    assert [first.backup.read_bytes(), second.backup.read_bytes()] == former


def test_it_returns_what_the_command_prints(path: Path, convsim: Convsim, tmp_path: Path) -> None:
    how = {"iterations": 3, "preserve_norm": True, "probe": "white", "exclude": ["b.*"], "groups": {"a.*": 2}}
    called = init_checkpoint(path, tmp_path / "one.safetensors", **how).document()  # type: ignore[arg-type]
    options = ("--iterations", 3, "--preserve-norm", "--probe", "white", "--exclude", "b.*", "--groups", "a.*=2")
    printed = convsim("init", path, "-o", tmp_path / "two.safetensors", *options, "--json").document
    differing = {"output", "seconds", "skipped"}
    assert called["skipped"][0]["reason"] == "matched by `exclude`"  # the command names its option
    assert printed["skipped"] == [{**called["skipped"][0], "reason": "matched by --exclude"}]
    assert {key: printed[key] for key in called if key not in differing} == {
        key: value for key, value in called.items() if key not in differing
    }
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "save", "said"),
    [
        ("model.safetensors", save_file, []),
        ("model.bin", save_file, []),  # known by its content
        ("model.pth", torch.save, ["no longer match its kernels"]),
    ],
)
def test_a_pickle_is_said_to_keep_older_batch_norm_statistics(
    tmp_path: Path, name: str, save: Callable[..., Any], said: list[str]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(torch.randn(4, 3, 8, 8))
    path = tmp_path / name
    save(model.state_dict(), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init_checkpoint(path, iterations=1)
    trained, *others = [str(warning.message) for warning in caught]
    assert "looks trained" in trained
    assert len(others) == len(said)
    assert all(words in other for words, other in zip(said, others, strict=True))


def test_a_checkpoint_that_looks_trained_is_warned_about_once(path: Path, tmp_path: Path) -> None:
    save_file({**load_file(path), "bn.num_batches_tracked": torch.tensor(9)}, path)
    with pytest.warns(
        ConvsimWarning,
        match=r"destroys what the network has learned; the original is kept in .*model\.safetensors\.bak$",
    ) as caught:
        init_checkpoint(path, iterations=1)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    with pytest.warns(ConvsimWarning, match="destroys what the network has learned$"):
        init_checkpoint(path, tmp_path / "other.safetensors", iterations=1)


def test_a_choice_made_in_reading_the_file_is_warned_about(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(4, 3, 3, 3)}
    torch.save({"state_dict": weights, "ema": weights}, tmp_path / "model.pt")
    with pytest.warns(ConvsimWarning, match="loaded the tensors under state_dict; there are others under ema"):
        init_checkpoint(tmp_path / "model.pt", iterations=1)


def test_what_cannot_be_saved_is_refused_before_any_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr("convsim_cli.checkpoint_init._write", None)
    with pytest.raises(InputError, match=r"x\.h5: expected a name that ends in \.safetensors"):
        init_checkpoint(path, path.with_name("x.h5"))
    with pytest.raises(InputError, match=r"x\.h5: unknown suffix \.h5; name it \.safetensors, "):
        init_checkpoint(None, path.with_name("x.h5"), arch="cnn:4")
    with pytest.raises(InputError, match="`arch` creates a new network; `output` is required"):
        init_checkpoint(None, arch="cnn:4")
    with pytest.raises(CheckpointError, match="no such file"):
        init_checkpoint("nothing.pt")
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["net.pth.tar", "net.sav", "net.params", "net"])
def test_output_takes_the_suffix_of_the_source_whatever_it_is(name: str, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(4, 3, 3, 3)}, tmp_path / name)
    output = tmp_path / f"new_{name}"
    made = init_checkpoint(tmp_path / name, output, iterations=1)
    assert made.output == output
    assert open_checkpoint(output).load("a.weight").shape == (4, 3, 3, 3)
    with pytest.raises(InputError, match=r"new\.safetensors: expected a name that ends in \.pt, "):
        init_checkpoint(tmp_path / name, tmp_path / "new.safetensors", iterations=1)


def test_an_output_that_exists_is_kept_as_a_backup(path: Path, tmp_path: Path) -> None:
    other, output = path.read_bytes(), tmp_path / "out.safetensors"
    save_file({"of another": torch.ones(3)}, output)
    former = [output.read_bytes()]
    first = init_checkpoint(path, output, iterations=1)
    former.append(output.read_bytes())
    second = init_checkpoint(path, output, iterations=2)
    assert (first.backup, second.backup) == (Path(f"{output}.bak"), Path(f"{output}.bak.1"))
    assert [Path(f"{output}.bak").read_bytes(), Path(f"{output}.bak.1").read_bytes()] == former
    assert init_checkpoint(path, output, dry_run=True).backup == Path(f"{output}.bak.2")
    assert init_checkpoint(path, output, iterations=1, no_backup=True).backup is None
    assert not Path(f"{output}.bak.2").exists()
    assert path.read_bytes() == other


def test_without_a_backup_and_in_a_dry_run_no_other_file_is_made(path: Path) -> None:
    before = path.read_bytes()
    planned = init_checkpoint(path, dry_run=True)
    assert (planned.backup, path.read_bytes()) == (Path(f"{path}.bak"), before)
    assert list(planned.document()["total"]) == ["before"]
    assert init_checkpoint(path, iterations=1, no_backup=True).backup is None
    assert path.read_bytes() != before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_new_network_is_saved_and_opened_by_its_path_as_text(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = init_checkpoint(None, str(tmp_path / "new.pt"), arch="cnn:4", iterations=1)
    assert made.checkpoint is None
    assert [layer["assumed"] for layer in made.layers] == [False] * 4
    assert "0.weight" in open_checkpoint(str(tmp_path / "new.pt")).tensors


def test_an_error_gives_the_reason_of_the_layer_that_was_asked_for(tmp_path: Path) -> None:
    state = {f"a{number}.weight": torch.randn(8, 8, 3, 3) for number in range(4)}
    torch.save(state | {"last.weight": torch.randn(8, 8, 1, 1)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"skipped: last.weight \(1×1: its L_CS depends only on norms"):
        init_checkpoint(tmp_path / "m.pt", include=["last.weight"], preserve_norm=True)


def test_a_dry_run_speaks_of_no_backup(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(8, 8, 3, 3), "bn.running_mean": torch.ones(8)}
    torch.save(state, tmp_path / "m.pt")
    with pytest.warns(ConvsimWarning, match="looks trained") as caught:
        init_checkpoint(tmp_path / "m.pt", dry_run=True)
    assert not any(".bak" in str(warning.message) for warning in caught)


def test_an_argument_that_does_not_exist_is_named_with_the_nearest(path: Path) -> None:
    with pytest.raises(TypeError, match=r"init_checkpoint\(\) has no argument 'iteration': did you mean 'iterations'"):
        init_checkpoint(path, iteration=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"measure_checkpoint\(\) has no argument 'sample'"):
        measure_checkpoint(path, sample=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="pass a `path`, or `arch` for a new network"):
        measure_checkpoint()
