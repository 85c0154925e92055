"""Layers that compute in `forward` the weight that they convolve with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any

import pytest
import torch
from references import literal_similarity
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv_transpose2d

from convsim_cli import ConvSimPenalty, convolutional_similarity, dct_, decorrelate_, measure, minimize_
from convsim_cli.errors import InputError
from convsim_cli.kernels import module_kernels
from convsim_cli.measurement.feature_maps import PaperSimilarity


class Masked(nn.Conv2d):
    """Of PixelCNN: sees only what stands above and to the left, and masks its weight in place, as many do."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 1:] = mask[:, :, 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(input)


class Gated(nn.Conv1d):
    """Multiplies its weight by a gain per filter, and adds a ReLU."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.randn(self.out_channels, 1, 1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return conv1d(input, weight=self.weight * self.gain, bias=self.bias, padding=1).relu()


class Upward(nn.ConvTranspose2d):
    """Standardizes the weight of a transposed convolution."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return conv_transpose2d(input, weight, self.bias, self.stride, self.padding).tanh()


class Convolving(nn.Conv2d):
    """Overrides what convolves, not `forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * torch.sin(weight), bias)


class Padding(nn.Conv2d):
    """Uses its weight as it is, and normalizes: not computed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, input: Tensor) -> Tensor:
        normalized: Tensor = self.norm(super().forward(nn.functional.pad(input, (1, 1, 1, 1))))
        return normalized.relu()


def quantized(fused: bool = True) -> nn.Module:
    from torch.ao.nn.intrinsic.qat import ConvBnReLU2d
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import get_default_qat_qconfig

    layer = (ConvBnReLU2d if fused else Conv2d)(3, 8, 3, qconfig=get_default_qat_qconfig("fbgemm"))
    if fused:
        layer.bn.running_var.uniform_(0.5, 2)
    return layer


COMPUTED = {
    "StdConv2d": lambda: StdConv2d(3, 8, 3, bias=True),
    "StdConv2dSame": lambda: StdConv2dSame(3, 8, 3, stride=2),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(3, 8, 3, groups=1),
    "masked": lambda: Masked(3, 8, 3),
    "gated": lambda: Gated(3, 8, 3),
    "transposed": lambda: Upward(3, 8, 3, stride=2, padding=1),
    "_conv_forward": lambda: Convolving(3, 8, 3, padding=1, padding_mode="circular"),
    "quantized": lambda: quantized(False),
    "quantized and fused": quantized,
    "parametrized too": lambda: nn.utils.parametrizations.weight_norm(StdConv2d(3, 8, 3)),
}
QUANTIZATION = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning"),
]
pytestmark = QUANTIZATION


def shifted(kind: str) -> nn.Module:
    """A layer whose weight has a large mean, which some take out again."""
    layer = COMPUTED[kind]()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("weight", "original1")):
                parameter += 0.7
    return layer.eval()


def convolved(layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the result of the layer's last convolution, found by replacing torch's functions."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function in (conv1d, conv2d, conv_transpose2d):
                given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
                bias = given["bias"]
                maps = result if bias is None else result - bias.view(-1, *[1] * (result.ndim - 2))
                seen.append((given["weight"].clone(), maps))
            return result

    with torch.no_grad(), Watch():
        layer(images)
    return seen[-1]


def images_for(layer: Any) -> Tensor:
    return torch.randn(4, 3, *[9] * len(layer.kernel_size))


def literal(layer: Any, weight: Tensor) -> Tensor:
    return literal_similarity(weight.double().transpose(0, 1) if layer.transposed else weight.double(), layer.groups)


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_layer_is_measured_by_the_weight_that_it_computes(kind: str) -> None:
    layer = shifted(kind)
    images, before = images_for(layer), {name: t.clone() for name, t in layer.state_dict().items()}
    (record,) = measure(layer, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    weight, maps = convolved(layer, images)
    assert record["cs"] == pytest.approx(literal(layer, weight).item(), rel=1e-4)
    expected = PaperSimilarity()
    expected.update(maps)
    assert record["fm_cos"] == pytest.approx(expected.fm_cos, rel=1e-3)
    assert record["fm_corr_random"] is not None


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_penalty_is_that_of_the_computed_weight_and_of_its_gradient(kind: str) -> None:
    layer = shifted(kind)
    weight, _ = convolved(layer, images_for(layer))
    penalty = ConvSimPenalty(layer)
    assert penalty().item() == pytest.approx(literal(layer, weight).item(), rel=1e-4)
    assert penalty.value().item() == pytest.approx(penalty().item(), rel=1e-6)
    (0.1 * penalty()).backward()
    expected = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    penalty.add_gradient_(0.1)
    assert expected
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("change", [lambda model: minimize_(model, 1), dct_], ids=["minimize_", "dct_"])
def test_a_computed_weight_is_not_written_and_the_reason_given(
    kind: str, change: Callable[[nn.Module], object]
) -> None:
    model = nn.Sequential(shifted(kind))
    model(images_for(model[0]))  # masks the weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reason = "computed in the forward of a "
    with pytest.warns(UserWarning, match=rf"skips 0\.weight \({reason}"):
        assert change(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_uses_its_weight_as_it_is_can_be_written() -> None:
    model, images = nn.Sequential(Padding(3, 8, 3)), torch.randn(4, 3, 9, 9)
    assert [kernel.computed for kernel in module_kernels(model).kernels] == [False]
    assert ConvSimPenalty(model)._layers()[0][1] is model[0].weight
    (record,) = measure(model, images)
    expected = PaperSimilarity()
    expected.update(convolved(model, images)[1])
    assert record["fm_cos"] == pytest.approx(expected.fm_cos, rel=1e-4)
    with torch.no_grad():
        decorrelate_(model, images)
        correlation = convolved(model, images)[1].transpose(0, 1).flatten(1).corrcoef()
    assert torch.allclose(correlation, torch.eye(8), atol=1e-4)


def test_a_weight_is_looked_at_once_until_something_changes_its_use() -> None:
    class Sometimes(nn.Conv2d):
        calls, doubled = 0, False

        def forward(self, input: Tensor) -> Tensor:
            Sometimes.calls += 1
            return conv2d(input, 2 * self.weight if self.doubled else self.weight)

    layer = Sometimes(3, 8, 3)
    penalty = ConvSimPenalty(layer)
    expected = penalty().item()
    before = Sometimes.calls
    for _ in range(3):
        penalty.add_gradient_(0.0)
    assert Sometimes.calls == before
    layer.doubled = True
    assert penalty().item() == pytest.approx(16 * expected)


class Gained(nn.Conv2d):
    """Multiplies its weight by a gain that is 1 at first."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return conv2d(input, self.weight * self.gain)


def test_a_weight_times_a_gain_of_1_is_computed_all_the_same() -> None:
    layer = Gained(3, 8, 3)
    penalty = ConvSimPenalty(layer)
    penalty().backward()
    assert layer.gain.grad is not None
    with torch.no_grad():
        layer.gain.fill_(0.5)
    assert penalty().item() == pytest.approx(literal_similarity(layer.weight.detach().double() / 2).item(), rel=1e-5)
    with pytest.warns(UserWarning, match="convsim skips weight"):
        assert minimize_(layer, iterations=1) == []


class Merging(nn.Conv2d):
    """Of loralib: `eval` adds the update to the weight itself, and `train` subtracts it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.update, self.merged = nn.Parameter(torch.full_like(self.weight, 0.1)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.update.data if mode else self.update.data
            self.merged = not mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        return conv2d(input, self.weight if self.merged else self.weight + self.update)


@pytest.mark.filterwarnings("ignore:convsim skips 0.update")
def test_looking_at_a_model_does_not_merge_its_updates() -> None:
    model = nn.Sequential(Merging(3, 8, 3))
    before = model[0].weight.detach().clone()
    penalty = ConvSimPenalty(model)
    measure(model, torch.randn(2, 3, 9, 9))
    with torch.no_grad():
        penalty.value()
    assert torch.equal(model[0].weight, before)
    assert (model[0].merged, model[0].training) == (False, True)
    penalty().backward()
    assert model[0].update.grad is not None


def test_looking_at_a_noisy_weight_leaves_the_generator_as_it_was() -> None:
    class Noisy(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return conv2d(input, self.weight + 0.1 * torch.randn_like(self.weight))

    model, images = nn.Sequential(Noisy(3, 8, 3)), torch.randn(2, 3, 9, 9)
    before = torch.get_rng_state()
    penalty = ConvSimPenalty(model)
    penalty.value()
    measure(model, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_switching_quantization_on_is_followed() -> None:
    from torch.ao.quantization import disable_fake_quant, enable_fake_quant

    layer = quantized(False)
    layer.apply(disable_fake_quant)
    penalty = ConvSimPenalty(layer)
    plain = penalty().item()
    layer.apply(enable_fake_quant)
    assert penalty().item() != plain


def test_the_penalty_changes_nothing_in_a_layer_that_it_runs() -> None:
    for kind in COMPUTED:
        layer = shifted(kind).train()
        penalty = ConvSimPenalty(layer)
        before = {name: t.clone() for name, t in layer.state_dict().items() if "parametrizations" not in name}
        penalty.add_gradient_(0.1)
        assert all(torch.equal(layer.state_dict()[name], was) for name, was in before.items()), kind


@pytest.mark.parametrize(
    "fullgraph",
    [
        pytest.param(
            False,
            marks=pytest.mark.xfail(
                torch.__version__.startswith("2.6."),
                reason="torch 2.6 raises what newer versions leave out of the graph",
            ),
        ),
        True,
    ],
)
def test_a_compiled_loss_computes_the_weight_outside_of_the_graph(fullgraph: bool) -> None:
    model = nn.Sequential(StdConv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    plain = ConvSimPenalty(model)
    expected = plain().item()
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=fullgraph)
    def loss(images: Tensor) -> Tensor:
        return model(images).mean().mul(0) + plain()

    if fullgraph:
        with pytest.raises(Exception, match=r"torch\.compile cannot trace"):
            loss(torch.randn(2, 3, 9, 9))
    else:
        assert loss(torch.randn(2, 3, 9, 9)).item() == pytest.approx(expected)


def test_a_layer_that_only_pads_by_itself_compiles_into_one_graph() -> None:
    model = nn.Sequential(Padding(3, 8, 3))
    plain = ConvSimPenalty(model)

    @torch.compile(backend="eager", fullgraph=True)
    def loss(images: Tensor) -> Tensor:
        return model(images).mean().mul(0) + plain()

    assert loss(torch.randn(2, 3, 9, 9)).item() == pytest.approx(plain().item())


class Dynamic(nn.Conv2d):
    """Has a weight for each image."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        weight = (self.weight * scale).flatten(0, 1)
        return conv2d(input.flatten(0, 1)[None], weight, groups=len(input))


class Failing(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        raise ValueError("needs 7 images")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Dynamic(3, 8, 3), r"a Dynamic, whose forward uses no convolution weight \[8, 3, 3, 3\]"),
        (Failing(3, 8, 3), r"a Failing, whose forward fails on zeros \[2, 3, 3, 3\] \(needs 7 images\)"),
    ],
)
def test_a_layer_whose_weight_cannot_be_found_is_left_out(layer: nn.Module, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ConvSimPenalty(layer)
    with pytest.warns(UserWarning, match=reason), suppress(InputError, ValueError):
        measure(layer, torch.randn(2, 3, 9, 9))


class Bank(nn.Module):
    """Convolves with a parameter of its own, in a function of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bank, self.bias, self.gain = (nn.Parameter(torch.randn(*s)) for s in (shape, (4, 8), (8, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return conv2d(images, self.bank.view(-1, 3, 3, 3))


def test_no_parameter_that_might_be_a_kernel_is_missing_from_both_lists() -> None:
    import timm
    from timm.layers import CondConv2d

    model = nn.ModuleDict(
        {
            "routed": CondConv2d(3, 8, 3, num_experts=4, bias=True),
            "bank": Bank(8, 3, 3, 3),
            "flat": Bank(4, 216),
            "parametrized": nn.utils.parametrizations.weight_norm(Bank(8, 3, 3, 3), "bank"),
            "local": LocallyConnected(),
            "list": nn.ParameterList([nn.Parameter(torch.randn(8, 3, 3, 3))]),
        }
    )
    skipped = {entry.name: entry for entry in module_kernels(model).skipped}
    names = ("routed.weight", "bank.bank", "flat.bank", "parametrized.bank", "local.weights", "list.0")
    assert set(skipped) == set(names)
    assert all("not a convolution that convsim knows" in entry.reason for entry in skipped.values())
    assert skipped["routed.weight"].shape == (4, 216)
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_cc_b0_4e")
    selection = module_kernels(network)
    known = {entry.name for entry in [*selection.kernels, *selection.skipped]}
    assert known >= {name for name, p in network.named_parameters() if p.ndim == 4 or name.endswith("conv_pw.weight")}
    assert not known & {name for name, _ in network.named_parameters() if name.endswith("bias") or ".bn" in name}


class LocallyConnected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(1, 8, 3, 4, 4, 9))


def test_transformers_hold_no_kernels_but_those_of_convolutions() -> None:
    import timm

    with torch.device("meta"):
        for name in ("vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"):
            model = timm.create_model(name)
            skipped = module_kernels(model).skipped
            assert {entry.reason for entry in skipped} <= {"depthwise: one filter per group, no pairs"}, name


class Adapted(nn.Module):
    """As peft wraps a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(3, 8, 3)
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(3, 2, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, 8, 1, bias=False)})
        self.lokr_w2 = nn.ParameterDict({"default": nn.Parameter(torch.randn(4, 4, 3, 3))})


def test_an_update_of_another_weight_is_no_layer() -> None:
    selection = module_kernels(nn.Sequential(Adapted()))
    assert [kernel.name for kernel in selection.kernels] == ["0.base_layer.weight"]
    assert {entry.name: entry.reason.partition(":")[0] for entry in selection.skipped} == {
        "0.lora_A.default.weight": "lora_A",
        "0.lora_B.default.weight": "lora_B",
        "0.lokr_w2.default": "lokr_w2",
    }


@pytest.mark.parametrize("how", ["prune", "weight_norm"])
@pytest.mark.filterwarnings("ignore")
def test_looking_leaves_the_weight_whose_graph_a_user_holds(how: str) -> None:
    layer = nn.Conv2d(3, 8, 3)
    if how == "prune":
        torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    else:
        torch.nn.utils.weight_norm(layer)
    layer(torch.randn(1, 3, 8, 8))
    weight, penalty = layer.weight, ConvSimPenalty(nn.Sequential(layer))
    penalty.value()
    assert layer.weight is weight
    assert weight.requires_grad


def test_a_convolution_patched_on_the_layer_itself_is_seen() -> None:
    layer = nn.Conv2d(3, 8, 3)

    def centered(_: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(images, weight - weight.mean(), bias)

    layer._conv_forward = MethodType(centered, layer)  # type: ignore[method-assign]
    expected = convolutional_similarity(layer.weight - layer.weight.mean())
    torch.testing.assert_close(ConvSimPenalty(nn.Sequential(layer))(), expected)
