from __future__ import annotations

import pkgutil

import pytest
import torch
from references import LITERAL
from torch import Tensor

import convsim_cli
from convsim_cli import ConvSimPenalty, InputError, minimize_, minimize_weight_
from convsim_cli.objectives import OBJECTIVES, Objective, find_objective
from convsim_cli.similarity import to_filters, to_weight

SHAPES = [((1, 2, 3), 1), ((4, 1, 1, 1), 1), ((5, 3, 3, 2), 1), ((6, 2, 4), 2), ((6, 2, 2, 1, 3), 3), ((3, 2, 3, 3), 3)]


def literal(name: str, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The value of an objective by its own loops, and its gradient by autograd."""
    leaf = weight.clone().requires_grad_()
    value = LITERAL[name](leaf, groups)
    if not value.requires_grad:  # a single filter has no pairs, and no graph
        return value, torch.zeros_like(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def test_every_objective_has_a_literal_reference() -> None:
    assert LITERAL.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_value_and_gradient_are_those_of_the_literal_equation(name: str, shape: tuple[int, ...], groups: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected, expected_gradient = literal(name, weight, groups)
    filters, taps = to_filters(weight, groups)
    objective = find_objective(name)
    torch.testing.assert_close(objective.value(filters, taps), expected, rtol=1e-10, atol=1e-12)
    gradient = to_weight(objective.gradient(filters, taps, None), taps)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_autograd_through_the_value(name: str) -> None:
    filters, taps = to_filters(torch.randn(6, 3, 3, 3, dtype=torch.float64), 2)
    objective, leaf = OBJECTIVES[name], filters.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(leaf, taps), leaf)
    torch.testing.assert_close(objective.gradient(filters, taps, None), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 3, 11, 2)], ids=str)
def test_a_gradient_written_to_given_memory_is_the_same(name: str, shape: tuple[int, ...]) -> None:
    filters, taps = to_filters(torch.randn(shape), 2)
    given = torch.full_like(filters, float("nan"))
    found = OBJECTIVES[name].gradient(filters, taps, given)
    assert found.data_ptr() == given.data_ptr()
    assert torch.equal(given, OBJECTIVES[name].gradient(filters, taps, None))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_builds_no_graph_where_none_is_recorded(name: str) -> None:
    filters, taps = to_filters(torch.randn(4, 3, 3, 3, requires_grad=True))
    with torch.no_grad():
        assert not OBJECTIVES[name].gradient(filters, taps, None).requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_changes_no_value(name: str) -> None:
    filters, taps = to_filters(torch.randn(16, 16, 3, 3))
    plain = OBJECTIVES[name].value(filters, taps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OBJECTIVES[name].value(filters, taps), plain)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("taps", [(3, 3), (9, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e8, 1e9, 1e13, 1e20, 1e30])
def test_only_what_leaves_float32_is_inf(name: str, taps: tuple[int, ...], scale: float) -> None:
    weight = torch.randn(6, 3, *taps)
    mixed = scale / torch.tensor([1, 1e5, 1e10, 1e20, 1e30, 1e35])  # one large filter among small ones
    for scales in (torch.full((6,), scale), mixed, torch.tensor([0.0, scale, 0, 0, 0, 0])):
        scaled = (weight * scales.reshape(-1, 1, 1, 1)).requires_grad_()
        wide = scaled.detach().double().requires_grad_()
        (found, gradient), (expected, expected_gradient) = (
            (value := OBJECTIVES[name].value(*to_filters(w, 2)), torch.autograd.grad(value, w)[0])
            for w in (scaled, wide)
        )
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)
        gradient, wanted = (g.float().clamp(-1e38, 1e38).flatten(1) for g in (gradient, expected_gradient))
        unit = wanted.abs().amax(1, keepdim=True).clamp_min(1e-30)  # filter by filter
        torch.testing.assert_close(gradient / unit, wanted / unit, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_and_infinite_weights_do_not_come_out_as_numbers(name: str) -> None:
    for value in (float("nan"), float("inf")):
        weight = torch.randn(4, 3, 3, 3)
        weight[1, 1, 1, 1] = value
        assert not OBJECTIVES[name].value(*to_filters(weight)).isfinite()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 4, 1, 1), (9, 1, 2, 2)], ids=str)
def test_filters_of_zeros_have_a_zero_gradient_and_the_others_a_number(name: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight[[1, 3]] = 0
    for one in (weight, torch.zeros(shape)):
        filters, taps = to_filters(one)
        assert OBJECTIVES[name].value(filters, taps).isfinite()
        gradient = OBJECTIVES[name].gradient(filters, taps, None)
        assert gradient.isfinite().all()
        assert not gradient[:, [1, 3]].any()


@pytest.mark.parametrize("name", ["srip", "orthoreg"])
def test_filters_of_zeros_take_no_part(name: str) -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    weight[4] = 0
    values = [OBJECTIVES[name].value(*to_filters(one)) for one in (weight, weight[:4])]
    torch.testing.assert_close(*values)


def test_srip_is_close_to_the_spectral_norm_and_starts_alike_everywhere() -> None:
    rows = torch.linalg.qr(torch.randn(27, 6, dtype=torch.float64))[0].T * torch.tensor([[1, 1.1, 1, 1, 1, 2]]).T
    filters, taps = to_filters(rows.reshape(6, 3, 3, 3))
    torch.testing.assert_close(OBJECTIVES["srip"].value(filters, taps).item(), 3.0, rtol=1e-3, atol=0)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    OBJECTIVES["srip"].value(filters, taps)
    torch.set_rng_state(state)
    assert OBJECTIVES["srip"].value(filters, taps) == OBJECTIVES["srip"].value(torch.cat([filters, filters])[:1], taps)


def test_orthogonal_filters_of_norm_1_are_what_ocnn_and_srip_want() -> None:
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    for name in ("ocnn", "srip"):
        filters, taps = to_filters(rows[:6, :, None, None])
        torch.testing.assert_close(OBJECTIVES[name].value(filters, taps).item(), 0.0, rtol=0, atol=1e-10)
        assert OBJECTIVES[name].gradient(filters, taps, None).isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_work_under_the_transforms_of_torch_func(name: str) -> None:
    filters, taps = to_filters(torch.randn(5, 2, 3, 3, dtype=torch.float64))
    value = OBJECTIVES[name].value
    gradient = torch.func.grad(lambda f: value(f, taps))(filters)
    torch.testing.assert_close(gradient, OBJECTIVES[name].gradient(filters, taps, None), rtol=1e-8, atol=1e-10)
    batch = torch.stack([filters, 2 * filters])
    many = torch.func.vmap(lambda f: value(f, taps))(batch)
    torch.testing.assert_close(many, torch.stack([value(f, taps) for f in batch]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_can_be_differentiated_again(name: str) -> None:
    filters, taps = to_filters(torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradgradcheck(lambda f: OBJECTIVES[name].value(f, taps), filters.detach().requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_norms_alone_are_marked_for_pointwise_kernels(name: str) -> None:
    filters, taps = to_filters(torch.randn(4, 8, 1, 1, dtype=torch.float64))
    mixed = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    turned = filters.clone()
    turned[:, 0] = turned[:, 0] @ mixed  # another direction of the same norm
    value = OBJECTIVES[name].value
    same = torch.allclose(value(turned, taps), value(filters, taps), rtol=1e-9)
    assert same == OBJECTIVES[name].norm_only_pointwise


@pytest.mark.parametrize("name", ["ocnn", "srip"])
@pytest.mark.parametrize("scale", [1e-20, 0.577, 1e20])
def test_with_norms_held_ocnn_and_srip_see_directions_alone(name: str, scale: float) -> None:
    filters, taps = to_filters(torch.randn(6, 3, 3, 3, dtype=torch.float64), 2)
    unit = filters / torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    wanted = OBJECTIVES[name].tangent_gradient(unit, taps, None, None) / scale
    found = OBJECTIVES[name].tangent_gradient((scale * unit).float(), taps, None, None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_srip_with_norms_held_makes_fresh_filters_more_orthogonal() -> None:
    weight = torch.nn.Conv2d(64, 64, 3).weight.detach()  # of norm 0.577

    def excess() -> float:
        rows = torch.nn.functional.normalize(weight.flatten(1))
        return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(64), 2).item()

    before, norms = excess(), weight.flatten(1).norm(dim=1)
    minimize_weight_(weight, iterations=100, preserve_norm=True, objective="srip")
    assert excess() < before / 2
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), norms)


def test_one_entry_in_the_table_is_enough_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Objective(
        "squares", "for this test", lambda f, _: f.square().sum(), lambda f, _, out: torch.mul(f, 2, out=out), False
    )
    monkeypatch.setitem(OBJECTIVES, added.name, added)
    assert find_objective("squares") is added
    with pytest.raises(InputError, match="'squares'"):
        find_objective("square")


def test_an_unknown_objective_is_refused_with_the_closest_name() -> None:
    with pytest.raises(InputError, match="'neighbour'; did you mean 'neighbours'"):
        find_objective("neighbour")


def test_the_table_is_in_the_order_of_the_documentation_and_keyed_by_name() -> None:
    assert list(OBJECTIVES) == ["cs", "neighbours", "kernel", "expected", "ocnn", "srip", "orthoreg"]
    assert all(objective.name == name for name, objective in OBJECTIVES.items())


def test_docstrings_of_the_library_name_every_objective() -> None:
    for public in (ConvSimPenalty, minimize_, minimize_weight_):
        for name in OBJECTIVES:
            assert f"`{name}`" in (public.__doc__ or ""), (public.__name__, name)


@pytest.mark.parametrize("name", [*convsim_cli.__all__, "closed_forms.orthogonalize_weight_"])
def test_docstrings_of_the_library_send_the_reader_nowhere_else(name: str) -> None:
    said = pkgutil.resolve_name(f"convsim_cli.{name}").__doc__
    assert said
    for elsewhere in ("module's head", "OBJECTIVES", "Minimization", "FIGURES", "living_filters", "dct_method"):
        assert elsewhere not in said
