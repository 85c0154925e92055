from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, Convsim, Start, same_bits
from references import literal_similarity
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convsim_cli.checkpoints.formats import open_checkpoint

DOCUMENT = (
    "schema",
    "command",
    "checkpoint",
    "output",
    "backup",
    "method",
    "preserve_norm",
    "iterations",
    "lr",
    "device",
    "seconds",
    "layers",
    "skipped",
    "total",
    "version",
)


def make(path: Path) -> dict[str, Tensor]:
    state = {
        "stem.weight": torch.randn(8, 3, 3, 3),
        "point.weight": torch.randn(8, 8, 1, 1).half(),
        "audio.weight": torch.randn(4, 4, 5),
        "bn.num_batches_tracked": torch.tensor(0),
        "head.weight": torch.randn(10, 8),
    }
    save_file(state, path, {"format": "pt"})
    return state


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_in_place_changes_the_kernels_alone_and_keeps_the_former_file(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    before = make(path)
    former = digest(path)
    outcome = convsim("init", path, "--iterations", 20, "--json")
    assert outcome.code == 0
    assert tuple(outcome.document) == DOCUMENT
    assert outcome.document["backup"] == f"{path}.bak"
    assert digest(tmp_path / "model.safetensors.bak") == former
    after = load_file(path)
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {"stem.weight", "point.weight"}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["convsim.method"] == "cs"
    assert metadata["convsim.iterations"] == "20"


def test_the_json_document_tells_every_layer_in_full_precision(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    before = make(path)
    found = convsim("init", path, "-o", tmp_path / "out.safetensors", "--iterations", 20, "--probe", "white", "--json")
    document = found.document
    after = load_file(tmp_path / "out.safetensors")
    assert (document["checkpoint"], document["output"], document["backup"]) == (
        str(path),
        str(tmp_path / "out.safetensors"),
        None,
    )
    assert [layer["name"] for layer in document["layers"]] == ["stem.weight", "point.weight"]  # not the alphabet
    for layer in document["layers"]:
        assert tuple(layer) == ("name", "shape", "groups", "assumed", "before", "after")
        assert tuple(layer["before"]) == tuple(layer["after"]) == ("cs", "ncs", "norm", "fm_corr")
        for moment, state in (("before", before), ("after", after)):
            weight = state[layer["name"]].double()
            assert layer[moment]["cs"] == pytest.approx(literal_similarity(weight).item(), rel=1e-12)
            assert layer[moment]["norm"] == pytest.approx(weight.norm().item(), rel=1e-12)
    assert document["total"]["after"] == pytest.approx(sum(layer["after"]["cs"] for layer in document["layers"]))
    assert [entry["name"] for entry in document["skipped"]] == ["audio.weight"]


def test_a_dry_run_gives_the_same_without_after_and_writes_nothing(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    former = digest(path)
    document = convsim("init", path, "--dry-run", "--json").document
    assert tuple(document) == DOCUMENT
    assert (document["output"], document["backup"]) == (str(path), f"{path}.bak")
    assert tuple(document["total"]) == ("before",)
    assert all("after" not in layer for layer in document["layers"])
    assert digest(path) == former
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("command", [("init", "--dry-run"), ("measure", "--samples", 1, "--input-size", 4)])
def test_skipped_tensors_are_a_headline_and_three_lines(
    command: tuple[object, ...], tmp_path: Path, convsim: Convsim
) -> None:
    state = {f"layer{number}.weight": torch.randn(4, 4, 3, 3) for number in range(12)}
    state |= {f"depthwise{number}.weight": torch.randn(8, 1, 3, 3) for number in range(40)}
    state |= {f"block{number}.gamma": torch.randn(8, 1, 1, 1) for number in range(10)}
    state |= {f"video{number}.weight": torch.randn(4, 4, 3, 3, 3) for number in range(5)}
    state |= {"norm.running_mean": torch.randn(1, 4, 1, 1), "codes": torch.ones(4, 4, 3, 3).int()}
    state["single.weight"] = torch.randn(1, 4, 3, 3)
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    told = convsim(*command, path).err.splitlines()
    start = next(number for number, line in enumerate(told) if "12 of 70 convolution-shaped tensors can be " in line)
    lines = [line for line in told[start + 1 :] if line.startswith("skipped")]
    assert len(lines) == 3
    assert lines == told[start + 1 : start + 4]
    assert lines[0].endswith("): depthwise0.weight, depthwise1.weight, depthwise2.weight and 37 more")
    assert lines[2] == "skipped 7 for 3 other reasons (--json lists all)"
    document = convsim(*command, path, "--json").document
    assert {entry["name"] for entry in document["skipped"]} == set(state) - {f"layer{n}.weight" for n in range(12)}
    save_file({"a.weight": torch.randn(4, 3, 3, 3)}, path)
    assert "convolution-shaped" not in convsim(*command, path).err


def test_a_video_network_gets_the_option_to_type(tmp_path: Path, convsim: Convsim) -> None:
    save_file({"a.weight": torch.randn(4, 2, 3, 3, 3)}, tmp_path / "video.safetensors")
    refused = convsim("init", tmp_path / "video.safetensors", "--dry-run")
    assert refused.code == 2
    assert "a.weight (5-D: taken for a kernel only by --include '*')" in refused.error
    assert convsim("init", tmp_path / "video.safetensors", "--iterations", 1, "--include", "*").code == 0
    save_file({"layers[0].weight": torch.randn(4, 2, 9), "b": torch.randn(8, 4, 5)}, tmp_path / "audio.safetensors")
    found = convsim("init", tmp_path / "audio.safetensors", "--iterations", 1, "--json").document
    assert [(layer["name"], layer["assumed"]) for layer in found["layers"]] == [("layers[0].weight", True)]
    found = convsim("measure", tmp_path / "audio.safetensors", "--include", "layers[0].weight", "--json").document
    assert [layer["name"] for layer in found["layers"]] == ["layers[0].weight"]


def test_a_pipe_gets_tsv_on_stdout_and_all_else_on_stderr(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    outcome = convsim("init", path, "--iterations", 1, "--include", "stem*", "--no-backup")
    assert [row["name"] for row in outcome.rows] == ["stem.weight"]
    assert float(outcome.rows[0]["cs_after"]) < float(outcome.rows[0]["cs_before"])
    assert "skipped 2 (not matched by --include)" in outcome.err.splitlines()
    assert outcome.err.splitlines()[-2:] == [f"wrote {path}", f"next: convsim measure {path}"]
    assert not (tmp_path / "model.safetensors.bak").exists()
    probed = convsim("init", path, "--iterations", 1, "--probe", "natural", "--force")
    assert probed.err.splitlines()[-1].startswith(f"next: convsim measure {path} --input natural")


def test_a_network_of_few_kernels_says_how_few_and_why(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "mobile.safetensors"
    blocks = {
        f"b{n}.{kind}.weight": shape for n in (1, 2) for kind, shape in (("dw", (8, 1, 3, 3)), ("pw", (8, 8, 1, 1)))
    }
    save_file({name: torch.randn(shape) for name, shape in ({"stem.weight": (8, 3, 3, 3)} | blocks).items()}, path)
    err = convsim("init", path, "--iterations", 1, "--preserve-norm").err
    assert err.endswith("\nonly 1 of 5 layers changed; 1×1 layers: --method orthogonal or decorrelate\n")
    assert err.count("depends only on norms") == 1
    assert convsim("init", path, "--iterations", 1).err.splitlines()[-1].startswith("next: ")


def test_lists_of_layers_name_three_at_most(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "m.safetensors"
    state = {f"point{number}.weight": torch.randn(8, 8, 1, 1) for number in range(40)}
    save_file({"stem.weight": torch.randn(8, 3, 3, 3), **state}, path)
    err = convsim("init", path, "--method", "dct", "--no-backup").err
    assert "\northogonal instead of dct: point0.weight, point1.weight, point2.weight and 37 more\n" in err


def test_some_guessed_groups_are_those_of_named_layers(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: torch.randn(8, 4, 3, 3) for name in ("a", "b", "c", "d", "e", "f")}, path)
    for command in (("init", path, "--dry-run"), ("measure", path, "--samples", 1)):
        err = convsim(*command, "--groups", "[ab]=2").err
        assert "groups of c, d, e and 1 more are assumed from names and shapes; correct them with --groups" in err


def test_a_closed_form_does_not_lead_with_the_objective_of_others(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    how = ("init", path, "--method", "orthogonal", "--no-backup")
    said = r"orthogonal, norms kept, [0-9.]+ s; it does not minimize L_CS \(\S+ → \S+\)"
    assert re.search(f"^{said}; --probe natural shows fm_corr$", convsim(*how).err, re.MULTILINE)
    assert re.search(f"^{said}$", convsim(*how, "--probe", "natural").err, re.MULTILINE)


def test_quiet_says_nothing_on_stderr(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "model.safetensors")
    assert convsim("init", tmp_path / "model.safetensors", "-q", "--iterations", 1).err == ""


def test_preserve_norm_holds_norms_and_skips_pointwise_layers(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    before = make(path)
    document = convsim("init", path, "--preserve-norm", "--iterations", 50, "--json").document
    assert (document["method"], document["preserve_norm"]) == ("cs", True)
    assert "depends only on norms" in {entry["name"]: entry["reason"] for entry in document["skipped"]}["point.weight"]
    after = load_file(path)
    torch.testing.assert_close(
        after["stem.weight"].flatten(1).norm(dim=1), before["stem.weight"].flatten(1).norm(dim=1), rtol=1e-5, atol=0
    )
    assert document["layers"][0]["after"]["ncs"] < document["layers"][0]["before"]["ncs"]


def test_a_fresh_network_needs_no_checkpoint_and_repeats_with_its_seed(tmp_path: Path, convsim: Convsim) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.safetensors"
        outcome = convsim("init", "--arch", "cnn:8", "-o", out, "--iterations", 5, "--seed", seed, "--json")
        assert outcome.code == 0
        assert outcome.document["checkpoint"] is None
        assert not any(layer["assumed"] for layer in outcome.document["layers"])
    assert digest(tmp_path / "a.safetensors") == digest(tmp_path / "b.safetensors")
    assert digest(tmp_path / "a.safetensors") != digest(tmp_path / "c.safetensors")


def test_with_arch_a_checkpoint_is_told_exactly_under_its_own_names(tmp_path: Path, convsim: Convsim) -> None:
    convsim("init", "--arch", "cnn:8", "-o", tmp_path / "a.pt", "--iterations", 0)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "b.pt")
    document = convsim("init", tmp_path / "b.pt", "--arch", "cnn:8", "--iterations", 1, "--json").document
    assert [layer["name"] for layer in document["layers"]] == [f"module.{i}.weight" for i in (0, 4, 8, 12)]
    outcome = convsim("init", tmp_path / "b.pt", "--arch", "cnn:4")
    assert outcome.code == 2
    assert "of another shape (0.weight is [8, 3, 3, 3], expected [4, 3, 3, 3]" in outcome.error


def test_a_checkpoint_that_looks_trained_is_warned_about(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    save_file(make(path) | {"bn.num_batches_tracked": torch.tensor(9)}, path)
    outcome = convsim("init", path, "--iterations", 1, "-q")
    assert "looks trained" in outcome.err
    assert f"destroys what the network has learned; the original is kept in {path}.bak" in outcome.err


def test_nan_in_a_kernel_is_named_before_any_work_and_the_file_stays(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    state = make(path)
    state["stem.weight"][1, 2, 0, 0] = torch.inf
    save_file(state, path)
    former = digest(path)
    outcome = convsim("init", path)
    assert outcome.code == 2
    assert f"{path}: stem.weight [8, 3, 3, 3]: 1 of 216 values is NaN or Inf" in outcome.error
    assert digest(path) == former
    assert convsim("init", path, "--exclude", "stem*", "--iterations", 1).code == 0


def test_a_layer_that_diverges_is_named_and_nothing_is_written(tmp_path: Path, convsim: Convsim) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    former = digest(path)
    outcome = convsim("init", path, "--optimizer", "sgd", "--lr", 1e8)
    assert outcome.code == 1
    assert "stem.weight: the objective is" in outcome.error
    assert digest(path) == former
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.pt"], "no such file"),
        ([], "pass a CHECKPOINT, or --arch for a new network"),
        (["--arch", "cnn1"], "--arch creates a new network; --output is required"),
        (["--arch", "resnet81", "-o", "x.pt"], "did you mean 'resnet18'"),
        (["--arch", "cnn1", "-o", "."], "a folder"),
        (
            ["--arch", "cnn1", "-o", "/dev/null"],
            "/dev/null: is a device; choose a new file or a regular one to replace",
        ),
        (["--arch", "cnn1", "-o", "nowhere/x.pt"], "folder nowhere does not exist"),
        (["--arch", "cnn1", "-o", "x.pt", "--lr", "nan"], "expected a finite number above 0"),
        (["--arch", "cnn1", "-o", "x.pt", "--device", "cpu:"], "--device cpu:"),
        (["--arch", "cnn1", "-o", "x.pt", "--device", "cuda:7"], "cuda"),
        (["--arch", "cnn1", "-o", "x.pt", "--device", "cpuu"], "did you mean 'cpu'"),
        (["--arch", "cnn1", "-o", "x.pt", "--lr", "0"], "expected a number above 0"),
        (["--arch", "cnn1", "-o", "x.pt", "--groups", "a=b"], "expected GLOB=N"),
        (
            ["--arch", "cnn1", "-o", "x.pt", "--groups", "0.weight=2"],
            "--groups and --transposed apply only without --arch",
        ),
        (["--arch", "cnn1", "-o", "x.pt", "--include", "conv9*"], "matches no tensor"),
        (["--arch", "cnn1", "-o", "x.pt", "--optimizer", "lion"], "lion"),
        (["--iteration", "5"], "--iterations"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = convsim("init", *arguments)
    assert outcome.code == 2
    assert said in outcome.error
    assert outcome.out == ""
    assert not list(tmp_path.iterdir())


def test_interrupting_leaves_the_file_as_it_was_and_exits_130(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.randn(256, 256, 3, 3)}, path)
    former = digest(path)
    process = start("init", path, "-q", "--iterations", 1_000_000)
    while not list(tmp_path.glob(".convsim-*")):  # the new file is being written while layers are minimized
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "convsim: interrupted"
    assert digest(path) == former
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_real_checkpoints_keep_their_structure_and_every_other_tensor(
    name: str, checkpoint_dir: Path, tmp_path: Path, convsim: Convsim
) -> None:
    out = tmp_path / name
    outcome = convsim("init", checkpoint_dir / name, "-o", out, "--iterations", 50, "--json")
    assert outcome.code == 0
    touched = {layer["name"] for layer in outcome.document["layers"]}
    assert touched
    assert all(layer["after"]["cs"] < layer["before"]["cs"] for layer in outcome.document["layers"])
    if name.endswith(".safetensors"):
        before, after = load_file(checkpoint_dir / name), load_file(out)
        for key in touched:
            before[key] = after[key]
    else:
        before, after = (
            torch.load(path, weights_only=True, map_location="cpu") for path in (checkpoint_dir / name, out)
        )
        state, other = (node.get("state_dict", node) for node in (before, after))
        for key in touched:
            assert not torch.equal(state[key], other[key])
            state[key].copy_(other[key])
    assert same_bits(before, after)
    measured = convsim("measure", out, "--samples", 2, "--json")
    assert measured.code == 0
    assert {layer["name"] for layer in measured.document["layers"]} == touched
    assert json.dumps(measured.document, allow_nan=False)
    assert open_checkpoint(out).tensors == open_checkpoint(checkpoint_dir / name).tensors


@pytest.mark.parametrize("how", ["--json", "-q"])
@pytest.mark.parametrize(
    ("stdout", "said"), [("/dev/full", "No space left on device"), ("closed", "Bad file descriptor")]
)
def test_the_file_is_written_where_standard_output_cannot_be(
    stdout: str, said: str, how: str, tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    former = digest(path)
    process = start("init", path, "--iterations", 1, how, stdout=stdout)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        f"convsim: error: standard output: cannot be written ({said}); result files, if any, were still written"
    )
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert digest(path) != former
    assert digest(tmp_path / "model.safetensors.bak") == former


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_a_standard_error_that_cannot_be_written_stops_nothing(stderr: str, tmp_path: Path, start: Start) -> None:
    make(tmp_path / "model.safetensors")
    process = start("init", tmp_path / "model.safetensors", "--iterations", 1, stdout=subprocess.PIPE, stderr=stderr)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.startswith("name\t")
    assert len(out.splitlines()) == 3
