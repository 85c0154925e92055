from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from references import literal_neighbouring_similarity, literal_similarity
from torch import Tensor, nn
from torch.nn.utils import prune

from convsim_cli.errors import InputError
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.similarity import convolutional_similarity


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
@pytest.mark.parametrize("beta", [0.3, torch.full((1,) * 5, 0.3)], ids=["number", "tensor"])
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


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_preserving_gradient_has_no_part_along_a_filter(objective: str, layout: torch.memory_format) -> None:
    model = network().to(memory_format=layout)  # type: ignore[call-overload]
    weights = [weight for weight in model.parameters() if weight.ndim == 4]
    former = [weight.detach().clone() for weight in weights]
    penalty = ConvSimPenalty(model, objective)
    axes = [(0, 2, 3) if weight is model[3].weight else (1, 2, 3) for weight in weights]
    norms = [torch.linalg.vector_norm(was, dim=over, keepdim=True) for was, over in zip(former, axes, strict=True)]
    if objective not in ("ocnn", "srip"):  # these two are those of the directions K_i / ‖K_i‖
        norms = [torch.ones_like(norm) for norm in norms]
    with torch.no_grad():
        for weight, norm in zip(weights, norms, strict=True):
            weight /= norm
    (0.3 * penalty()).backward()
    expected = []
    for weight, over, norm in zip(weights, axes, norms, strict=True):
        filters, gradient = weight.detach().double(), weight.grad.double()
        inner, squares = ((x * filters).sum(over, keepdim=True) for x in (gradient, filters))
        expected.append(((gradient - inner / squares * filters) / norm).float())
    with torch.no_grad():
        for weight, was in zip(weights, former, strict=True):
            weight.copy_(was)
    model.zero_grad()
    penalty.add_gradient_(0.3, preserve_norm=True)
    for weight, was, wanted in zip(weights, former, expected, strict=True):
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-3, atol=1e-6)
        assert torch.equal(weight, was)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_norm_preserving_gradients_of_vanished_filters_are_finite(objective: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[0].weight[1:4] *= torch.tensor([0, 1e-25, 1e-19]).reshape(3, 1, 1, 1)
    ConvSimPenalty(model, objective).add_gradient_(1.0, preserve_norm=True)
    assert all(gradient.isfinite().all() for gradient in grown(model))
    assert model[1].weight.grad.any() != OBJECTIVES[objective].norm_only_pointwise


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("directly", [True, False])
def test_dead_filters_stay_dead(objective: str, directly: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with torch.no_grad():
        model[0].weight[[1, 4, 5, 6, 7]] *= torch.tensor([1e-12, 1e-25, 0, 1e-25, 1e-30]).reshape(5, 1, 1, 1)
    penalty = ConvSimPenalty(model, objective)
    penalty.add_gradient_(1.0) if directly else penalty().backward()
    gradient = model[0].weight.grad
    assert gradient.isfinite().all()
    assert gradient[[1, 4, 5, 6, 7]].abs().max() <= 1e-10 * gradient[[0, 2, 3]].abs().max()


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_the_gradient_ratio_is_that_of_the_task_to_the_penalty(preserve_norm: bool, computed: bool) -> None:
    model = network().double()
    if computed:
        nn.utils.parametrizations.weight_norm(model[2])
    penalty = ConvSimPenalty(model, "kernel")
    penalty.add_gradient_(1.0, preserve_norm)
    alone = torch.cat([gradient.flatten() for gradient in grown(model)])
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8).double()).square().sum().backward()
    held = [p.grad.flatten() for name, p in model.named_parameters() if "bias" not in name]
    before = grown(model)
    found = penalty.gradient_ratio(preserve_norm)
    torch.testing.assert_close(found.double(), torch.cat(held).norm() / alone.norm(), rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(grown(model), before, strict=True))


def test_a_gradient_ratio_without_a_gradient_is_refused() -> None:
    model = network()
    penalty, images = ConvSimPenalty(model), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"^no parameter behind the kernels has a gradient; call it after `backward"):
        penalty.gradient_ratio()
    model(images).square().sum().backward()
    assert penalty.gradient_ratio() > 0
    model.zero_grad()
    with pytest.raises(InputError, match="no parameter behind the kernels has a gradient"):
        penalty.gradient_ratio()


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


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_model_and_a_compiled_loss_have_the_same_penalty(objective: str) -> None:
    model = network()
    plain = ConvSimPenalty(model, objective)
    compiled = ConvSimPenalty(torch.compile(model, backend="eager"), objective)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled().detach(), plain().detach())

    @torch.compile(backend="aot_eager", fullgraph=True)
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


def effective(model: nn.Module) -> float:
    """Eq. 10 of the weights that a forward pass computes with, in evaluation mode."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda layer, *_: seen.update({layer: layer.weight.detach().clone()}))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    training = model.training
    model.eval()(torch.randn(1, 3, 9, 9))
    model.train(training)
    for handle in handles:
        handle.remove()
    return sum(convolutional_similarity(weight).item() for weight in seen.values())


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))


def assign_state(model: nn.Sequential) -> None:
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def replace_layer(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(3, 8, 5)
    model[1] = nn.Conv2d(8, 4, 3)


def add_weight_norm(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)


def add_old_weight_norm(model: nn.Sequential) -> None:
    nn.utils.weight_norm(model[0])
    with torch.no_grad():
        model[0].weight_g.mul_(3)


def prune_weights(model: nn.Sequential) -> None:
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.2)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)


def add_spectral_norm(model: nn.Sequential) -> None:
    nn.utils.parametrizations.spectral_norm(model[0])


def add_old_spectral_norm(model: nn.Sequential) -> None:
    nn.utils.spectral_norm(model[0])


CHANGES = [
    assign_state,
    replace_layer,
    add_weight_norm,
    prune_weights,
    add_spectral_norm,
    pytest.param(add_old_weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")),
    add_old_spectral_norm,
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_penalty_follows_changes_of_the_model(
    change: Callable[[nn.Sequential], None],
) -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model)
    change(model)
    model.eval()
    expected = pytest.approx(effective(model), rel=1e-5)
    assert penalty().item() == expected
    assert penalty.value().item() == expected


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_reach_the_parameters_that_the_model_has_after_a_change(
    change: Callable[[nn.Sequential], None],
) -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model)
    change(model)
    model.eval()  # no power iteration between the two
    (0.3 * penalty()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any("bias" in name for name in expected)
    assert len(expected) >= 2
    model.zero_grad()
    penalty.add_gradient_(0.3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_descending_the_penalty_lowers_the_similarity_of_the_changed_model(
    change: Callable[[nn.Sequential], None],
) -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model)
    change(model)
    before = effective(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(1, 3, 9, 9)).mean().mul(0).backward()  # the graph behind a computed weight is freed
        penalty.add_gradient_(1.0)
        optimizer.step()
    assert effective(model) < before


class Counting(nn.Module):
    """A parametrization that counts how often the weight is computed."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return 2 * weight


def test_a_parametrized_weight_is_computed_once_per_call() -> None:
    model = two_layers()
    counting = Counting()
    nn.utils.parametrize.register_parametrization(model[0], "weight", counting, unsafe=True)
    counting.calls = 0
    penalty = ConvSimPenalty(model)
    assert counting.calls == 0
    for count, call in enumerate((penalty, penalty.value, lambda: penalty.add_gradient_(1.0)), start=1):
        call()
        assert counting.calls == count


@pytest.mark.parametrize("add", [add_spectral_norm, add_old_spectral_norm])
def test_logging_the_value_does_not_advance_a_power_iteration(add: Callable[[nn.Sequential], None]) -> None:
    model = two_layers()
    add(model)
    penalty = ConvSimPenalty(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    penalty.value()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_parameters_of_a_frozen_parametrized_layer_get_no_gradient() -> None:
    model = two_layers()
    add_weight_norm(model)
    model[0].requires_grad_(False)
    ConvSimPenalty(model).add_gradient_(1.0)
    assert all(parameter.grad is None for parameter in model[0].parameters())
    assert model[1].weight.grad is not None


@pytest.fixture
def mesh() -> Iterator[object]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_refused_before_and_after_the_penalty_is_made(mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    model = two_layers()
    penalty = ConvSimPenalty(model)
    fully_shard(model, mesh=mesh)  # type: ignore[call-overload]
    for call in (penalty, penalty.value, lambda: penalty.add_gradient_(1.0), lambda: ConvSimPenalty(model)):
        with pytest.raises(InputError, match=r"0\.weight is a DTensor"):
            call()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(3, 3), r"1\.weight: .* is now a Linear"),
        (nn.LazyConv2d(4, 3), r"1\.weight: lazy"),
        (None, "no longer"),
    ],
)
def test_a_layer_that_cannot_be_followed_changes_no_gradient(layer: nn.Module | None, reason: str) -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model)
    if layer is None:
        del model[1]
    else:
        model[1] = layer
    for call in (penalty, penalty.value, lambda: penalty.add_gradient_(1.0)):
        with pytest.raises(InputError, match=reason):
            call()
    assert model[0].weight.grad is None


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    model = two_layers()
    penalty = ConvSimPenalty(model)
    plain = model[0].weight.detach().clone()
    del model[0].weight
    model[0].weight = plain
    with pytest.raises(InputError, match=r"0\.weight: its weight is not a parameter"):
        penalty()


@pytest.mark.parametrize(
    "beta",
    [-0.1, float("nan"), float("inf"), 4e38, pytest.param(10**400, id="10^400"), torch.tensor(-1.0), torch.ones(2)],
)
def test_a_beta_that_is_no_weight_is_refused_and_changes_nothing(beta: float | Tensor) -> None:
    model = two_layers()
    with pytest.raises(InputError, match="`beta`"):
        ConvSimPenalty(model).add_gradient_(beta)
    assert not grown(model)


def test_a_large_whole_number_is_a_beta_like_any_other() -> None:
    whole, real = two_layers(), two_layers()
    real.load_state_dict(whole.state_dict())
    ConvSimPenalty(whole).add_gradient_(10**30)
    ConvSimPenalty(real).add_gradient_(1e30)
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(whole.parameters(), real.parameters(), strict=True)
        if a.grad is not None
    )


@pytest.mark.parametrize("beta", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def test_beta_is_applied_before_the_gradient_is_rounded_to_half_precision(beta: float | Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64, 3, 3))
    ConvSimPenalty(model).add_gradient_(beta)  # the gradient itself is beyond 65504
    exact = model[0].weight.detach().float().requires_grad_()
    convolutional_similarity(exact).backward()
    assert exact.grad is not None
    assert exact.grad.abs().max() > 65504
    torch.testing.assert_close(model[0].weight.grad, (1e-3 * exact.grad).half())


def test_patterns_select_the_layers_of_the_penalty() -> None:
    model = two_layers()
    only = convolutional_similarity(model[1].weight).item()
    assert ConvSimPenalty(model, include=["1.*"])().item() == pytest.approx(only)
    assert ConvSimPenalty(model, exclude=["0.*"])().item() == pytest.approx(only)
    with pytest.raises(InputError, match="matches no tensor"):
        ConvSimPenalty(model, include=["2.*"])
    with pytest.raises(InputError, match=r"`include` is the string '1\.\*'"):
        ConvSimPenalty(model, include="1.*")


def test_every_layer_that_no_pattern_leaves_out_is_named_in_one_warning() -> None:
    from torchvision.ops import DeformConv2d

    model = nn.ModuleDict(
        {
            "fine": nn.Conv2d(3, 4, 3),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "lazy": nn.LazyConv2d(4, 3),
            "deformed": DeformConv2d(3, 8, 3),
            "whole": nn.Conv2d(3, 4, 3, dtype=torch.complex64),
            "excluded": nn.LazyConv2d(4, 3),
        }
    )
    with pytest.warns(UserWarning) as caught:
        ConvSimPenalty(model, exclude=["excluded*"])
    assert len(caught) == 1
    said = str(caught[0].message)
    assert all(f"{name}.weight" in said for name in ("lazy", "deformed", "whole"))
    assert said.endswith("depthwise.weight (depthwise: one filter per group, no pairs)")
    assert not any(name in said for name in ("fine", "excluded"))
    assert caught[0].filename == __file__


def test_looking_the_weights_of_resnet50_up_takes_well_under_a_millisecond() -> None:
    with torch.device("meta"):
        penalty = ConvSimPenalty(torchvision.models.resnet50())
    assert min(timeit.repeat(penalty._layers, number=1, repeat=20)) < 1e-3


def inner_products(filters: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Kernel orthogonality, as a user would write it."""
    assert filters.shape[2] == taps[0] * taps[1]
    rows = filters.flatten(2)
    products = rows @ rows.mT
    return products.square().triu(1).sum()


def test_an_objective_of_the_users_own_is_penalized_like_a_known_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 3)).double()
    own, known = ConvSimPenalty(model, inner_products), ConvSimPenalty(model, "kernel")
    assert own().item() == pytest.approx(known().item(), rel=1e-12)
    for preserve_norm in (False, True):
        found = []
        for penalty in (own, known):
            model.zero_grad()
            penalty.add_gradient_(0.1, preserve_norm)
            found.append([layer.weight.grad.clone() for layer in model])
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10)
    model.zero_grad()
    (0.1 * own()).backward()
    summed = [layer.weight.grad.clone() for layer in model]
    model.zero_grad()
    own.add_gradient_(0.1)
    assert all(torch.allclose(layer.weight.grad, was) for layer, was in zip(model, summed, strict=True))


def test_an_objective_that_returns_no_scalar_is_named() -> None:
    penalty = ConvSimPenalty(nn.Sequential(nn.Conv2d(3, 4, 3)), lambda filters, taps: filters)
    with pytest.raises(
        InputError, match=r"`objective` <lambda>: returned torch.float32 \[1, 4, 9, 3\]; expected a real scalar"
    ):
        penalty()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weight_that_is_nan_shows_in_every_objective(objective: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    assert ConvSimPenalty(model, objective)().isnan()


def test_a_transform_that_does_not_reach_the_penalty_is_refused() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8)
    penalty = ConvSimPenalty(model)
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (images,)).square().mean() + penalty()

    with pytest.raises(InputError, match="does not reach this penalty"):
        torch.func.grad(loss)(values)

    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return penalty()

    (found,) = torch.func.grad(lambda v: torch.func.functional_call(Penalized(), v, ()))(
        {"model.0.weight": values["0.weight"]}
    ).values()
    penalty().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


def test_another_preserve_norm_is_refused() -> None:
    penalty = ConvSimPenalty(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(InputError, match="`preserve_norm` is 'no'; expected true or false"):
        penalty.add_gradient_(1e-3, preserve_norm="no")  # type: ignore[arg-type]
