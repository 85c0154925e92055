"""The penalty in loops that it was not written for: hooks, wrappers, devices, processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.penalty import ConvSimPenalty


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))


def freeze_filters(parameter: Tensor) -> None:
    def keep(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:2] = 0
        return gradient

    parameter.register_hook(keep)


def clip(parameter: Tensor) -> None:
    parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def double_after(parameter: Tensor) -> None:
    def double(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= 2

    parameter.register_post_accumulate_grad_hook(double)


@pytest.mark.parametrize("hook", [freeze_filters, clip, double_after])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("computed", [False, True])
def test_gradient_hooks_run_as_in_backward(
    hook: Callable[[Tensor], None], beta: float | Tensor, computed: bool
) -> None:
    model = two_layers()
    if computed:
        for layer in model:
            nn.utils.parametrizations.weight_norm(layer)
        model[1].parametrizations.weight.original0 = nn.Parameter(torch.rand(4, 1, 1, 1))
    for parameter in model[0].parameters():
        hook(parameter)
    penalty = ConvSimPenalty(model)
    (beta * penalty()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    penalty.add_gradient_(beta)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=1e-4, atol=1e-7)


class Halved(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def test_a_hook_runs_once_on_what_several_layers_give_a_parameter() -> None:
    model, scale, calls = two_layers(), nn.Parameter(torch.ones(1)), []
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", Halved(scale))
    scale.register_hook(calls.append)
    ConvSimPenalty(model).add_gradient_(1.0)
    assert scale.grad is not None
    assert [call.item() for call in calls] == [scale.grad.item()]


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_gradients_have_the_type_that_a_parameter_asks_for(hooked: bool, dtype: torch.dtype | None) -> None:
    model = two_layers().bfloat16()
    for layer in model:
        layer.weight.grad_dtype = dtype
    if hooked:
        clip(model[0].weight)
    penalty = ConvSimPenalty(model)
    for _ in range(2):
        penalty.add_gradient_(0.1)
    assert {layer.weight.grad.dtype for layer in model} == {dtype or torch.bfloat16}


def products(filters: Tensor, _: tuple[int, ...]) -> Tensor:
    return filters.flatten(2).square().sum()


@pytest.mark.parametrize("objective", [*OBJECTIVES, products])
def test_penalties_are_copied_and_pickled_with_their_model(objective: str) -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model, objective)
    penalty.add_gradient_(1.0)
    saved = io.BytesIO()
    torch.save((model, penalty), saved)
    saved.seek(0)
    for theirs, copied in (
        copy.deepcopy((model, penalty)),
        pickle.loads(pickle.dumps((model, penalty))),
        torch.load(saved, weights_only=False),
    ):
        theirs.zero_grad()
        copied.add_gradient_(1.0)
        assert all(torch.equal(a.weight.grad, b.weight.grad) for a, b in zip(theirs, model, strict=True))
        assert copied().item() == penalty().item()


def test_offloaded_weights_are_refused_by_name() -> None:
    penalty = ConvSimPenalty(model := two_layers())
    model[1].to("meta")
    for call in (penalty, penalty.value, penalty.gradient_ratio, lambda: penalty.add_gradient_(1.0)):
        with pytest.raises(InputError, match=r"^1\.weight is on the meta device and has no values"):
            call()
    assert model[0].weight.grad is None


def compile_block(model: nn.Sequential) -> nn.Module:
    model[0][0] = torch.compile(model[0][0], backend="eager")  # type: ignore[assignment]
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    return model


def wrap_parallel(model: nn.Sequential) -> nn.Module:
    model[0] = nn.DataParallel(model[0])
    return nn.DataParallel(model)


def checkpoint_block(model: nn.Sequential) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model[0] = checkpoint_wrapper(model[0])
    return model


@pytest.mark.parametrize("wrap", [compile_block, wrap_parallel, checkpoint_block])
def test_layers_that_are_wrapped_or_unwrapped_later_are_followed(wrap: Callable[[nn.Sequential], nn.Module]) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(two_layers(), nn.Conv2d(4, 3, 3))

    model = build()
    penalty = ConvSimPenalty(model)
    expected = penalty().item()
    wrapped = wrap(model)
    assert penalty().item() == expected
    wrapped_first = ConvSimPenalty(wrapped)
    assert wrapped_first().item() == expected
    names = [kernel.name for kernel in wrapped_first._kernels]
    plain = build()
    wrapped_first._model = plain
    assert wrapped_first().item() == ConvSimPenalty(plain)().item(), names


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 9, 9))])
def test_scripted_and_traced_modules_are_left_out_with_the_reason(make: Callable[[nn.Module], nn.Module]) -> None:
    scripted = make(two_layers())
    with pytest.warns(UserWarning, match=r"0\.0\.weight, 0\.1\.weight \(scripted or traced"):
        penalty = ConvSimPenalty(nn.Sequential(scripted, nn.Conv2d(4, 3, 3)))
    assert [kernel.name for kernel in penalty._kernels] == ["1.weight"]
    with pytest.raises(InputError, match=r"^the model is scripted or traced"):
        ConvSimPenalty(scripted)
    model = nn.Sequential(two_layers(), nn.Conv2d(4, 3, 3))
    penalty = ConvSimPenalty(model)
    model[0] = scripted
    with pytest.raises(InputError, match=r"0\.0\.weight: .* no longer in the model"):
        penalty()
