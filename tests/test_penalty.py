from __future__ import annotations

import pytest
import torch
from references import literal_neighbouring_similarity, literal_similarity
from torch import Tensor, nn

from convsim_cli import ConvSimPenalty, convolutional_similarity
from convsim_cli.errors import InputError
from convsim_cli.objectives import OBJECTIVES


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(4, 3, 2), nn.Flatten()
    )


def grown(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_penalty_is_the_literal_equation_10_summed_over_the_layers() -> None:
    model = network().double()
    expected = literal_similarity(model[0].weight) + literal_similarity(model[2].weight, 2)
    expected = expected + literal_similarity(model[3].weight.transpose(0, 1))
    torch.testing.assert_close(ConvSimPenalty(model)(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adding_the_gradient_directly_equals_backward_through_the_penalty(
    objective: str, beta: float | Tensor, layout: torch.memory_format
) -> None:
    model = network().to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(2, 3, 8, 8)
    penalty = ConvSimPenalty(model, objective)
    (model(images).square().sum() + 0.3 * penalty()).backward()
    expected = grown(model)
    model.zero_grad()
    model(images).square().sum().backward()
    penalty.add_gradient_(beta)
    for found, wanted in zip(grown(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_neighbours_are_what_the_authors_code_sums() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3)).double()
    expected = literal_neighbouring_similarity(model[0].weight)
    torch.testing.assert_close(ConvSimPenalty(model, "neighbours")(), expected, rtol=1e-10, atol=0)


def test_gradients_accumulate_and_missing_ones_are_made() -> None:
    model = network()
    penalty = ConvSimPenalty(model)
    penalty.add_gradient_(1.0)
    once = grown(model)
    penalty.add_gradient_(1.0)
    for first, both in zip(once, grown(model), strict=True):
        torch.testing.assert_close(both, 2 * first)


def test_frozen_kernels_get_no_gradient() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    ConvSimPenalty(model).add_gradient_(1.0)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_the_logged_value_is_equation_10_whatever_the_objective() -> None:
    model = network()
    value = ConvSimPenalty(model, "neighbours").value()
    assert not value.requires_grad
    torch.testing.assert_close(value, ConvSimPenalty(model)().detach())


def test_half_models_take_their_gradient_in_kind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3)).bfloat16()
    ConvSimPenalty(model).add_gradient_(1.0)
    weight = model[0].weight
    assert weight.grad is not None
    exact = weight.detach().float().requires_grad_()
    convolutional_similarity(exact).backward()
    assert exact.grad is not None
    assert torch.equal(weight.grad, exact.grad.bfloat16())


def test_autocast_leaves_the_penalty_in_full_precision() -> None:
    model = network()
    penalty = ConvSimPenalty(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penalty(), penalty())
        cast = penalty()
    assert torch.equal(cast, penalty())


def test_a_model_without_pairs_and_an_unknown_objective_are_refused() -> None:
    with pytest.raises(InputError, match="no convolution kernels"):
        ConvSimPenalty(nn.Linear(3, 3))
    with pytest.raises(InputError, match="did you mean 'neighbours'"):
        ConvSimPenalty(network(), "neighbors")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, as it resumes after a break
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_model_has_the_same_penalty_and_a_compiled_loss_can_hold_it(objective: str) -> None:
    model = network()
    plain = ConvSimPenalty(model, objective)
    compiled = ConvSimPenalty(torch.compile(model, backend="eager"), objective)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled().detach(), plain().detach())

    @torch.compile(backend="aot_eager")
    def loss(images: torch.Tensor) -> torch.Tensor:
        return model(images).square().mean() + 1e-3 * plain()

    images = torch.randn(2, 3, 8, 8)
    loss(images).backward()
    found = grown(model)
    model.zero_grad()
    (model(images).square().mean() + 1e-3 * plain()).backward()
    for ours, expected in zip(found, grown(model), strict=True):
        torch.testing.assert_close(ours, expected)


def test_accumulated_gradients_take_the_penalty_once_a_step() -> None:
    model, images = network(), torch.randn(4, 3, 8, 8)
    penalty = ConvSimPenalty(model)
    (model(images).square().mean() + 1e-2 * penalty()).backward()
    expected = grown(model)
    model.zero_grad()
    for part in images.split(2):
        (model(part).square().mean() / 2).backward()
    penalty.add_gradient_(1e-2)
    for ours, whole in zip(grown(model), expected, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)
