from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file
from torch import nn

from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import evaluation_totals
from convsim_cli.measurement.feature_maps import PaperSimilarity
from convsim_cli.measurement.network import measure
from convsim_cli.measurement.synthetic import make_inputs
from convsim_cli.minimize import minimize_weight_
from convsim_cli.networks.architectures import build_network
from convsim_cli.plots import draw_heat

LAYER = ("name", "shape", "groups", "assumed", "filters", "cs", "ncs", "kernel_cos", "fm_corr", "fm_corr_random")
LAYER += ("fm_rank", "fm_rank_random", "redundant", "opposite", "removable", "clusters", "fm_cos", "fm_inner2", "norm")
LAYER += ("dead", "turned")


def make(path: Path) -> None:
    save_file({"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(4, 8, 5, 3)}, path)


def test_the_json_document_has_its_keys_in_their_order(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    document = convsim("measure", tmp_path / "m.safetensors", "--json").document
    keys = ("schema", "command", "source", "input", "bn_statistics", "layers", "skipped", "total", "version")
    assert tuple(document) == keys
    assert (document["schema"], document["input"]) == (2, "white")
    assert all(tuple(layer) == LAYER for layer in document["layers"])
    assert document["total"]["cs"] == pytest.approx(sum(layer["cs"] for layer in document["layers"]))


def test_several_checkpoints_stand_side_by_side(tmp_path: Path, convsim: Convsim) -> None:
    for name in ("one", "two"):
        make(tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    documents = convsim("measure", *paths, "--json").document["checkpoints"]
    assert [document["source"] for document in documents] == [str(path) for path in paths]
    rows = convsim("measure", *paths).rows
    assert [(row["name"], Path(row["source"]).stem) for row in rows] == [
        ("a.weight", "one"),
        ("a.weight", "two"),
        ("b.weight", "one"),
        ("b.weight", "two"),
    ]


def test_csv_is_the_same_table_with_commas(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    outcome = convsim("measure", tmp_path / "m.safetensors", "--csv")
    assert list(csv.DictReader(io.StringIO(outcome.out))) == convsim("measure", tmp_path / "m.safetensors").rows


def test_without_a_checkpoint_it_takes_the_folders_model_else_a_fresh_cnn1(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = convsim("measure", "--samples", 1)
    assert "a fresh cnn1" in outcome.err
    assert len(outcome.rows) == 4
    make(tmp_path / "model.safetensors")
    outcome = convsim("measure", "--samples", 1)
    assert "measuring model.safetensors" in outcome.err
    assert len(outcome.rows) == 2


def test_the_summary_of_a_network_without_a_file_says_what_it_is(convsim: Convsim) -> None:
    err = convsim("measure", "--arch", "cnn:4", "--samples", 1).err
    assert "\nfresh cnn:4: L_CS " in err
    assert "\nfresh cnn:4: no layer's maps" in err or "\nfresh cnn:4: most correlated" in err


def test_a_pattern_that_lacks_a_prefix_is_suggested_with_a_star(convsim: Convsim, tmp_path: Path) -> None:
    save_file({"module.layer3.0.conv1.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    for command in ("measure", "init"):
        error = convsim(command, tmp_path / "m.safetensors", "--include", "layer3.*").error
        assert "the pattern 'layer3.*' matches no tensor; did you mean '*layer3.*'?" in error
    assert "names look like module.layer3" in convsim("measure", tmp_path / "m.safetensors", "--include", "x*").error


def test_with_arch_real_outputs_count_as_in_the_library(convsim: Convsim) -> None:
    document = convsim(
        "measure", "--arch", "cnn:8", "--input", "natural", "--samples", 4, "--seed", 5, "--json"
    ).document
    assert [layer.pop("calls") for layer in document["layers"]] == [1] * 4
    model, images = build_network("cnn:8", seed=5), make_inputs("natural", 4, 3, (32, 32), seed=5)
    assert document["layers"] == measure(model, images, seed=5)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    first, second = (
        convsim("measure", tmp_path / "m.safetensors", "--input", "natural", "--json").out for _ in range(2)
    )
    assert first == second


def test_a_data_set_gives_real_activations_and_the_test_accuracy(convsim: Convsim) -> None:
    document = convsim("measure", "--arch", "cnn:8", "--input", "digits", "--json").document
    assert 0 <= document["total"]["accuracy"] <= 100
    assert all(layer["fm_cos"] is not None for layer in document["layers"])


def test_a_file_without_kernels_or_with_nan_is_named(tmp_path: Path, convsim: Convsim) -> None:
    torch.save({"linear.weight": torch.randn(4, 4)}, tmp_path / "linear.pt")
    outcome = convsim("measure", tmp_path / "linear.pt")
    assert outcome.code == 2
    assert f"{tmp_path / 'linear.pt'}: no convolution kernels" in outcome.error
    save_file({"a": torch.full((4, 3, 3, 3), torch.nan)}, tmp_path / "nan.safetensors")
    outcome = convsim("measure", tmp_path / "nan.safetensors")
    assert outcome.code == 2
    assert f"{tmp_path / 'nan.safetensors'}: a [4, 3, 3, 3]: 108 of 108 values" in outcome.error


@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_kernels_at_the_ends_of_float32_are_measured_in_valid_json(
    scale: float, tmp_path: Path, convsim: Convsim
) -> None:
    save_file({"a": torch.rand(4, 3, 3, 3) * scale}, tmp_path / "m.safetensors")
    document = convsim("measure", tmp_path / "m.safetensors", "--json").document
    assert all(
        document["layers"][0][key] is not None for key in ("cs", "ncs", "kernel_cos", "fm_corr", "fm_cos", "norm")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "cnn1", "--input", "wite"], "did you mean 'white'"),
        (["m.safetensors", "--input", "digits"], "needs --arch"),
        (["m.safetensors", "--input", "noise"], "choose from"),
        (["m.safetensors", "--arch", "cnn1"], "does not fit --arch"),
        (["--arch", "cnn1", "--input", "cifar10", "--data-dir", "nowhere"], "--data-dir"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m.safetensors")
    if "nowhere" in arguments:
        monkeypatch.setattr(
            "torchvision.datasets.CIFAR10.download", lambda self: (_ for _ in ()).throw(OSError("no network"))
        )
    outcome = convsim("measure", *arguments)
    assert outcome.code == 2
    assert said in outcome.error


RESNET20 = """
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, channels, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride, self.more = stride, filters - channels

    def forward(self, x):
        shortcut = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)

class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (channels, filters) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(channels, filters, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, *(Block(filters, filters, 1) for _ in range(2))))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))
"""


@pytest.mark.slow
def test_a_users_network_has_its_published_accuracy_and_centred_figures(
    checkpoint_dir: Path, data_dir: Path, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_resnet.py").write_text(RESNET20)
    how = ("--arch", "their_resnet:ResNet20", "--input", "cifar10", "--data-dir", data_dir, "--samples", 256, "--json")
    normal = ("--mean", "0.485 0.456 0.406", "--std", "0.229,0.224,0.225")
    document = convsim("measure", checkpoint_dir / "resnet20_cifar10.th", *how, *normal).document
    assert round(document["total"]["accuracy"], 2) == 91.73
    assert len(document["layers"]) == 19
    assert all(layer["name"].startswith("module.") for layer in document["layers"])
    layers = {layer["name"].removeprefix("module."): layer for layer in document["layers"]}
    centred = {name: layers[f"{name}.weight"] for name in ("layer1.0.conv1", "layer2.2.conv1")}
    assert [round(layer["fm_cos"], 3) for layer in centred.values()] == [0.569, 0.505]  # the means of the maps alone
    assert [round(layer["fm_corr"], 3) for layer in centred.values()] == [0.2, 0.141]


def test_a_stream_holds_one_table_or_one_document(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    save_file({"a": torch.zeros(4, 3, 3, 3)}, tmp_path / "dead.safetensors")
    both = convsim("measure", tmp_path / "m.safetensors", "--csv", "--json")
    assert (both.code, both.out) == (2, "")
    assert "--csv and --json cannot be combined" in both.error
    columns = ["name", "filter", "most_similar_to", "corr"]
    for options, delimiter in (((), "\t"), (("--csv",), ",")):
        found = convsim("measure", tmp_path / "m.safetensors", "--top", 3, *options)
        header, *rows = csv.reader(io.StringIO(found.out), delimiter=delimiter)
        assert header == columns
        assert len(rows) == 6
        assert all(len(row) == 4 for row in rows)
        nothing = convsim("measure", tmp_path / "dead.safetensors", "--top", 3, *options)
        assert nothing.out == delimiter.join(columns) + "\n"


def test_the_strongest_pairs_are_a_table_with_signed_correlations(tmp_path: Path, convsim: Convsim) -> None:
    weight = torch.randn(6, 3, 3, 3)
    weight[5] = -2 * weight[3]
    weight[4] = 3 * weight[0] + 0.1 * weight[1]
    save_file({"a.weight": weight, "b.weight": torch.randn(4, 6, 3, 3)}, tmp_path / "m.safetensors")
    pairs = convsim("measure", tmp_path / "m.safetensors", "--top", 2).out
    assert [line.split("\t")[0] for line in pairs.splitlines()] == [
        "name",
        "a.weight",
        "a.weight",
        "b.weight",
        "b.weight",
    ]
    assert pairs.splitlines()[1].split("\t")[1:3] == ["3", "5"]
    document = convsim("measure", tmp_path / "m.safetensors", "--top", 2, "--json").document
    layer = document["layers"][0]
    assert (layer["redundant"], layer["opposite"], layer["removable"], layer["clusters"]) == (2, 2, 1, [[0, 4]])
    assert layer["top"][0] == {"filters": [3, 5], "corr": pytest.approx(-1, abs=1e-5)}
    assert layer["top"][1] == {"filters": [0, 4], "corr": pytest.approx(1, abs=1e-2)}
    document = convsim("measure", tmp_path / "m.safetensors", "--threshold", 1, "--json").document
    assert (document["layers"][0]["redundant"], document["layers"][0]["clusters"]) == (0, [])


def test_the_second_of_two_checkpoints_is_shown_with_its_change(tmp_path: Path, convsim: Convsim) -> None:
    paths = [tmp_path / "before.safetensors", tmp_path / "after.safetensors"]
    make(paths[0])
    convsim("init", paths[0], "-o", paths[1], "--preserve-norm", "--iterations", 50)
    rows = convsim("measure", *paths).rows
    assert [row["fm_corr_change"] for row in rows[::2]] == ["", ""]
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        change = float(after["fm_corr"]) - float(before["fm_corr"])
        assert float(after["fm_corr_change"]) == pytest.approx(change, abs=1e-5)
    assert float(rows[1]["ncs_change"]) < 0


def test_heat_maps_are_a_page_per_checkpoint(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "one.safetensors")
    make(tmp_path / "two.safetensors")
    both = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert convsim("measure", *both[:1], "--groups", "a*=2", "--plot", tmp_path / "x.png").code == 0
    assert convsim("measure", *both, "--plot", tmp_path / "y.png").code == 0
    pages = sorted(tmp_path.glob("*.png"))
    assert [page.name for page in pages] == ["x.png", "y-1.png", "y-2.png"]
    assert all(page.read_bytes().startswith(b"\x89PNG") for page in pages)


@pytest.mark.parametrize("living", [0, 1])
def test_heat_maps_are_drawn_of_layers_without_pairs(living: int, tmp_path: Path, convsim: Convsim) -> None:
    weight = torch.zeros(4, 3, 3, 3)
    weight[:living] = torch.randn(living, 3, 3, 3)
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    drawn = convsim("measure", tmp_path / "m.safetensors", "--plot", tmp_path / "x.png")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_sum_that_float64_cannot_hold_is_null_and_said(tmp_path: Path, convsim: Convsim) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for name, scale in (("one", (1e80, 1.0)), ("both", (1.35e77, 1.35e77))):  # of cs, which is of degree 4
        path = tmp_path / f"{name}.safetensors"
        save_file({key: weight / weight.norm() * value for key, value in zip("ab", scale, strict=True)}, path)
        assert convsim("measure", path, "--json").document["total"] == {"cs": None}, name
        assert f"{name}.safetensors: L_CS beyond float64 (input: white)" in convsim("measure", path).err
        assert convsim("init", path, "--dry-run", "--json").document["total"] == {"before": None}
        assert "L_CS beyond float64; dry run" in convsim("init", path, "--dry-run").err
        made = convsim("init", path, "--method", "orthogonal", "-o", tmp_path / "o.safetensors")
        assert "does not minimize L_CS (beyond float64 → beyond float64)" in made.err


def test_a_folder_of_images_is_run_through_the_network(tmp_path: Path, convsim: Convsim) -> None:
    from PIL import Image

    for name in ("b/one.png", "b/two.jpg", "three.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 64).convert("RGB").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    found = convsim("measure", "--arch", "cnn:4", "--input", tmp_path, "--json")
    assert found.code == 0, found.err
    assert found.document["layers"][0]["fm_cos"] is not None
    assert "accuracy" not in found.document["total"]
    (tmp_path / "three.PNG").write_bytes(b"not one either")
    assert "three.PNG: not a readable image" in convsim("measure", "--arch", "cnn:4", "--input", tmp_path).error
    (tmp_path / "empty").mkdir()
    assert "contains no images" in convsim("measure", "--arch", "cnn:4", "--input", tmp_path / "empty").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "cnn:4", "--input", "cifar1"], "did you mean 'cifar10'?"),
        (["--arch", "cnn:4", "--input", "nophotos/"], "error: --input nophotos/: no such folder"),
        (["m.safetensors", "--input", "./digits"], "error: --input ./digits: no such folder"),
        (["--arch", "cnn:4", "--mean", "0.5"], "--mean '0.5': expected three numbers, for instance 0.485,0.456,0.406"),
        (["--arch", "cnn:4", "--std", "1,1,0"], "--std '1,1,0': expected numbers above 0"),
        (["--arch", "cnn:4", "--input", "digits", "--std", "1,nan,1"], "--std '1,nan,1': expected finite numbers"),
        (["--arch", "cnn:4", "--mean", "1,1,1"], "--mean and --std normalize images: --input white has none"),
        (["--arch", "cnn:4", "--plot", "x.jpg"], "x.jpg: expected a name that ends in .png, .pdf or .svg"),
        (["m.safetensors", "--key", "ema"], "--key applies only to pickled checkpoints; m.safetensors is"),
        (["m.safetensors", "--input", "folder:x"], "needs --arch"),
        (["--arch", "cnn:4", "--input", "folder:nowhere"], "nowhere: expected a folder of images for each class"),
    ],
)
def test_mistakes_are_one_line_that_helps(
    arguments: list[str], message: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m.safetensors")
    outcome = convsim("measure", *arguments)
    assert outcome.code == 2
    assert message in outcome.error


HEADS = """
from torch import nn

class Dictionary(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3))

    def forward(self, images):
        return {"out": super().forward(images)}

def maps():
    return nn.Conv2d(3, 4, 3)

def head(count):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, count))

def few():
    return head(2)

def many():
    return head(12)
"""


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("Dictionary", "no test accuracy: the network returns a dict, not logits [images, 10]"),
        ("maps", "no test accuracy: for 180 images the network returns [180, 4, 30, 30], not [180, 10]"),
        ("few", "no test accuracy: 2 outputs for 10 classes"),
        ("many", "12 outputs for 10 classes: only the first 10 count"),
    ],
)
def test_outputs_that_labels_cannot_be_compared_with_leave_the_report(
    arch: str, said: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads.py").write_text(HEADS)
    found = convsim("measure", "--arch", f"heads:{arch}", "--input", "digits", "--input-size", 32, "--json")
    assert found.code == 0, found.err
    assert said in found.err
    assert found.document["layers"][0]["fm_cos"] is not None
    assert ("accuracy" in found.document["total"]) == (arch == "many")


def test_a_folder_named_like_a_data_set_does_not_hide_it(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert "accuracy" in convsim("measure", "--arch", "cnn:4", "--input", "digits", "--json").document["total"]


def test_built_in_networks_take_a_folders_images_at_32_pixels(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from convsim_cli.inputs import datasets as image_folders

    decode, sides = image_folders.decode_image, []
    monkeypatch.setattr(image_folders, "decode_image", lambda path, side: sides.append(side) or decode(path, side))
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        Image.effect_noise((40, 30), 64).save(tmp_path / kind / "x.png")
    assert convsim("measure", "--arch", "cnn:4", "--input", f"folder:{tmp_path}").code == 0
    assert sides == [32]


def test_files_whose_names_differ_by_a_prefix_are_paired(tmp_path: Path, convsim: Convsim) -> None:
    names = ("features.0.weight", "features.3.weight")
    paths = [tmp_path / f"{name}.safetensors" for name in ("plain", "wrapped", "foreign")]
    for path, form in zip(paths, ("{}", "module.{}", "{}.other"), strict=True):
        save_file({form.format(name): torch.randn(4, 3, 3, 3) for name in names}, path)
    rows = convsim("measure", *paths[:2]).rows
    assert [row["name"] for row in rows] == ["features.0.weight", f"module.{names[0]}", names[1], f"module.{names[1]}"]
    assert all(row["ncs_change"] for row in rows[1::2])
    outcome = convsim("measure", *paths[::2], "-q")
    assert f"warning: {paths[2]}: has no layer in common with {paths[0]}" in outcome.err


def test_csv_with_the_most_similar_pairs_is_one_table_of_them(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    found = list(csv.DictReader(io.StringIO(convsim("measure", tmp_path / "m.safetensors", "--csv", "--top", 2).out)))
    assert [row["name"] for row in found] == ["a.weight", "a.weight", "b.weight", "b.weight"]
    assert set(found[0]) == {"name", "filter", "most_similar_to", "corr"}


def test_a_heat_map_of_many_filters_keeps_its_similar_pairs(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    draw = draw_heat
    monkeypatch.setattr(
        "convsim_cli.cli.measure_command.draw_heat",
        lambda heat, cosines, title: drawn.update(heat, title=title) or draw(heat, cosines, title),
    )
    weight = torch.randn(512, 1, 3, 3)
    weight[300] = -weight[7]
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    assert convsim("measure", tmp_path / "m.safetensors", "--samples", 1, "--plot", tmp_path / "x.png").code == 0
    assert drawn["a.weight"].cells.shape == (128, 128)
    assert (drawn["a.weight"].cells < -0.999).any()
    assert "a cell shows the strongest of several pairs" in drawn["title"]


def test_the_pass_for_the_test_accuracy_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, convsim: Convsim) -> None:
    from convsim_cli.cli.console import Console

    steps: dict[str, float] = {}

    @contextmanager
    def progress(_: Console, description: str, total: float) -> Iterator[Callable[[float], None]]:
        done: list[float] = []
        yield done.append
        assert sum(done) == total
        steps[description] = total

    monkeypatch.setattr(Console, "progress", progress)
    assert convsim("measure", "--arch", "cnn:4", "--input", "digits").code == 0
    assert steps == {"feature maps of cnn:4": 2 * 16, "measure cnn:4": 4, "test accuracy of cnn:4": 360}


def test_what_a_network_keeps_from_being_evaluated_can_be_trained_with() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = nn.Linear(3, 10), torch.empty(0)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not self.kept.numel():
                self.kept = images.new_ones(1)
            return self.layer(images.mean((2, 3))) * self.kept

    model, data = Keeping(), load_dataset("digits", Path()).limited(1, 4)
    evaluation_totals(model, data, data.test, torch.device("cpu"))
    model(data.normalize(data.test.images)).sum().backward()
    assert model.layer.weight.grad is not None


def test_json_has_the_changes_of_the_table(tmp_path: Path, convsim: Convsim) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        make(path)
    rows = convsim("measure", *paths).rows
    first, second = convsim("measure", *paths, "--json").document["checkpoints"]
    for report, shown in ((first, rows[::2]), (second, rows[1::2])):
        for layer, row in zip(report["layers"], shown, strict=True):
            changes = {key: value for key, value in layer.items() if key.endswith("_change")}
            assert set(changes) == {key for key in row if key.endswith("_change")} >= {"ncs_change", "fm_corr_change"}
            for key, value in changes.items():
                assert row[key] == ("" if value is None else f"{value:.6g}")
    assert all(layer["fm_corr_change"] is None for layer in first["layers"])


def test_the_batch_norm_statistics_that_count_are_said(convsim: Convsim, tmp_path: Path) -> None:
    fresh = convsim("measure", "--arch", "cnn:4", "--json")
    assert fresh.document["bn_statistics"] == "inputs"
    said = "batch-norm statistics are re-estimated on the inputs: the stored ones no longer match these kernels"
    assert f"cnn:4: {said}" in fresh.err
    stored = convsim("measure", "--arch", "cnn:4", "--bn-statistics", "stored", "--json")
    assert stored.document["bn_statistics"] == "stored"
    assert "batch-norm" not in stored.err
    assert stored.document["layers"][1]["fm_cos"] != fresh.document["layers"][1]["fm_cos"]
    make(tmp_path / "m.safetensors")
    assert convsim("measure", tmp_path / "m.safetensors", "--json").document["bn_statistics"] is None


def trained(path: Path, record: dict[str, str] | None = None) -> None:
    model = build_network("cnn:4").train()
    for images in torch.randn(3, 8, 3, 32, 32) + 0.5:
        model(images)
    save_file(dict(model.state_dict()), path, metadata=record)


def test_a_file_changed_by_init_is_measured_with_input_statistics(convsim: Convsim, tmp_path: Path) -> None:
    path = tmp_path / "trained.safetensors"
    trained(path)
    assert convsim("measure", path, "--arch", "cnn:4", "--json").document["bn_statistics"] == "stored"
    convsim("init", path, "--iterations", 1, "--no-backup")
    assert convsim("measure", path, "--arch", "cnn:4", "--json").document["bn_statistics"] == "inputs"


def test_the_accuracy_is_that_of_the_stored_statistics(convsim: Convsim, tmp_path: Path) -> None:
    trained(tmp_path / "trained.safetensors")
    how = ("measure", tmp_path / "trained.safetensors", "--arch", "cnn:4", "--input", "digits", "--json")
    stored, inputs = (convsim(*how, "--bn-statistics", which).document for which in ("stored", "inputs"))
    assert stored["total"] == inputs["total"]
    assert stored["layers"][1]["fm_cos"] != inputs["layers"][1]["fm_cos"]


def test_rows_and_json_are_sorted_by_a_figure(convsim: Convsim, tmp_path: Path) -> None:
    weights = {name: torch.randn(8, 3, 3, 3) for name in ("a", "b", "c")}
    weights["b"][1:4] = weights["b"][0]
    save_file(weights, tmp_path / "m.safetensors")
    rows = convsim("measure", tmp_path / "m.safetensors", "--sort", "-fm_rank").rows
    assert rows[0]["name"] == "b"
    layers = convsim("measure", tmp_path / "m.safetensors", "--sort", "fm_rank", "--json").document["layers"]
    assert [layer["name"] for layer in layers] == [row["name"] for row in rows][::-1]
    outcome = convsim("measure", tmp_path / "m.safetensors", "--sort", "fm_rnk")
    assert outcome.code == 2
    assert "--sort fm_rnk: did you mean 'fm_rank'?" in outcome.error


def test_a_comparison_is_sorted_by_a_figure_that_only_later_files_have(convsim: Convsim, tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        assert convsim("init", "--arch", "cnn:4", "--method", "dct", "--seed", seed, "-o", file).code == 0
    for sign in ("", "-"):
        layers = convsim("measure", *files, "--json").document["checkpoints"][1]["layers"]
        expected = [layer["name"] for layer in sorted(layers, key=lambda layer: layer["turned"], reverse=not sign)]
        rows = convsim("measure", *files, "--sort", f"{sign}turned").rows
        assert [row["name"] for row in rows] == [name for name in expected for _ in files]


@pytest.mark.parametrize("how", [("--json",), ("--wide",), ("--sort", "fm_cos")])
def test_the_papers_figures_are_computed_only_where_they_are_shown(
    convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    computed: list[int] = []
    original = PaperSimilarity._add
    monkeypatch.setattr(PaperSimilarity, "_add", lambda *given: (computed.append(1), original(*given)))
    make(tmp_path / "m.safetensors")
    for source in ((tmp_path / "m.safetensors",), ("--arch", "cnn:4", "--samples", 4)):
        assert "fm_cos" not in convsim("measure", *source).rows[0]
        assert not computed
        assert convsim("measure", *source, *how).code == 0
        assert computed
        computed.clear()


def test_what_stands_out_is_said_in_one_line(convsim: Convsim, tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 3, 3)
    weight[1:6] = weight[0]
    save_file({"a": weight, "b": torch.randn(8, 3, 3, 3)}, tmp_path / "m.safetensors")
    err = convsim("measure", tmp_path / "m.safetensors").err
    assert "m.safetensors: most correlated maps relative to chance: a (" in err
    assert "lowest rank relative to chance: a (" in err
    assert "5 filters removable (5 of a)\nnext: --top 3 lists the most correlated pairs, --json all clusters" in err


def test_dead_filters_alone_bring_the_next_step(convsim: Convsim, tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 3, 3)
    weight[2:4] = 0
    save_file({"a": weight}, tmp_path / "m.safetensors")
    err = convsim("measure", tmp_path / "m.safetensors").err
    assert "; 0 filters removable; 2 dead (2 of a)\nnext: the documentation page 'Measure' shows how" in err
    assert "m.safetensors" in err and ".docs/" not in err


def test_duplicates_that_init_leaves_in_a_first_layer_are_explained(convsim: Convsim, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": 0.1 * torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))}, file)
    assert "a has duplicates because" not in convsim("measure", file, "--input", "natural").err
    assert convsim("init", file, "--preserve-norm", "--iterations", 500).code == 0
    err = convsim("measure", file, "--input", "natural").err
    assert "m.safetensors: a has duplicates because its ncs" in err
    assert err.endswith("\nnext: convsim init --method dct creates fewer duplicates in first layers, on photographs\n")
    assert convsim("init", file, "--method", "dct").code == 0
    err = convsim("measure", file, "--input", "natural").err
    assert "a has duplicates because its ncs is near its lower bound, as after L_CS at unchanged norms or dct" in err
    assert "next: --top 3" in err and "--method dct" not in err


def test_real_vanished_filters_are_counted_as_dead(checkpoint_dir: Path, convsim: Convsim) -> None:
    layers = convsim("measure", checkpoint_dir / "espnet_decoder.pth", "--samples", 1, "--json").document["layers"]
    assert sum(layer["dead"] for layer in layers) == 92


def test_real_opposite_filters_are_no_duplicates(checkpoint_dir: Path, convsim: Convsim) -> None:
    how = ("--include", "*conv1.conv.weight", "--input", "natural", "--top", 4, "--json")
    layer = convsim("measure", checkpoint_dir / "minifasnet_v2.pth", *how).document["layers"][0]
    pairs = {tuple(pair["filters"]): pair["corr"] for pair in layer["top"]}
    assert pairs[20, 28] < -0.95
    assert all(not {20, 28} <= set(cluster) for cluster in layer["clusters"])
    assert any({20, 30} <= set(cluster) for cluster in layer["clusters"])
    assert layer["opposite"] >= 2


def test_choices_made_in_reading_a_file_name_options(tmp_path: Path, convsim: Convsim) -> None:
    first, second = ({"a.weight": torch.randn(4, 3, 3, 3)} for _ in range(2))
    torch.save({"model": first, "other": second}, tmp_path / "two.pt")
    two = convsim("measure", tmp_path / "two.pt", "--samples", 1, "--input-size", 4)
    assert "--key" in two.err
    torch.save(build_network("cnn:4").state_dict() | {"extra": torch.ones(2)}, tmp_path / "extra.pt")
    extra = convsim("measure", tmp_path / "extra.pt", "--arch", "cnn:4", "--samples", 1)
    assert "--arch cnn:4 has no place for 1 of its tensors (extra)" in extra.err
    assert "`" not in two.err + extra.err


def test_the_figures_are_explained_as_json_too(convsim: Convsim) -> None:
    found = convsim("measure", "--figures", "--json").document["figures"]
    assert [figure["key"] for figure in found][:2] == ["cs", "ncs"]
    assert {figure["key"] for figure in found if figure["depends_on_scale"]} == {"cs", "fm_inner2", "norm"}


def test_nobody_is_told_to_initialize_a_network_that_looks_trained(convsim: Convsim, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    weight = 0.1 * torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file({"a": minimize_weight_(weight, preserve_norm=True)}, file)
    assert "next: convsim init" in convsim("measure", file, "--input", "natural").err
    save_file({"a": weight, "bn.running_mean": torch.ones(64)}, file)
    err = convsim("measure", file, "--input", "natural").err
    assert "has duplicates because" in err
    assert "next: --top 3" in err


def test_a_folder_that_is_missing_is_said_with_what_is_known(convsim: Convsim) -> None:
    said = convsim("measure", "--arch", "cnn:4", "--input", "natura").error
    assert "no such folder; did you mean 'natural'?" in said
    assert "expected a width from 1" in convsim("measure", "--arch", "cnn:0").error
    assert "unknown network ':x'" in convsim("measure", "--arch", ":x").error


@pytest.mark.parametrize("how", [("natural",), ("features",), ("natural", "--arch", "cnn:4")])
def test_noise_without_a_mean_is_refused_on_a_single_pixel(
    how: tuple[str, ...], convsim: Convsim, tmp_path: Path
) -> None:
    save_file(build_network("cnn:4").state_dict(), tmp_path / "m.safetensors")
    assert (
        "--input-size 1: " in convsim("measure", tmp_path / "m.safetensors", "--input-size", 1, "--input", *how).error
    )
