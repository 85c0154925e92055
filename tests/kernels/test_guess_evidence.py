"""What a file's biases, neighbours, names and metadata say of its kernels."""

from __future__ import annotations

from collections.abc import KeysView
from itertools import pairwise
from pathlib import Path
from time import process_time

import pytest
import torch
from conftest import Convsim, same_bits
from safetensors.torch import load_file, save_file
from torch import nn

from convsim_cli.batch_norm import batch_norms_before
from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, Selection, TensorInfo, file_kernels
from convsim_cli.kernels.neighbours import groups_by_neighbours
from convsim_cli.minimize import minimize_weight_

Shapes = dict[str, tuple[int, ...]]


def select(
    shapes: Shapes, patterns: Patterns | None = None, metadata: dict[str, str] | None = None
) -> dict[str, tuple[int, bool]]:
    found = selection(shapes, patterns, metadata)
    return {kernel.name: (kernel.groups, kernel.transposed) for kernel in found.kernels}


def selection(shapes: Shapes, patterns: Patterns | None = None, metadata: dict[str, str] | None = None) -> Selection:
    return file_kernels({name: TensorInfo("float32", s) for name, s in shapes.items()}, patterns, metadata=metadata)


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def layer(name: str, *shape: int, bias: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (bias,)}


@pytest.mark.parametrize("name", ["decoder.0", "upscale_conv", "output_upscaling.0", "convtr", "conv"])
@pytest.mark.parametrize("taps", [(3,), (3, 3), (2, 2, 2)])
def test_a_bias_as_long_as_the_second_axis_proves_a_transposed_layer(name: str, taps: tuple[int, ...]) -> None:
    shapes = layer("e", 16, 3, *taps, bias=16) | layer(name, 16, 64, *taps, bias=64)
    found = selection(shapes, Patterns(include=["*"]))
    kernel = next(kernel for kernel in found.kernels if kernel.name == f"{name}.weight")
    assert (kernel.transposed, kernel.filters) == (True, 64)
    assert not found.guess_warnings


def test_the_bias_tells_the_groups_of_a_transposed_layer() -> None:
    shapes = layer("e", 32, 3, 3, 3, bias=32) | layer("u", 32, 4, 4, 4, bias=16)
    assert select(shapes)["u.weight"] == (4, True)


def test_a_bias_without_values_proves_nothing() -> None:
    assert select(layer("conv", 4, 8, 3, 3, bias=0)) == {"conv.weight": (1, False)}


def test_batch_norm_behind_a_layer_of_a_sequential_proves_it_too() -> None:
    shapes: Shapes = {"e.weight": (16, 3, 3, 3), "d.0.weight": (16, 64, 3, 3), "d.1.running_mean": (64,)}
    assert select(shapes)["d.0.weight"] == (1, True)


@pytest.mark.parametrize("name", ["upsampler.0", "deconv", "up"])
def test_a_bias_as_long_as_the_first_axis_refutes_a_name(name: str) -> None:
    found = selection(layer("e", 50, 3, 3, 3, bias=50) | layer(name, 48, 50, 3, 3, bias=48))
    assert not found.guess_warnings
    assert not any(kernel.transposed for kernel in found.kernels)


def bottleneck(prefix: str, width: int, per_group: int, squeeze: int) -> Shapes:
    return {
        f"{prefix}.conv1.weight": (width, width, 1, 1),
        f"{prefix}.conv2.weight": (width, per_group, 3, 3),
        f"{prefix}.se.fc1.weight": (squeeze, width, 1, 1),
        f"{prefix}.se.fc2.weight": (width, squeeze, 1, 1),
        f"{prefix}.conv3.weight": (width, width, 1, 1),
    }


@pytest.mark.parametrize("alphabetical", [False, True], ids=["in order", "in the alphabet's"])
def test_groups_follow_from_the_layer_before_not_from_a_squeeze_elsewhere(alphabetical: bool) -> None:
    shapes = {"stem.weight": (32, 3, 3, 3), "in.weight": (64, 32, 1, 1)} | bottleneck("b1", 64, 16, 16)
    shapes |= bottleneck("b2", 64, 16, 16)
    found = select(dict(sorted(shapes.items())) if alphabetical else shapes)
    assert {name for name, (groups, _) in found.items() if groups == 4} == {"b1.conv2.weight", "b2.conv2.weight"}
    assert {groups for groups, _ in found.values()} == {1, 4}


def test_a_layer_that_neighbours_do_not_decide_is_doubted_by_name() -> None:
    shapes: Shapes = {"a.weight": (32, 3, 3, 3), "b.c1.weight": (64, 32, 1, 1), "b.c2.weight": (64, 32, 3, 3)}
    found = selection(shapes)
    assert list(found.doubts) == ["b.c2.weight"]
    assert "perhaps grouped" in found.guess_warnings[0]
    assert "b.c2.weight [64, 32, 3, 3]" in found.guess_warnings[0]


def test_depthwise_layers_of_several_filters_per_channel_are_doubted() -> None:
    shapes: Shapes = {"a.weight": (32, 3, 3, 3), "b.dw.weight": (32, 1, 3, 3), "b.pw.weight": (32, 32, 1, 1)}
    shapes |= {"c.dw.weight": (64, 1, 3, 3), "c.pw.weight": (64, 64, 1, 1)}
    assert list(selection(shapes).doubts) == ["c.dw.weight"]


OF_ONE_CHANNEL: dict[str, tuple[Shapes, set[str], set[str]]] = {  # layers, those that take images, those in doubt
    "gray images": ({"a.0": (16, 1, 3, 3), "a.1": (16, 1, 3, 3), "a.2": (32, 16, 1, 1)}, {"a.0"}, set()),
    "alone": ({"stem": (32, 3, 3, 3), "c": (32, 1, 3, 3), "pw": (64, 32, 1, 1)}, set(), set()),
    "a mask beside images": ({"s": (16, 3, 3, 3), "m.0": (4, 1, 2, 2), "m.1": (16, 4, 2, 2)}, {"m.0"}, set()),
    "a second network": ({"d": (1, 8, 7), "e.0": (8, 1, 7), "e.1": (16, 8, 7)}, set(), {"e.0"}),
    "a named one": ({"d": (1, 8, 3, 3), "e.dwconv": (8, 1, 3, 3), "e.1": (16, 8, 3, 3)}, set(), set()),
    "one of many": ({"a": (8, 3, 3, 3), "b.0.c": (8, 1, 4, 4), "b.1.c": (8, 1, 4, 4)}, set(), set()),
    "a prompt": ({"s": (8, 3, 3, 3), "p.c1": (8, 1, 3, 3), "p.c2": (8, 8, 3, 3)}, set(), {"p.c1"}),
}


@pytest.mark.parametrize("kind", OF_ONE_CHANNEL)
def test_what_comes_in_tells_depthwise_layers_from_first_ones(kind: str) -> None:
    shapes, first, doubted = OF_ONE_CHANNEL[kind]
    found = selection({f"{name}.weight": shape for name, shape in shapes.items()})
    one = {kernel.name for kernel in found.kernels if kernel.shape[1] == 1 and kernel.groups == 1}
    assert one == {f"{name}.weight" for name in first}
    assert set(found.doubts) == {f"{name}.weight" for name in doubted}


@pytest.mark.parametrize("name", ["upsample.0.0.conv", "upscale_block.block.0.conv1", "fpn1.0"])
def test_square_layers_of_even_kernels_are_doubted(name: str) -> None:
    shapes: Shapes = {"a.weight": (8, 3, 3, 3), f"{name}.weight": (16, 16, 2, 2), "z.weight": (4, 16, 1, 1)}
    assert "transposed" in selection(shapes).doubts[f"{name}.weight"]
    ordinary = {key.replace(name, "feature_extractor.conv_layers.5"): shape for key, shape in shapes.items()}
    assert not selection(ordinary).doubts


def test_parallel_layers_of_one_shape_are_not_taken_for_transposed() -> None:
    shapes: Shapes = {"s.weight": (64, 3, 3, 3), "p.main.weight": (128, 64, 3, 3), "p.high.weight": (128, 64, 3, 1)}
    shapes |= {"p.wide.weight": (128, 64, 1, 3), "q.weight": (10, 128, 1, 1)}
    assert not selection(shapes).doubts


def test_an_embedding_gives_its_second_axis() -> None:
    shapes: Shapes = {"word_embeddings.weight": (1000, 64), "l.query.weight": (64, 16, 1), "l.key.weight": (64, 16, 1)}
    assert set(selection(shapes).doubts) == {"l.query.weight", "l.key.weight"}


def test_a_shortcut_of_the_same_block_proves_a_layer_dense() -> None:
    shapes: Shapes = {"s.weight": (32, 3, 3, 3), "a.weight": (64, 32, 3, 3), "b.conv1.weight": (64, 32, 3, 3)}
    found = selection(shapes | {"b.conv2.weight": (64, 64, 3, 3), "b.nin_shortcut.weight": (64, 32, 1, 1)})
    assert not found.doubts
    assert {kernel.groups for kernel in found.kernels} == {1}


def test_parameters_of_three_axes_outside_layers_are_no_kernels() -> None:
    shapes: Shapes = {"m.dt_proj_weight": (2, 64, 32), "m.gate_weight": (4, 32, 32), "m.conv.weight": (64, 8, 3)}
    assert list(select(shapes)) == ["m.conv.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "c.rho_kernel",
        "c.weight_sigma",
        "c.weight_epsilon",
        "c.log_sigma2",
        "c.scores",
        "fisher.c.weight",
        "c.weight_fisher",
    ],
)
def test_spreads_and_scores_of_weights_are_no_kernels(name: str) -> None:
    assert list(select({"c.weight": (16, 3, 3, 3), name: (16, 3, 3, 3), "score.weight": (2, 16, 3, 3)})) == [
        "c.weight",
        "score.weight",
    ]


@pytest.mark.parametrize(
    "shapes",
    [
        layer("rpn_cls_score", 24, 512, 1, 1, bias=24) | {"a.weight": (512, 3, 3, 3)},
        layer("importance.0", 32, 64, 3, 3, bias=32),
        {"score.weight": (2, 16, 3, 3)},
        layer("a", 32, 9, 16, bias=32) | layer("b", 32, 9, 32, bias=32) | layer("c", 64, 96, 3, bias=64),
        layer("a", 64, 32, 16, bias=32) | layer("b", 32, 8, 64, bias=8),
        {"a.weight": (32, 1, 80), "b.weight": (64, 32, 3), "c.weight": (64, 64, 1)},
    ],
)
def test_layers_of_such_names_and_shapes_are_kernels(shapes: Shapes) -> None:
    assert len(select(shapes)) == sum(len(shape) > 2 for shape in shapes.values())


def test_stacked_matrices_do_not_make_a_files_layout_another() -> None:
    stacked = {"moe.input_linear.weight": (4, 256, 64), "moe.output_linear.weight": (4, 64, 256)}
    assert list(select({"patch_embed.proj.weight": (64, 3, 16, 16), **stacked})) == ["patch_embed.proj.weight"]


def test_a_bias_outweighs_the_chain_of_layers() -> None:
    layers = [("a", (16, 1, 16)), ("b", (16, 16, 32)), ("c", (16, 32, 64))]
    shapes = {name: shape for at, (*rest, last) in layers for name, shape in layer(at, *rest, last, bias=last).items()}
    with pytest.raises(InputError, match="`layout` hwio"):
        select(shapes)


def test_networks_that_are_stacked_are_no_kernels() -> None:
    stacked = {"a.weight": (7, 23, 200), "a.bias": (7, 200), "b.weight": (7, 200, 18), "b.bias": (7, 1, 18)}
    assert list(select(stacked)) == []
    assert list(select({"a.weight": (5, 16, 2, 9), "a.bias": (5, 16)})) == []
    assert list(select({"a.weight": (8, 16, 9), "a.bias": (8, 1)})) == ["a.weight"]


def test_depthwise_kernels_of_keras_have_no_pairs() -> None:
    info = {"a.kernel": TensorInfo("float32", (16, 3, 3, 3)), "b.depthwise_kernel": TensorInfo("float32", (2, 8, 3, 3))}
    assert [kernel.name for kernel in file_kernels(info, Patterns(layout="hwio")).kernels] == ["a.kernel"]


FOREIGN: dict[str, tuple[Shapes, dict[str, str], str]] = {
    "one axis, in a chain": ({"a.weight": (384, 3, 80), "b.weight": (384, 3, 384)}, {}, "ohwi"),
    "one axis, in another chain": ({"a.w": (7, 1, 32), "b.w": (3, 32, 64), "c.w": (3, 64, 128)}, {}, "hwio"),
    "flax": ({"conv.kernel": (3, 3, 16, 32)}, {"format": "flax"}, "hwio"),
    "keras": ({"conv/kernel": (3, 3, 16, 32)}, {}, "hwio"),
    "tensorflow": ({"conv/kernel:0": (5, 5, 1, 6)}, {}, "hwio"),
    "tensorflow, marked": ({"conv.weight": (16, 8, 3, 3)}, {"format": "tf"}, "hwio"),
    "mlx": ({"conv.weight": (16, 3, 3, 3)}, {"format": "mlx"}, "ohwi"),
    "mlx, unmarked": ({"a.weight": (16, 7, 7, 3), "b.weight": (32, 3, 3, 16)}, {}, "ohwi"),
    "shapes": ({"a.weight": (3, 3, 3, 16), "b.weight": (3, 3, 16, 32)}, {}, "hwio"),
    "one axis, by the bias": (layer("a", 5, 16, 32, bias=32), {}, "hwio"),
    "one axis, by the name": ({"a.kernel": (5, 16, 32)}, {}, "hwio"),
    "three axes": ({"a.weight": (32, 3, 3, 3, 16)}, {}, "ohwi"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_layout_is_refused_with_the_option(kind: str) -> None:
    shapes, metadata, layout = FOREIGN[kind]
    with pytest.raises(InputError, match=f"`layout` {layout}"):
        selection(shapes, metadata=metadata)
    assert select(shapes, Patterns(include=["*"], layout="torch"), metadata)


def test_kernels_of_torch_are_no_other_layout() -> None:
    shapes: Shapes = {"patch.weight": (192, 3, 16, 16), "c.kernel": (8, 192, 3, 3), "eeg.weight": (8, 1, 1, 64)}
    shapes |= {"mask.weight": (3, 3, 7, 7), "wide.weight": (32, 8, 3, 9)}
    assert "patch.weight" in select(shapes, metadata={"format": "pt"})
    assert "c.kernel" in select(shapes)


AXES = {"hwio": [(2, 3, 1, 0), (2, 1, 0), (2, 3, 4, 1, 0)], "ohwi": [(0, 2, 3, 1), (0, 2, 1), (0, 2, 3, 4, 1)]}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("axes", [0, 1, 2], ids=["2-D", "1-D", "3-D"])
@pytest.mark.parametrize("layout", AXES)
def test_a_layout_is_read_and_written_back(
    layout: str, axes: int, suffix: str, tmp_path: Path, convsim: Convsim
) -> None:
    kernel = torch.randn(8, 4, *[(3, 3), (5,), (3, 3, 3)][axes])
    before = {"c.kernel": kernel.permute(AXES[layout][axes]).contiguous(), "c.bias": torch.randn(8)}
    path, out = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    save_file(before, path, {"format": "flax"}) if suffix == "safetensors" else torch.save(before, path)
    options = ("--layout", layout, "--include", "*")
    done = convsim("init", path, "-o", out, "--iterations", 3, *options, "--json").document
    assert done["layers"][0]["shape"] == list(kernel.shape)
    after = {name: (load_file(out) if suffix == "safetensors" else torch.load(out))[name] for name in before}
    minimize_weight_(kernel, iterations=3)
    assert same_bits(after, before | {"c.kernel": kernel.permute(AXES[layout][axes]).contiguous()})


def test_layout_is_for_files_alone(convsim: Convsim) -> None:
    assert "--layout applies only without --arch" in convsim("measure", "--arch", "cnn:4", "--layout", "hwio").error


SKIPPED: dict[str, tuple[Shapes, str]] = {
    "CondConv": ({"b.conv_pw.weight": (4, 38400), "b.routing_fn.weight": (4, 32)}, "bank of flattened kernels"),
    "a bank of any name": ({"experts_w.weight": (8, 1152), "experts_w.bias": (8, 16)}, "bank of flattened kernels"),
    "locally connected": ({"local.weight": (1, 8, 4, 14, 14, 9)}, "locally connected"),
    "Minkowski": ({"sparse.kernel": (27, 16, 32)}, "sparse convolution"),
    "flattened": (
        {"s.0.weight": (27, 4, 16), "s.1.weight": (8, 16, 32), "s.2.weight": (8, 32, 16)},
        "sparse convolution",
    ),
    "spconv": ({"sparse.weight": (32, 3, 3, 3, 16)}, "another framework"),
    "LoRA": ({"c.lora_A.default.weight": (4, 16, 3, 3)}, "adapter"),
    "kohya": ({"lora_unet_c.lora_down.weight": (4, 16, 3, 3), "lora_unet_c.lora_mid.weight": (4, 4, 3, 3)}, "adapter"),
    "LoKr": ({"c.lokr_w2": (40, 40, 3, 3), "c.lokr_t2": (4, 4, 3, 3)}, "adapter"),
    "LoHa": ({"c.hada_t1": (4, 4, 3, 3)}, "adapter"),
    "OFT": ({"c.oft_blocks": (4, 8, 8), "c.oft_r": (4, 8, 8)}, "adapter"),
    "DoRA": ({"c.dora_scale": (1, 16, 1, 1), "c.lora_magnitude_vector.default.weight": (1, 16, 1, 1)}, "adapter"),
    "spectral norm": (
        {"c.weight_bar": (16, 8, 3, 3), "c.weight_u": (16,), "c.weight_v": (72,)},
        "parametrized",
    ),
    "any name's weight_norm": ({"c.w_k_v": (16, 8, 3, 3), "c.w_k_g": (16, 1, 1, 1)}, "parametrized"),
    "parametrizations": ({"c.parametrizations.weight.0.base": (16, 8, 3, 3)}, "parametrized"),
    "a mask of attention": ({"layers.0.attn_mask": (64, 49, 49)}, "named like a statistic, a mask"),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_what_is_no_kernel_is_listed_with_its_reason(kind: str) -> None:
    shapes, reason = SKIPPED[kind]
    found = selection({"a.weight": (16, 3, 3, 3), "b.weight": (16, 16, 3, 3), "fc.weight": (10, 16)} | shapes)
    assert [kernel.name for kernel in found.kernels] == ["a.weight", "b.weight"]
    told = {skipped.name: skipped.reason for skipped in found.skipped}
    assert reason in told[next(iter(shapes))]
    assert "fc.weight" not in told


@pytest.mark.parametrize(
    "name", ["experts.down_proj", "moe.experts.weight", "attn.q_proj.weight", "bilinear.weight", "block.qkv.weight"]
)
def test_stacked_matrices_are_no_conv1d(name: str) -> None:
    assert list(select({"conv.weight": (64, 3, 5), name: (8, 64, 32)})) == ["conv.weight"]
    assert not select({name: (8, 64, 32), "fc.weight": (64, 64)})
    assert "attn.q_proj.weight" in select({"attn.q_proj.weight": (64, 64, 1)})


@pytest.mark.parametrize("taps", [(4000, 1), (33, 32), (1, 1025)])
def test_kernels_of_thousands_of_taps_are_taken_only_if_asked_for(taps: tuple[int, ...]) -> None:
    shapes: Shapes = {"a.weight": (16, 3, 32, 32), "b.weight": (16, 16, *taps)}
    assert list(select(shapes)) == ["a.weight"]
    assert "b.weight" in select(shapes, Patterns(include=["b*"]))


class Asked(dict[str, Kernel]):
    """Kernels, and how often all of their names were asked for."""

    times = 0

    def keys(self) -> KeysView[str]:
        self.times += 1
        return super().keys()


def test_a_guess_compares_all_names_a_bounded_number_of_times() -> None:
    kernels = Asked({f"l{n}.weight": Kernel(f"l{n}.weight", (2, 2, 3, 3), assumed=True) for n in range(50)})
    groups_by_neighbours(list(kernels), kernels, {name: kernel.shape for name, kernel in kernels.items()})
    assert kernels.times < 5


NAMES = {"deep": "a." * 3000 + "weight", "slashes": "a/" * 3000 + "weight", "digits": "b" + "1" * 5000 + ".weight"}


@pytest.mark.parametrize("other", ["a.weight", "z.weight"])
@pytest.mark.parametrize("kind", NAMES)
def test_a_name_may_have_thousands_of_parts_or_digits(kind: str, other: str) -> None:
    assert len(select({NAMES[kind]: (8, 3, 3, 3), other: (8, 8, 3, 3)})) == 2
    assert batch_norms_before({NAMES[kind]: (8,), "z.weight": (8,)}, {"z.weight": 8}) == {}


SORTED_BLOCKS: dict[str, tuple[str, list[Shapes]]] = {  # as safetensors stores them, by name: the doubted layer, a file
    "a grouped layer behind what it feeds": (
        "b1.c3x3_b.weight",
        [
            {"b0.c1x1_a.weight": (256, 3, 1, 1), "b0.c1x1_c1.weight": (320, 256, 1, 1)},
            {"b0.c1x1_c2.weight": (16, 256, 1, 1), "b0.c3x3_b.weight": (256, 8, 3, 3)},
            {"b1.c1x1_a.weight": (512, 320, 1, 1), "b1.c1x1_c1.weight": (256, 512, 1, 1)},
            {"b1.c1x1_w.weight": (320, 320, 1, 1), "b1.c3x3_b.weight": (512, 16, 3, 3)},
        ],
    ),
    "a grouped layer before what feeds it": (
        "b1.conv_dw.weight",
        [
            {"b0.conv.weight": (16, 3, 3, 3)},
            {"b1.conv_dw.weight": (96, 16, 3, 3), "b1.conv_pw.weight": (96, 16, 1, 1)},
            {"b1.conv_pwl.weight": (24, 96, 1, 1)},
        ],
    ),
    "two filters per channel behind a projection": (
        "s1.b1.conv_dw.weight",
        [
            {"stem.weight": (96, 3, 4, 4), "s0.b0.conv.weight": (96, 1, 3, 3)},
            {"s0.b0.fc1.weight": (384, 96), "s0.b0.fc2.weight": (96, 384), "s0.b0.qkv.weight": (288, 96)},
            {"s1.b1.conv_dw.weight": (192, 1, 7, 7), "s1.b1.fc1.weight": (768, 192), "s1.b1.fc2.weight": (192, 768)},
        ],
    ),
    "patches behind layers that they do not follow": (
        "pos_embed.proj.weight",
        [
            {"stem.weight": (8, 3, 3, 3), "embedder.weight": (48, 96)},
            {"pos_embed.proj.weight": (48, 4, 2, 2), "proj_out.weight": (16, 48), "a.to_k.weight": (48, 48)},
            {"norm.weight": (48, 48)},
        ],
    ),
    "the first layer of a second input": (
        "sound.conv.0.weight",
        [
            {"image.0.weight": (64, 3, 3, 3), "image.1.weight": (64, 64, 3, 3)},
            {"sound.conv.0.weight": (64, 1, 3, 3), "sound.conv.2.weight": (64, 1, 3, 3)},
            {"sound.conv.3.weight": (64, 64, 1, 1)},
        ],
    ),
}


@pytest.mark.parametrize("kind", SORTED_BLOCKS)
def test_what_the_order_of_a_file_hides_is_doubted_by_name(kind: str) -> None:
    name, blocks = SORTED_BLOCKS[kind]
    assert name in selection({key: shape for block in blocks for key, shape in block.items()}).doubts


def test_a_padded_depthwise_layer_is_named_by_the_module_around_it() -> None:
    shapes: Shapes = {"layers.0.weight_v": (192, 132, 1), "layers.0.weight_g": (192, 1, 1)}
    for number in (1, 2):
        shapes |= {f"layers.{number}.dwconv.1.weight": (192, 1, 7), f"layers.{number}.pwconv.weight": (192, 192, 1)}
    assert not any(kernel.shape[1] == 1 for kernel in selection(shapes).kernels)


def test_an_encoding_that_a_1x1_layer_reads_is_no_sign_of_groups() -> None:
    blocks = {"b.conv.weight": (192, 3, 3, 3), "c.conv.weight": (192, 192, 3, 3)}
    assert not selection(blocks | {"pos_embed.projection.weight": (192, 64, 1, 1)}).doubts


@pytest.mark.parametrize("part", ["down_" * 1200 + "\n", "conv" * 20_000])
def test_a_name_of_thousands_of_characters_is_judged_in_no_time(part: str) -> None:
    start = process_time()
    selection({f"{part}.weight": (8, 4, 3, 3), f"a.{part}": (8, 4, 3)})
    assert process_time() - start < 1


def test_generators_of_transposed_layers_are_transposed_or_doubted() -> None:
    def generator(normalized: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels, width in pairwise((100, 64, 32, 3)):
            layers += [nn.ConvTranspose2d(channels, width, 4, bias=False)]
            layers += [nn.BatchNorm2d(width)] if normalized and width != 3 else [nn.ReLU()]
        return nn.Sequential(*layers)

    for normalized in (True, False):
        found = selection(shapes_of(generator(normalized)))
        assert all(kernel.transposed or kernel.name in found.doubts for kernel in found.kernels)
        assert len(found.kernels) == 3
    ordinary = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 32, 3), nn.Conv2d(32, 100, 3), nn.Conv2d(100, 3, 3))
    assert not selection(shapes_of(ordinary)).doubts


def test_square_matrices_that_a_bias_contradicts_are_no_transposed_kernels() -> None:
    shapes: Shapes = {"conv1.weight": (30, 16, 16), "conv1.bias": (16,), "conv2.weight": (8, 16, 3)}
    found = selection(shapes)
    assert [kernel.name for kernel in found.kernels] == ["conv2.weight"]
    assert "stacked matrices" in found.skipped[0].reason
