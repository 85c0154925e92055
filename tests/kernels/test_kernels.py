from __future__ import annotations

import pytest
import torch
from torch import nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, Selection, TensorInfo, file_kernels, living_filters, module_kernels


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("float32", shape) for name, shape in shapes.items()}


def taken(selection: Selection) -> list[str]:
    return [kernel.name for kernel in selection.kernels]


def reasons(selection: Selection) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in selection.skipped}


def test_a_file_gives_its_4d_floating_tensors_as_assumed_dense_kernels() -> None:
    tensors = infos(conv=(8, 3, 3, 3), linear=(10, 8), bias=(8,)) | {"codes": TensorInfo("int8", (8, 3, 3, 3))}
    found = file_kernels(tensors)
    assert found.kernels == [Kernel("conv", (8, 3, 3, 3), 1, False, assumed=True)]
    assert reasons(found) == {"codes": "its dtype int8 cannot be optimized"}


def test_of_single_channel_tensors_one_is_dense_and_several_are_depthwise() -> None:
    assert file_kernels(infos(stem=(8, 1, 3, 3))).kernels[0].groups == 1
    found = file_kernels(infos(a=(8, 1, 3, 3), b=(16, 1, 3, 3)))
    assert not found.kernels
    assert reasons(file_kernels(infos(a=(8, 1, 3, 3), b=(16, 1, 3, 3), c=(0, 1, 3, 3))))["c"] == "empty"
    assert all("depthwise" in reason and "assumed" in reason for reason in reasons(found).values())


def test_only_tensors_that_would_be_taken_count_for_the_depthwise_guess() -> None:
    others = {"a.weight_g": (32, 1, 1, 1), "b.weight_mask": (32, 1, 3, 3), "c": (8, 1, 5)}
    found = file_kernels(infos(stem=(32, 1, 3, 3), tied=(32, 1, 3, 3), **others), unfit={"tied": "shared with stem"})
    assert [(kernel.name, kernel.groups) for kernel in found.kernels] == [("stem", 1)]
    assert "pruning" in reasons(found)["b.weight_mask"]
    audio = file_kernels(infos(a=(16, 1, 31), b=(16, 1, 31)), Patterns(include=["*"]))
    assert taken(audio) == ["a"]
    assert "depthwise" in reasons(audio)["b"]


def test_patterns_correct_the_guesses_and_given_groups_are_not_assumed() -> None:
    tensors = infos(a=(8, 1, 3, 3), b=(8, 4, 3, 3), up=(6, 4, 2, 2))
    found = file_kernels(tensors, Patterns(groups=[("a", 4), ("b", 2)], transposed=["up"]))
    assert [(k.name, k.groups, k.transposed, k.assumed) for k in found.kernels] == [
        ("a", 4, False, False),
        ("b", 2, False, False),
        ("up", 1, True, True),
    ]
    assert found.kernels[2].filters == 4


def test_include_restricts_and_lets_3d_and_5d_tensors_join() -> None:
    tensors = infos(audio=(8, 4, 5), image=(8, 4, 3, 3), video=(8, 4, 3, 3, 3))
    assert taken(file_kernels(tensors)) == ["image"]
    assert "`include`" in reasons(file_kernels(tensors))["audio"]
    assert taken(file_kernels(tensors, Patterns(include=["audio", "video"]))) == ["audio", "video"]
    assert taken(file_kernels(tensors, Patterns(include=["*"], exclude=["v*"]))) == ["audio", "image"]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="matches no tensor"):
        file_kernels(infos(conv=(8, 3, 3, 3)), Patterns(exclude=["layer9.*"]))


def test_groups_that_do_not_divide_the_filters_are_an_error() -> None:
    with pytest.raises(InputError, match="3 groups do not divide the 8 filters of conv"):
        file_kernels(infos(conv=(8, 3, 3, 3)), Patterns(groups=[("conv", 3)]))


def test_parts_of_weights_and_shared_tensors_are_skipped_with_a_reason() -> None:
    tensors = {"a.weight_v": TensorInfo("float32", (8, 3, 3, 3)), "b": TensorInfo("float32", (8, 3, 3, 3))}
    found = file_kernels(tensors | {"c": tensors["b"]}, unfit={"c": "shared with b"})
    assert taken(found) == ["b"]
    assert reasons(found)["c"] == "shared with b"
    assert "weight_norm" in reasons(found)["a.weight_v"]


def test_a_module_tells_groups_and_transposition_exactly() -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(2, 4, 2), nn.ConvTranspose2d(6, 8, 2, groups=2)
    )
    found = module_kernels(model).kernels
    assert [(k.name, k.groups, k.transposed, k.assumed, k.filters, k.channels) for k in found] == [
        ("0.weight", 1, False, False, 8, 4),
        ("1.weight", 2, False, False, 8, 4),
        ("2.weight", 1, False, False, 4, 2),
        ("3.weight", 2, True, False, 8, 6),
    ]
    assert [kernel.pairs for kernel in found] == [28, 12, 6, 12]


def test_a_module_lists_what_it_skips_with_a_reason() -> None:
    shared = nn.Conv2d(4, 4, 3)
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "single": nn.Conv2d(4, 1, 3),
            "first": shared,
            "second": nn.Conv2d(4, 4, 3),
            "lazy": nn.LazyConv2d(4, 3),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        }
    )
    model["second"].weight = shared.weight
    found = module_kernels(model)
    assert taken(found) == ["first.weight"]
    told = reasons(found)
    assert "depthwise" in told["depthwise.weight"]
    assert "single filter" in told["single.weight"]
    assert told["second.weight"] == "shared with first.weight"
    assert "lazy" in told["lazy.weight"]
    assert "parametrized" in told["spectral.weight"]


@pytest.mark.parametrize(("groups", "shape"), [(1, (6, 4, 3, 2)), (2, (6, 4, 3, 3)), (3, (6, 2, 5))])
def test_transposed_kernels_swap_their_axes_per_group_and_come_back(groups: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    kernel = Kernel("up", shape, groups, transposed=True)
    convolution = kernel.to_convolution(weight)
    each_in, each_out = shape[0] // groups, shape[1]
    for g in range(groups):
        for i in range(each_in):
            for o in range(each_out):
                assert torch.equal(convolution[g * each_out + o, i], weight[g * each_in + i, o])
    assert torch.equal(kernel.to_stored(kernel.to_filters(weight), weight.dtype), weight)


@pytest.mark.parametrize("patterns", [Patterns(include=["a"]), Patterns(exclude=["b"])])
def test_patterns_do_not_turn_a_depthwise_layer_into_a_dense_one(patterns: Patterns) -> None:
    found = file_kernels(infos(a=(8, 1, 3, 3), b=(16, 1, 3, 3), c=(8, 8, 1, 1)), patterns)
    assert "a" not in taken(found)
    assert "depthwise" in reasons(found)["a"]


def test_layers_with_kernels_of_an_unknown_kind_are_listed_by_their_class() -> None:
    from torchvision.ops import DeformConv2d

    found = module_kernels(nn.Sequential(nn.Conv2d(3, 18, 3), DeformConv2d(3, 8, 3), nn.Linear(3, 3), nn.LayerNorm(3)))
    assert taken(found) == ["0.weight"]
    assert reasons(found) == {"1.weight": "a DeformConv2d, not a convolution that convsim knows"}


def test_a_file_that_holds_a_shared_weight_under_one_name_gives_one_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    found = module_kernels(model, names={"0.weight": "1.weight", "1.weight": "1.weight"})
    assert taken(found) == ["1.weight"]


WIDE = [(dtype, scale) for dtype in (torch.bfloat16, torch.float32, torch.float64) for scale in (1e-30, 1.0, 1e30)]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1.0), *WIDE])
def test_filters_below_a_millionth_of_the_largest_norm_are_dead(dtype: torch.dtype, scale: float) -> None:
    shares = torch.tensor([1.0, 1e-4, 2e-6, 5e-7, 1e-10, 1e-25, 1e-38, 0.0], dtype=torch.float64)
    weight = (scale * shares.reshape(-1, 1, 1, 1) * torch.ones(8, 3, 3, 3, dtype=torch.float64)).to(dtype)
    kernel = Kernel("conv.weight", (8, 3, 3, 3), groups=2)
    living = living_filters(kernel.to_filters(weight))
    assert living.tolist() == [[True, True, True, False], [False, False, False, False]]


def test_every_filter_of_a_zero_layer_is_dead() -> None:
    assert not living_filters(torch.zeros(1, 4, 9, 3)).any()


NO_EVIDENCE = {
    "statistics of the images": {"mean": (1, 1, 1, 1), "std": (1, 1, 1, 1)},
    "gains of a row": {"a.scale_row": (1, 1, 1, 64), "b.weight": (1, 1, 1, 32)},
    "gains per filter": {"a.weight_scale": (32, 1, 1, 1), "b.weight": (64, 1, 1, 1), "c.gain": (32, 1, 1, 1)},
    "transposed from one to one": {"out.weight": (1, 1, 4, 4), "deconv.weight": (1, 1, 2, 2)},
    "transposed to one": {"deconv3.weight": (32, 1, 4, 4), "decoder.up.2.weight": (16, 1, 3, 3)},
    "fixed kernels": {"toeplitz": (64, 1, 1, 9), "sift.pk.weight": (8, 1, 5, 5), "blur.filt": (32, 1, 3, 3)},
    "buffers beside weights": {"edges": (2, 1, 3, 3), "basis_x": (64, 1, 7, 7)},
    "statistics": {"bn.running_mean": (8, 1, 2, 2), "bn.running_var": (8, 1, 2, 2)},
    "embeddings": {"pos_embed": (8, 1, 14, 14), "attn.relative_position_bias": (8, 1, 49, 49)},
    "gains by name": {"block.gamma": (32, 1, 3, 3), "block.beta": (32, 1, 3, 3), "layer_scale_1": (4, 1, 2, 2)},
    "tokens": {"cls_token": (4, 1, 2, 64), "mask_tokens": (4, 1, 2, 64)},
}


@pytest.mark.parametrize("kind", NO_EVIDENCE)
def test_a_first_layer_of_one_channel_is_dense(kind: str) -> None:
    network = {"stem.weight": (32, 1, 3, 3), "body.weight": (64, 32, 3, 3)}
    found = file_kernels(infos(**network, **NO_EVIDENCE[kind]))
    assert [(kernel.name, kernel.groups) for kernel in found.kernels] == [("stem.weight", 1), ("body.weight", 1)]
    assert set(reasons(found)) == set(NO_EVIDENCE[kind])


def test_two_kernels_of_one_channel_are_depthwise_beside_gains() -> None:
    found = file_kernels(infos(**{"a.weight": (8, 1, 3, 3), "b.weight": (16, 1, 1, 3), "gain": (8, 1, 1, 1)}))
    assert not found.kernels
    assert "depthwise" in reasons(found)["a.weight"]
    assert "depthwise" in reasons(found)["b.weight"]


def test_convolutions_inside_what_is_named_like_an_embedding_stay_kernels() -> None:
    names = ("pos_embed.proj.weight", "mlp_gamma.weight", "style.mlp_beta.weight", "gaussian_head.0.weight")
    found = file_kernels(infos(**dict.fromkeys(names, (8, 4, 3, 3))))
    assert taken(found) == list(names)


def test_a_pattern_can_force_what_is_named_like_a_statistic() -> None:
    tensors = infos(**{"a.weight": (8, 4, 3, 3), "b.gamma": (8, 4, 3, 3)})
    assert taken(file_kernels(tensors, Patterns(include=["*"]))) == ["a.weight"]
    assert taken(file_kernels(tensors, Patterns(include=["*gamma"]))) == ["b.gamma"]


def test_layers_whose_guess_may_well_be_wrong_are_named() -> None:
    resnext = {"stem.weight": (64, 3, 7, 7), "in.weight": (128, 64, 1, 1), "grouped.weight": (128, 4, 3, 3)}
    (line,) = file_kernels(infos(**resnext, out=(4, 128, 1, 1))).guess_warnings
    assert "perhaps grouped" in line
    assert "grouped.weight [128, 4, 3, 3]; `groups`" in line
    unet = {"down.weight": (64, 3, 3, 3), "up1.weight": (64, 32, 2, 2), "decoder.deconv.0.weight": (32, 16, 4, 4)}
    (line,) = file_kernels(infos(**unet)).guess_warnings
    named = "up1.weight [64, 32, 2, 2], decoder.deconv.0.weight [32, 16, 4, 4]"
    assert f"{named}; if so, use `transposed` or `arch`" in line
    real = {"up_l3.0.weight": (20, 20, 2, 2), "ffn.up_proj.weight": (20, 20, 1, 1)}
    (line,) = file_kernels(infos(**real)).guess_warnings
    assert "names: up_l3.0.weight [20, 20, 2, 2]; " in line
    corrected = Patterns(transposed=["up1*", "*deconv*"])
    assert not file_kernels(infos(**unet), corrected).guess_warnings


def test_ordinary_networks_give_no_guess_warnings() -> None:
    plain = {"a.weight": (16, 3, 3, 3), "b.weight": (32, 16, 3, 3)}
    plain |= dict.fromkeys(("upper.weight", "group_conv.weight", "side_conv.weight", "up1.conv.weight"), (16, 32, 1, 1))
    assert not file_kernels(infos(**plain)).guess_warnings
    concatenated = {"a.weight": (16, 3, 3, 3), "b.weight": (32, 16, 3, 3), "c.weight": (16, 48, 1, 1)}
    assert not file_kernels(infos(**concatenated)).guess_warnings


def test_3d_kernels_are_taken_by_themselves_where_there_are_no_4d_ones() -> None:
    audio = {"a.weight": (16, 2, 9), "b.weight": (32, 16, 5), "cls_token": (1, 1, 32), "rel_pos": (8, 32, 32)}
    found = file_kernels(infos(**audio, mean=(1, 1, 1, 1)))
    assert [(kernel.name, kernel.assumed) for kernel in found.kernels] == [("a.weight", True), ("b.weight", True)]
    assert "rel_pos" in reasons(found)
    assert taken(file_kernels(infos(**audio, conv=(8, 3, 3, 3)))) == ["conv"]
    experts = {"a.weight": (16, 2, 9), "experts.w1": (8, 64, 4096), "experts.weight": (8, 64, 4096)}
    assert taken(file_kernels(infos(**experts))) == ["a.weight"]


def test_5d_kernels_are_left_out_with_the_pattern_that_takes_them() -> None:
    found = file_kernels(infos(video=(8, 4, 3, 3, 3)))
    assert reasons(found) == {"video": "5-D: taken for a kernel only by `include` '*'"}
    assert taken(file_kernels(infos(video=(8, 4, 3, 3, 3)), Patterns(include=["*"]))) == ["video"]


def test_a_pattern_that_is_a_name_stands_for_that_tensor() -> None:
    names = ("layers[0].weight", "layers[1].weight", "layers0.weight", "a*.weight", "ab.weight", "what?.weight")
    tensors = infos(**dict.fromkeys(names, (8, 4, 3, 3)))
    for name in names:
        assert taken(file_kernels(tensors, Patterns(include=[name]))) == [name]
    assert taken(file_kernels(tensors, Patterns(include=["layers[0]*"]))) == ["layers[0].weight"]
    assert taken(file_kernels(tensors, Patterns(include=["layers[[]?].weight"]))) == list(names[:2])
    assert taken(file_kernels(tensors, Patterns(include=["a[b].weight"]))) == ["ab.weight"]
    found = file_kernels(tensors, Patterns(include=["layers*"], groups=[("layers[0].weight", 2)]))
    assert [kernel.groups for kernel in found.kernels] == [2, 1, 1]
    model = nn.ModuleDict({"a[0]": nn.Conv2d(4, 8, 3), "a0": nn.Conv2d(4, 8, 3)})
    assert taken(module_kernels(model, Patterns(include=["a[0].weight"]))) == ["a[0].weight"]
