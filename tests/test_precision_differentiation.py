"""Every objective under what torch does around a call: torch.func, torch.compile, fake tensors, meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from references import LITERAL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from convsim_cli.objectives import OBJECTIVES
from convsim_cli.similarity import convolutional_similarity, similarity_gradient, to_filters

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp

Function = Callable[[Tensor], Tensor]
TAPS = [(3,), (2, 2), (6, 1)]  # by Gram product and, the last ones, by FFT


def objective(name: str, groups: int = 2) -> Function:
    return lambda weight: OBJECTIVES[name].value(*to_filters(weight, groups))


def literal(name: str, groups: int = 2) -> Function:
    return lambda weight: LITERAL[name](weight, groups)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=product(OBJECTIVES, TAPS), ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Function, Function, Tensor]:
    """An objective, its literal equation, and three weights to call them on."""
    name, taps = request.param
    return objective(name), literal(name), torch.randn(3, 4, 2, *taps, dtype=torch.float64)


Case = tuple[Function, Function, Tensor]


def test_grad_and_vmap_give_what_the_literal_equation_gives(case: Case) -> None:
    found, expected, weights = case
    assert_same(grad(found)(weights[0]), grad(expected)(weights[0]))
    assert_same(vmap(found)(weights), torch.stack([expected(weight) for weight in weights]))
    assert_same(vmap(grad(found))(weights), torch.stack([grad(expected)(weight) for weight in weights]))


def test_jvp_gives_what_the_literal_equation_gives(case: Case) -> None:
    found, expected, weights = case
    for ours, theirs in zip(*(jvp(f, (weights[0],), (weights[1],)) for f in (found, expected)), strict=True):
        assert_same(ours, theirs)
    with forward_ad.dual_level():
        ours = forward_ad.unpack_dual(found(forward_ad.make_dual(weights[0], weights[1]))).tangent
    assert ours is not None
    assert_same(ours, jvp(expected, (weights[0],), (weights[1],))[1])
    tangents = vmap(lambda w, t: jvp(found, (w,), (t,))[1])(weights, weights.flip(0))
    assert_same(
        tangents, torch.stack([jvp(expected, (w,), (t,))[1] for w, t in zip(weights, weights.flip(0), strict=True)])
    )


def test_hessians_of_every_kind_give_what_the_literal_equation_gives(case: Case) -> None:
    found, expected, weights = case
    wanted = hessian(expected)(weights[0])
    assert_same(hessian(found)(weights[0]), wanted)
    assert_same(jacfwd(jacfwd(found))(weights[0]), wanted)  # torch gives 0 for a Function whose jvp does not take care
    assert_same(jacrev(jacrev(found))(weights[0]), wanted)
    assert_same(torch.autograd.functional.hessian(found, weights[0], vectorize=True), wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_third_derivatives_are_right_in_every_mixture_of_modes(name: str) -> None:
    weight = torch.randn(3, 1, 3, dtype=torch.float64)
    wanted = jacrev(jacrev(grad(literal(name, 1))))(weight)
    for outer, middle, inner in product((jacrev, jacfwd), repeat=3):
        assert_same(outer(middle(inner(objective(name, 1))))(weight), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_changes_no_derivative(name: str) -> None:
    weight, function = torch.randn(6, 3, 3, 3), objective(name)
    derivatives = (grad(function), hessian(function), lambda w: torch.autograd.functional.hessian(function, w))
    plain = [derivative(weight) for derivative in derivatives]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [derivative(weight) for derivative in derivatives]
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_compiles_into_one_graph(name: str) -> None:
    layer, images = torch.nn.Conv2d(3, 6, 3), torch.randn(2, 3, 8, 8)

    def loss(images: Tensor) -> Tensor:
        return layer(images).square().mean() + 1e-3 * objective(name, 1)(layer.weight)

    expected = torch.autograd.grad(loss(images), layer.weight)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(images), layer.weight)
    torch.testing.assert_close(found, expected)


def test_one_compiled_graph_serves_other_shapes() -> None:
    compiled = torch.compile(convolutional_similarity, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in [(6, 4, 3, 3), (8, 5, 3, 3), (8, 5, 12, 2)]:
        weight = torch.randn(shape)
        torch.testing.assert_close(compiled(weight), convolutional_similarity(weight))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_transforms_and_compilation_go_together(name: str) -> None:
    transforms = {"grad": grad, "vmap": vmap, "jvp": lambda f: lambda w: jvp(f, (w,), (w,))[1]}
    function = transforms[name](convolutional_similarity)
    weight = torch.randn(2, 4, 2, 3) if name == "vmap" else torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(weight), function(weight))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """A device for fake tensors: this build of torch may refuse CUDA, without a GPU, even for those."""
    try:
        with FakeTensorMode():
            torch.ones(2, 2, device=request.param).T.contiguous()
    except RuntimeError as error:
        pytest.skip(f"no fake tensors on {request.param}: {error}")
    return str(request.param)


@pytest.mark.parametrize("taps", [(3, 2), (9, 9)], ids=str)
def test_fake_tensors_leave_nothing_behind_and_find_nothing_real(device: str, taps: tuple[int, ...]) -> None:
    taps = (*taps, 1 + len(device))  # no other test has them: nothing is there before

    def values(device: str) -> list[Tensor]:
        weight = torch.ones(5, 3, *taps, device=device)
        gradient = similarity_gradient(*to_filters(weight))
        return [convolutional_similarity(weight), gradient.sum()]

    for _ in range(2):
        with FakeTensorMode():
            found = values(device)
        assert [(value.device.type, value.shape) for value in found] == 2 * [(device, ())]
        found = values("cpu")
        assert {type(value) for value in found} == {Tensor}
        assert found[0] > 0


def test_fake_tensors_have_a_backward_pass() -> None:
    with FakeTensorMode():
        weight = torch.empty(5, 3, 3, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(convolutional_similarity(weight), weight)
    assert gradient.shape == weight.shape


@pytest.mark.parametrize("taps", [(3, 4), (8, 9)], ids=str)
def test_a_default_device_and_a_transform_leave_nothing_behind(taps: tuple[int, ...]) -> None:
    weight = torch.randn(5, 3, *taps, dtype=torch.float64)
    expected = grad(convolutional_similarity)(weight)
    with torch.device("meta"):
        convolutional_similarity(weight)
    vmap(convolutional_similarity)(weight[None])
    leaf = weight.clone().requires_grad_()
    assert_same(torch.autograd.grad(convolutional_similarity(leaf), leaf)[0], expected)


def test_meta_tensors_give_a_meta_scalar() -> None:
    weight = torch.empty(8, 4, 3, 3, device="meta", requires_grad=True)
    value = convolutional_similarity(weight)
    assert (value.device.type, value.shape, value.dtype) == ("meta", (), torch.float32)
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.shape == weight.shape
    filters, taps = to_filters(weight.detach())
    assert similarity_gradient(filters, taps).device.type == "meta"
