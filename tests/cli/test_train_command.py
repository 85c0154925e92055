from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import Convsim, Start

from convsim_cli.networks.architectures import build_network
from convsim_cli.training.config import MODES

SMALL = (
    "--arch",
    "cnn:4",
    "--dataset",
    "digits",
    "--limit-train",
    60,
    "--limit-test",
    30,
    "--batch-size",
    20,
    "--iterations",
    5,
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_and_its_epochs_are_plain_lines(mode: str, tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("train", "--mode", mode, *SMALL, "--epochs", 2, "--run-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert [row["run"] for row in outcome.rows] == [str(tmp_path / f"cnn4-{mode}-s0")]
    lines = [line for line in outcome.err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert "epoch 2/2" in lines[1]


def test_json_gives_the_summaries_and_seeds_give_runs_of_their_own(tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim(
        "train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "x", "--seeds", 2, "--json", "-q"
    )
    document = outcome.document
    assert (document["schema"], document["command"]) == (2, "train")
    assert [run["run"] for run in document["runs"]] == [str(tmp_path / "x-s0"), str(tmp_path / "x-s1")]
    accuracies = [run["best_test_accuracy"] for run in document["runs"]]
    assert document["mean"]["best_test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert outcome.err == ""
    alone = convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "alone", "--seed", 1, "-q")
    assert alone.code == 0
    last = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("x-s0", "x-s1", "alone")]
    assert last[0] != last[1] == last[2]


def test_interrupted_seeds_can_be_resumed_one_by_one(tmp_path: Path, convsim: Convsim, start: Start) -> None:
    how = (*SMALL, "--run-dir", tmp_path, "--mode", "init", "-q")
    process = start("train", *how, "--epochs", 100_000, "--seeds", 3)
    while not (tmp_path / "cnn4-init-s0" / "results.csv").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert f"--resume {tmp_path / 'cnn4-init-s0'}; then the other seeds with: --name cnn4-init --seed 1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cnn4-init-s0"]
    assert convsim("train", *how, "--epochs", 1, "--name", "cnn4-init", "--seed", 1, "--seeds", 2).code == 0
    again = convsim("train", *how, "--epochs", 1, "--seeds", 2, "--json").document
    assert [run["run"] for run in again["runs"]] == [str(tmp_path / f"cnn4-init-2-s{seed}") for seed in (0, 1)]
    taken = convsim("train", *how, "--epochs", 1, "--seeds", 2, "--name", "cnn4-init")
    assert "cnn4-init-s0 already exists; resume it with: convsim train --resume" in taken.error


def test_a_run_dir_that_cannot_be_created_is_named(tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "file").write_text("")
    for command in (("train", *SMALL), ("reproduce", "table2", "--episodes", 4)):
        outcome = convsim(*command, "--run-dir", tmp_path / "file")
        assert outcome.code == 2
        assert "--run-dir" in outcome.error
        assert "is not a folder" in outcome.error


def test_resume_takes_more_epochs_and_refuses_anything_else(tmp_path: Path, convsim: Convsim) -> None:
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "x")
    outcome = convsim("train", "--resume", tmp_path / "x", "--lr", 0.5)
    assert outcome.code == 2
    assert "--lr 0.5: the run" in outcome.error
    assert "with --resume only --epochs, --data-dir and the path" in outcome.error
    assert convsim("train", "--resume", tmp_path / "x", "--epochs", 2, "--batch-size", 20).code == 0
    assert len((tmp_path / "x" / "results.csv").read_text().splitlines()) == 3


def test_resume_does_not_need_the_weights_that_a_run_began_with(tmp_path: Path, convsim: Convsim) -> None:
    weights = tmp_path / "w.safetensors"
    convsim("init", "--arch", "cnn:4", "-o", weights, "--iterations", 1)
    assert convsim("train", *SMALL, "--weights", weights, "--epochs", 1, "--run-dir", tmp_path, "--name", "x").code == 0
    weights.unlink()
    assert convsim("train", "--resume", tmp_path / "x", "--epochs", 2).code == 0


def test_a_run_folder_is_named_after_its_mode_and_what_it_does(tmp_path: Path, convsim: Convsim) -> None:
    for how, name in (
        (("--mode", "init", "--method", "orthogonal"), "init-orthogonal"),
        (("--mode", "init+reg", "--method", "orthogonal", "--objective", "kernel"), "init+reg-orthogonal-kernel"),
        (("--mode", "reg", "--objective", "srip"), "reg-srip"),
    ):
        outcome = convsim("train", *how, *SMALL, "--epochs", 1, "--run-dir", tmp_path)
        assert [row["run"] for row in outcome.rows] == [str(tmp_path / f"cnn4-{name}-s0")], outcome.err
        assert f"{tmp_path / f'cnn4-{name}-s0'}: {name}, cnn:4 on digits" in outcome.err


def test_beta_auto_is_in_the_summary_and_a_run_resumes_with_it(tmp_path: Path, convsim: Convsim) -> None:
    how = ("train", *SMALL, "--mode", "reg", "--objective", "kernel", "--run-dir", tmp_path, "--json", "-q")
    (first,) = convsim(*how, "--beta", "auto", "--epochs", 1, "--name", "x").document["runs"]
    assert first["beta"] > 0
    assert json.loads((tmp_path / "x" / "args.json").read_text())["beta"] == "auto"
    (longer,) = convsim("train", "--resume", tmp_path / "x", "--epochs", 2, "--beta", "auto", "--json", "-q").document[
        "runs"
    ]
    assert (longer["beta"], longer["epochs"]) == (first["beta"], 2)
    assert convsim(*how, "--beta", 0.5, "--epochs", 1).document["runs"][0]["beta"] == 0.5
    assert convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--json").document["runs"][0]["beta"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "regularize"], "regularize"),
        (["--arch", "cnn9"], "did you mean"),
        (["--dataset", "cifra10"], "did you mean 'cifar10'"),
        (["--dataset", "digits", "--weights", "nothing.pt"], "no such file"),
        (["--rescale"], "--rescale requires"),
        (["--mode", "init", "--method", "dtc"], "--method dtc: expected cs, "),
        (["--mode", "reg", "--method", "kernel"], "--method requires --mode init, init+reg, got --mode reg"),
        (["--mode", "rescale", "--factor", "0"], "--factor 0.0: expected a number above 0"),
        (["--beta", "0.5"], "--beta 0.5 requires --mode reg, init+reg, got --mode baseline"),
        (["--mode", "init", "--beta", "0.001"], "--beta 0.001 requires --mode reg, init+reg, got --mode init"),
        (["--mode", "reg", "--beta", "much"], "--beta much: expected auto or a number from 0 to 3.4e+38"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--dataset", "digits", "--arch", "cnn:1"], "no convolution kernels"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--resume", "nowhere"], "not a run's folder"),
        (["--dataset", "digits", "--name", "a/b"], "plain folder name"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = convsim("train", *arguments)
    assert outcome.code == 2
    assert said in outcome.error
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_says_how_to_resume_it_and_can_be_resumed(
    tmp_path: Path, convsim: Convsim, start: Start
) -> None:
    process = start("train", *SMALL, "--epochs", 100_000, "--run-dir", tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    run = tmp_path / "cnn4-baseline-s0"
    assert f"resume with: convsim train --resume {run}" in said
    done = len((run / "results.csv").read_text().splitlines()) - 1
    assert convsim("train", "--resume", run, "--epochs", done + 1).code == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == done + 1


@pytest.mark.slow
def test_real_cifar10_is_learned_within_a_few_steps(data_dir: Path, tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim(
        *("train", "--mode", "init", "--arch", "cnn:16", "--data-dir", data_dir, "--epochs", 2, "--batch-size", 50),
        *(
            "--limit-train",
            2000,
            "--limit-test",
            500,
            "--lr",
            0.1,
            "--iterations",
            20,
            "--run-dir",
            tmp_path,
            "--json",
        ),
    )
    assert outcome.code == 0
    assert outcome.document["runs"][0]["best_test_accuracy"] > 20  # chance is 10
    best = tmp_path / "cnn16-init-s0" / "best.safetensors"
    measured = convsim(
        "measure", best, "--arch", "cnn:16", "--input", "cifar10", "--data-dir", data_dir, "--json"
    ).document
    assert measured["total"]["accuracy"] > 20


def test_a_config_sets_what_the_command_line_leaves_open(tmp_path: Path, convsim: Convsim) -> None:
    convsim("train", *SMALL, "--mode", "reg", "--beta", 0.5, "--epochs", 1, "--run-dir", tmp_path, "--name", "first")
    config = tmp_path / "first" / "args.json"
    again = convsim("train", "--config", config, "--lr", 0.5, "--run-dir", tmp_path, "--name", "second")
    assert again.code == 0, again.err
    first, second = (json.loads((tmp_path / name / "args.json").read_text()) for name in ("first", "second"))
    assert second == first | {"lr": 0.5}
    plain = convsim("train", "--config", config, "--mode", "baseline", "--run-dir", tmp_path, "--name", "third")
    assert plain.code == 0, plain.err  # only a number that is typed must be of use


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable args.json"),
        ("[]", "expected a run's arguments, by name"),
        ('{"epoch": 3}', "unknown argument epoch: did you mean 'epochs'?"),
        ('{"epochs": "3"}', "c.json: --epochs 3: expected a whole number above 0"),
        ('{"epochs": true}', "c.json: --epochs True: expected a whole number above 0"),
        ('{"pairs": "most"}', "pairs = 'most', expected all, neighbours"),
        ('{"precision": "fp8"}', "--precision fp8: expected fp32, tf32 or bf16"),
        ('{"iterations": -5}', "--iterations -5: expected a whole number of 0 or above"),
        ('{"seed": 99999999999999999999}', "--seed 99999999999999999999: expected a whole number from 0 to 4294967295"),
        ('{"limit_train": 0}', "--limit-train 0: expected a whole number above 0"),
        ('{"mode": "fast"}', "--mode fast: expected baseline, init, reg, init+reg or rescale"),
    ],
)
def test_an_unusable_config_is_one_error_line(content: str, message: str, tmp_path: Path, convsim: Convsim) -> None:
    (tmp_path / "c.json").write_text(content)
    outcome = convsim("train", "--config", tmp_path / "c.json", "--dataset", "digits", "--run-dir", tmp_path / "runs")
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "runs").exists()


def test_networks_of_torchvision_train_on_a_folder_of_images(tmp_path: Path, convsim: Convsim) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(5):
            Image.effect_noise((70, 50), 64).convert("RGB").save(tmp_path / "images" / name / f"{index}.png")
    how = ("--dataset", f"folder:{tmp_path / 'images'}", "--epochs", 1, "--batch-size", 4, "--run-dir", tmp_path)
    outcome = convsim("train", "--arch", "torchvision:squeezenet1_1", *how, "--image-size", 64, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["runs"][0]["epochs"] == 1
    mistake = convsim("train", "--arch", "torchvision:lraspp_mobilenet_v3_large", *how, "--image-size", 64)
    assert "returns a OrderedDict for one image, expected [1, 2] logits" in mistake.error
    size = convsim("train", "--dataset", "digits", "--image-size", 64)
    assert "--image-size requires --dataset folder:PATH" in size.error


def test_a_class_without_training_images_is_warned_about(tmp_path: Path, convsim: Convsim) -> None:
    from PIL import Image

    for name, count in (("cat", 5), ("dog", 5), ("elk", 1)):  # the last one is for testing, as every fifth image is
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (8, 8), index).save(tmp_path / "images" / name / f"{index}.png")
    how = ("--epochs", 1, "--batch-size", 4, "--run-dir", tmp_path / "runs", "-q")
    outcome = convsim("train", "--arch", "cnn:2", "--dataset", f"folder:{tmp_path / 'images'}", *how)
    assert outcome.code == 0, outcome.err
    assert "convsim: warning: 1 of 3 classes have no training images (elk)" in outcome.err


def test_a_layer_that_is_left_out_is_warned_of_once(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left_out.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))\n\n"
        "    def forward(self, x):\n        return nn.functional.conv2d(x, self.weight)\n\n\n"
        "def net(num_classes=10):\n    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), Mine(), *pooled, nn.Linear(4, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    how = ("--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1, "--run-dir", tmp_path, "-q")
    assert convsim("train", "--arch", "left_out:net", *how).err.count("skips 1.weight") == 1


def test_a_control_starts_from_the_file_of_a_run_by_another_mode(tmp_path: Path, convsim: Convsim) -> None:
    small = ("--dataset", "digits", "--arch", "cnn:4", "--epochs", 1, "--limit-train", 20, "--limit-test", 10)
    where = ("--run-dir", tmp_path, "-q")
    assert (
        convsim("train", *small, "--mode", "init", "--preserve-norm", "--iterations", 2, "--name", "a", *where).code
        == 0
    )
    config = ("train", "--config", tmp_path / "a" / "args.json", *where)
    assert convsim(*config, "--mode", "baseline", "--name", "b").code == 0
    assert convsim(*config, "--method", "dct", "--name", "c").code == 0
    assert json.loads((tmp_path / "b" / "args.json").read_text())["preserve_norm"] is False
    both = ("--mode", "init+reg", "--method", "dct", "--preserve-norm")
    assert convsim("train", *small, *both, "--name", "e", *where).code == 0
    assert convsim("train", "--config", tmp_path / "e" / "args.json", *where, "--mode", "init", "--name", "f").code == 0
    refused = convsim(*config, "--mode", "baseline", "--factor", 0.5, "--name", "d")
    assert "--factor requires --mode rescale" in refused.error


def test_tensors_beside_the_weights_are_told_of_without_an_option(tmp_path: Path, convsim: Convsim) -> None:
    state = build_network("cnn:4").state_dict()
    torch.save({"model": state, "other": state}, tmp_path / "two.pth")
    small = ("--dataset", "digits", "--arch", "cnn:4", "--epochs", 1, "--limit-train", 20, "--limit-test", 10)
    said = convsim("train", *small, "--weights", tmp_path / "two.pth", "--run-dir", tmp_path, "-q").err
    assert "there are others under other (to start from those, save them alone)" in " ".join(said.split())
