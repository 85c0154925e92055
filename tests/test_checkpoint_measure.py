from __future__ import annotations

import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file
from torch import Tensor, nn

from convsim_cli import checkpoint_measure
from convsim_cli.checkpoint_measure import measure_checkpoint
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import RandomKernels
from convsim_cli.networks.architectures import build_network
from convsim_cli.rotation import TurnMonitor
from convsim_cli.settings import MeasureOptions

SHARED_KEYS = ("schema", "command", "version")  # of all commands' documents


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(4, 8, 5, 3)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_a_checkpoint_is_measured_as_by_the_command_line(file: Path, convsim: Convsim) -> None:
    report = measure_checkpoint(str(file), input="natural", samples=3, exclude=["b*"], seed=2, top=1)
    how = ("--input", "natural", "--samples", 3, "--exclude", "b*", "--seed", 2, "--top", 1)
    document = convsim("measure", file, *how, "--json").document
    found = {key: value for key, value in document.items() if key not in SHARED_KEYS}
    assert report.document() | {"skipped": found["skipped"]} == found
    assert [entry["name"] for entry in report.skipped] == ["b.weight"]


def test_a_fresh_network_is_measured_by_name() -> None:
    report = measure_checkpoint(arch="cnn:4", num_classes=3, samples=2)
    assert report.bn_statistics == "inputs"
    assert [layer["calls"] for layer in report.layers] == [1] * 4
    assert report.notes == [
        "batch-norm statistics are re-estimated on the inputs: the stored ones no longer match these kernels"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0}, r"`threshold` 0: expected a number in \(0, 1\]"),
        ({"threshold": 1.5}, "`threshold` 1.5: expected a number"),
        ({"samples": 0}, "`samples` 0: expected a whole number above 0"),
        ({"input": "digits"}, "`input` digits: needs `arch`"),
        ({"include": "a*"}, r"`include` a\*: expected a list"),
        ({"arch": "cnn:4", "bn_statistics": "batch"}, "`bn_statistics` batch: expected auto, stored or inputs"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], said: str, file: Path) -> None:
    with pytest.raises(InputError, match=said):
        measure_checkpoint(file, **options)  # type: ignore[arg-type]


def test_what_a_reader_had_to_choose_is_a_warning(tmp_path: Path) -> None:
    states = {name: {"c.weight": torch.randn(4, 3, 3, 3)} for name in ("model", "ema")}
    torch.save(states, tmp_path / "both.pt")
    with pytest.warns(UserWarning, match="ema"):
        report = measure_checkpoint(tmp_path / "both.pt", samples=1)
    assert report.warnings


def test_parametrized_layers_of_a_network_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n"
        "from torch.nn.utils.parametrizations import weight_norm\n"
        "def net():\n"
        "    return nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    report = measure_checkpoint(arch="theirs:net", samples=2, input_size=16)
    assert [layer["name"] for layer in report.layers] == ["0.weight", "2.weight"]
    assert all(layer["fm_cos"] is not None for layer in report.layers)


def test_calls_are_rounded_up_and_those_on_nothing_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sometimes.py").write_text(
        "from torch import nn\n"
        "class Sometimes(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.some, self.none = (nn.Conv2d(3, 3, 1) for _ in range(3))\n"
        "        self.batches = 0\n"
        "    def forward(self, images):\n"
        "        self.batches += 1\n"
        "        maps = self.body(images)\n"
        "        return self.some(maps) if self.batches == 2 else self.none(maps[:0])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_measure, "MAP_BATCH", 1)
    report = measure_checkpoint(arch="sometimes:Sometimes", samples=3, input_size=8)
    assert [layer["calls"] for layer in report.layers] == [1, 1, 0]
    assert report.layers[1]["fm_corr"] is not None
    assert report.notes == ["no inputs reach these layers, so they have no feature maps: none.weight"]


def test_layers_of_which_a_sample_of_filters_is_compared_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "MOST_FILTERS", 5)
    report = measure_checkpoint(file, samples=1, top=2)
    large, small = report.layers
    assert (large["sampled"], "sampled" in small) == (5, False)
    assert all(large[key] is not None for key in ("fm_corr", "fm_corr_random", "fm_rank", "fm_rank_random", "fm_cos"))
    assert [large[key] for key in ("redundant", "opposite", "removable", "clusters")] == [None] * 4
    assert large["top"] == []
    assert small["removable"] is not None
    assert report.notes == [
        "too many filters to compare all maps: a sample is compared, and redundant, opposite, removable and "
        "clusters are null, --top and --plot leave them out: a.weight (5 per group)"
    ]


MEASURE = """
import resource, sys
from convsim_cli.checkpoint_measure import measure_checkpoint

measure_checkpoint(sys.argv[1], include=["small"], samples=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(layer,) = measure_checkpoint(sys.argv[1], include=["large"], samples=1).layers
print(layer["sampled"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_layer_of_21843_filters_takes_less_than_300_mb(tmp_path: Path) -> None:
    weights = {"small": torch.randn(8, 8, 3, 3), "large": torch.randn(21843, 16, 1, 1)}
    save_file(weights, tmp_path / "m.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "m.safetensors")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "4096"
    assert float(found[1]) < 300


def test_a_layer_whose_filters_vanish_is_measured(tmp_path: Path) -> None:
    weight = torch.randn(6, 3, 3, 3)
    weight[:2] *= 1e-25
    save_file({"w": weight}, tmp_path / "m.safetensors")
    (layer,) = measure_checkpoint(tmp_path / "m.safetensors", samples=2).layers
    save_file({"w": weight[2:]}, tmp_path / "living.safetensors")
    (living,) = measure_checkpoint(tmp_path / "living.safetensors", samples=2).layers
    assert layer["dead"] == 2
    for key in ("ncs", "kernel_cos", "fm_corr", "fm_cos", "fm_rank", "fm_rank_random"):
        rel = 1e-2 if key == "fm_rank_random" else 1e-5  # as many random filters, though not the same
        assert layer[key] == pytest.approx(living[key], rel=rel)
    assert layer["norm"] == pytest.approx(weight.norm().item())


def test_a_network_with_nan_is_named_before_it_runs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    (tmp_path / "x").mkdir()
    save_file({"w": torch.full((4, 3, 3, 3), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"nan.safetensors: w \[4, 3, 3, 3\]: 108 of 108 values are NaN or Inf"):
        measure_checkpoint(tmp_path / "nan.safetensors")
    del model


def test_maps_with_nan_are_refused_with_a_network_and_without(tmp_path: Path, convsim: Convsim) -> None:
    state = build_network("cnn:4").state_dict()
    broken = {"running.safetensors": "1.running_var", "gain.safetensors": "1.weight"}
    for name, tensor in broken.items():
        save_file(state | {tensor: torch.full((4,), torch.nan)}, tmp_path / name)
    how = ("--arch", "cnn:4", "--bn-statistics", "stored")
    for command in ((tmp_path / "running.safetensors", *how), (tmp_path / "gain.safetensors", "--input", "features")):
        outcome = convsim("measure", *command)
        assert outcome.code == 2
        assert "4.weight: its feature maps on these inputs contain NaN or Inf; check the inputs" in outcome.error


def test_filters_are_compared_with_those_of_the_first_checkpoint(tmp_path: Path, convsim: Convsim) -> None:
    before, noise = torch.randn(2, 8, 3, 3, 3)
    after = 5 * (before + 0.3 * noise)
    save_file({"w.weight": before, "b.weight": before.clone()}, tmp_path / "a.safetensors")
    save_file({"w.weight": after, "b.weight": before[:4].contiguous()}, tmp_path / "b.safetensors")
    document = convsim("measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json").document
    first, second = ({layer["name"]: layer["turned"] for layer in each["layers"]} for each in document["checkpoints"])
    cosines = torch.cosine_similarity(before.double().flatten(1), after.double().flatten(1)).sort().values
    assert first == {"b.weight": None, "w.weight": None}
    assert second["w.weight"] == pytest.approx(math.degrees(math.acos(cosines[4])), rel=1e-5)  # the lower of two
    assert second["b.weight"] is None  # of another shape
    outcome = convsim("measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "turned" in outcome.out.splitlines()[0].split("\t")
    assert "turned" not in convsim("measure", tmp_path / "a.safetensors").out


def test_filters_dead_in_the_first_checkpoint_turn_nothing_as_in_a_run(tmp_path: Path) -> None:
    model, sizes = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.tensor([1, 1, 1, *[1e-20] * 5]).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        model[0].weight *= sizes
        torch.save(model.state_dict(), tmp_path / "first.pt")
        monitor = TurnMonitor(model)
        model[0].weight += 0.3 * torch.randn(8, 4, 3, 3) * sizes.flip(0)  # dead ones grow, living ones vanish
    torch.save(model.state_dict(), tmp_path / "second.pt")
    paths = tmp_path / "first.pt", tmp_path / "second.pt"
    _, report = checkpoint_measure.measure_checkpoints(paths, MeasureOptions(samples=1))
    (row,) = monitor.rows()
    assert report.layers[0]["turned"] == row["turned"]


def test_features_of_a_file_take_the_batch_norm_before_the_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
    with torch.no_grad():
        model[1].bias += 3 * torch.randn(6)
    torch.save(model.state_dict(), tmp_path / "normalized.pt")
    torch.save({k: v for k, v in model.state_dict().items() if k[0] != "1"}, tmp_path / "plain.pt")
    found, plain = (
        measure_checkpoint(tmp_path / name, input="features").layers for name in ("normalized.pt", "plain.pt")
    )
    assert found[0] == plain[0]
    assert found[1]["fm_corr"] != plain[1]["fm_corr"]
    model[1].affine, model[1].weight, model[1].bias = False, None, None
    torch.save(model.state_dict(), tmp_path / "without.pt")
    without = measure_checkpoint(tmp_path / "without.pt", input="features").layers
    assert without[1]["fm_corr"] == pytest.approx(plain[1]["fm_corr"], rel=1e-6)


def test_a_convolution_beside_a_running_variance_is_no_gain(tmp_path: Path) -> None:
    kernels = {"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(8, 8, 3, 3)}
    found = []
    for more in ({}, {"b.bias": torch.ones(1)}):
        save_file(kernels | more | {"b.running_var": torch.ones(8)}, tmp_path / "m.safetensors")
        found.append(measure_checkpoint(tmp_path / "m.safetensors", input="features").layers)
    assert found[0] == found[1]


def test_a_running_variance_of_a_single_number_is_no_batch_norm(tmp_path: Path) -> None:
    kernels = {"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(8, 8, 3, 3)}
    found = []
    for more in ({}, {"a.running_var": torch.ones(())}):
        save_file(kernels | more, tmp_path / "m.safetensors")
        found.append(measure_checkpoint(tmp_path / "m.safetensors", input="features", samples=2).layers)
    assert found[0] == found[1]


def test_batch_norms_slow_no_probe_that_they_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, update = [], RandomKernels.update
    monkeypatch.setattr(RandomKernels, "update", lambda self, maps: updates.append(1) or update(self, maps))
    layers = [(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(3)]
    torch.save(nn.Sequential(*chain(*layers)).state_dict(), tmp_path / "normalized.pt")
    measure_checkpoint(tmp_path / "normalized.pt", samples=1)
    assert len(updates) == 1  # chance, for all three layers


def test_features_are_refused_with_a_network() -> None:
    with pytest.raises(InputError, match="`input` features applies only without `arch`"):
        measure_checkpoint(arch="cnn:4", input="features")


class Standardized(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(images, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def standardized(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(Standardized(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def test_turned_is_the_angle_of_the_weights_that_layers_use(tmp_path: Path, convsim: Convsim) -> None:
    state = standardized().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file({**state, "0.weight": state["0.weight"] + 1}, tmp_path / "b.safetensors")
    arch = f"{__name__}:standardized"
    found = convsim(
        "measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--arch", arch, "--json"
    ).document
    assert found["checkpoints"][1]["layers"][0]["turned"] < 0.01


def test_warnings_point_at_the_caller_and_batch_norm_needs_a_network(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(4, 3, 3, 3)}
    torch.save({"model": state, "other": state}, tmp_path / "two.pth")
    with pytest.warns(ConvsimWarning, match="loaded the tensors under model") as found:
        measure_checkpoint(tmp_path / "two.pth")
    assert found[0].filename == __file__
    with pytest.raises(InputError, match="`bn_statistics` requires `arch`"):
        measure_checkpoint(tmp_path / "two.pth", key="model", bn_statistics="inputs")
