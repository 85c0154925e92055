"""Wrong arguments of library calls: one line each, which says what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from convsim_cli import (
    ConvSimPenalty,
    InputError,
    TurnMonitor,
    convolutional_similarity,
    dct_,
    decorrelate_,
    init_checkpoint,
    measure,
    measure_checkpoint,
    minimize_,
    minimize_weight_,
    open_checkpoint,
    orthogonalize_,
)
from convsim_cli.closed_forms import dct_weight_, orthogonalize_weight_
from convsim_cli.penalty import LARGEST_BETA
from convsim_cli.settings import declarations
from convsim_cli.training.config import Arguments

IMAGES = torch.randn(2, 3, 8, 8)
Call = Callable[[Any], Any]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def refusal(call: Callable[[], Any]) -> str:
    """What the ValueError says that a call raises."""
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


WITH_MODEL: dict[str, Call] = {
    "ConvSimPenalty": ConvSimPenalty,
    "TurnMonitor": TurnMonitor,
    "measure": lambda model: measure(model, IMAGES),
    "minimize_": minimize_,
    "orthogonalize_": orthogonalize_,
    "dct_": dct_,
    "decorrelate_": lambda model: decorrelate_(model, IMAGES),
}
MODELS: dict[str, tuple[Any, str]] = {
    "None": (None, "None"),
    "parameters": (network().parameters(), "a generator"),
    "state_dict": (network().state_dict(), "an OrderedDict"),
    "class": (nn.Conv2d, "the class Conv2d"),
}


@pytest.mark.parametrize(("model", "found"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("call", WITH_MODEL.values(), ids=WITH_MODEL)
def test_what_is_no_module_is_named(call: Call, model: Any, found: str) -> None:
    assert refusal(lambda: call(model)) == f"`model` is {found}; expected a torch.nn.Module"


@pytest.mark.parametrize(
    "call", [convolutional_similarity, minimize_weight_, orthogonalize_weight_, dct_weight_], ids=lambda f: f.__name__
)
def test_what_is_no_weight_is_named(call: Call) -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert refusal(lambda: call(layer)) == "expected a torch.Tensor, got Conv2d"
    assert refusal(lambda: call(layer.weight.detach().numpy())) == "expected a torch.Tensor, got ndarray"


NAMES = "cs, neighbours, kernel, expected, ocnn, srip, orthoreg"


@pytest.mark.parametrize(("objective", "found"), [(None, "None"), (3, "an int"), (["0.*"], "a list")])
def test_an_objective_that_is_none_is_refused_when_the_penalty_is_made(objective: Any, found: str) -> None:
    assert (
        refusal(lambda: ConvSimPenalty(network(), objective))
        == f"`objective` is {found}; expected a name or a function"
    )


def test_minimizing_takes_objectives_by_name_alone() -> None:
    def own(filters: Any, _: Any) -> Any:
        return filters.square().sum()

    said = f"`objective` is a function; expected a name: {NAMES}"
    assert refusal(lambda: minimize_(network(), objective=own)) == said  # type: ignore[arg-type]
    assert refusal(lambda: minimize_weight_(torch.randn(4, 3, 3, 3), objective=own)) == said  # type: ignore[arg-type]


def test_a_name_in_capitals_is_recognized() -> None:
    assert refusal(lambda: ConvSimPenalty(network(), "CS")) == "unknown `objective` 'CS'; did you mean 'cs'?"
    said = "`optimizer` ADAM: expected adam or sgd; did you mean 'adam'?"
    assert refusal(lambda: init_checkpoint("a.pt", optimizer="ADAM")) == said


@pytest.mark.parametrize("beta", ["0.1", None, [0.1], True, "auto"])
def test_a_beta_that_is_no_number_is_refused(beta: Any) -> None:
    model = network()
    penalty = ConvSimPenalty(model)
    expected = "expected a number or a tensor of one value; `ConvSimPenalty.gradient_ratio` helps to choose it"
    assert refusal(lambda: penalty.add_gradient_(beta)) == f"`beta` {beta!r}: {expected}"
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "1e-3"}, "`lr` is '1e-3'; expected a finite number > 0"),
        ({"lr": True}, "`lr` is True; expected a finite number > 0"),
        ({"iterations": True}, "`iterations` is True; expected a whole number ≥ 0"),
        ({"iterations": None}, "`iterations` is None; expected a whole number ≥ 0"),
        ({"include": [3]}, "`include` contains 3; expected patterns, such as ['layer1.*']"),
        ({"exclude": None}, "`exclude` is None; expected a list of patterns, such as ['layer1.*']"),
        ({"include": 3}, "`include` is an int; expected a list of patterns, such as ['layer1.*']"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused(settings: dict[str, Any], said: str) -> None:
    assert refusal(lambda: minimize_(network(), **settings)) == said


@pytest.mark.parametrize("threshold", [2, -1, 0, float("nan"), "0.9", True, None])
def test_a_threshold_is_a_number_above_0_and_at_most_1(threshold: Any) -> None:
    said = f"`threshold` {threshold!r}: expected a number in (0, 1]"
    assert refusal(lambda: measure(network(), IMAGES, threshold=threshold)) == said


def test_both_calls_name_the_same_range_of_thresholds() -> None:
    said = "`threshold` 2: expected a number in (0, 1]"
    assert refusal(lambda: measure_checkpoint("a.pt", threshold=2)) == said
    assert measure(network(), IMAGES, threshold=1)


@pytest.mark.parametrize("seed", ["a", 1.5, None, -1, 1 << 70])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    said = f"`seed` {seed!r}: expected a whole number from 0 to 2^63 − 1"
    assert refusal(lambda: measure(network(), IMAGES, seed=seed)) == said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_with_nan_or_inf_are_refused(value: float) -> None:
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    said = "0.weight: its feature maps on these {} contain NaN or Inf; check the {}"
    where = "inputs, and the layers before it"
    assert refusal(lambda: measure(network(), images)) == said.format("inputs", where)
    assert refusal(lambda: decorrelate_(network(), images)) == said.format("`images`", "images")


@pytest.mark.parametrize(("images", "found"), [(None, "None"), (3, "an int")])
def test_what_are_no_images_is_named(images: Any, found: str) -> None:
    assert refusal(lambda: measure(network(), images)) == f"`images` is {found}; expected a batch [B, C, …] or several"
    assert refusal(lambda: decorrelate_(network(), images)) == f"`images` is {found}; expected a batch [B, C, …]"


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_an_empty_batch_is_not_decorrelated_on(shape: tuple[int, ...]) -> None:
    said = "`images` is empty; expected a batch of at least one image"
    assert refusal(lambda: decorrelate_(network(), torch.ones(shape))) == said


@pytest.mark.parametrize("wanted", [None, 3])
def test_batch_norm_statistics_that_are_no_name_are_refused(wanted: Any) -> None:
    said = f"unknown `bn_statistics` {wanted!r}: choose from auto, stored, inputs"
    assert refusal(lambda: measure(network(), IMAGES, bn_statistics=wanted)) == said


def test_an_empty_batch_is_named() -> None:
    assert refusal(lambda: measure(network(), IMAGES[:0])) == "batch 1 is empty: [0, 3, 8, 8]"
    assert refusal(lambda: measure(network(), [IMAGES, IMAGES[:0]])) == "batch 2 is empty: [0, 3, 8, 8]"


@pytest.mark.parametrize("bn_statistics", ["stored", "inputs"])
@pytest.mark.parametrize(
    ("images", "found", "reason"),
    [
        (IMAGES[0], "torch.float32 [3, 8, 8]", "expected 4D input (got 3D input)"),
        (IMAGES.half(), "torch.float16 [2, 3, 8, 8]", ""),
        (torch.ones(2, 1, 8, 8), "torch.float32 [2, 1, 8, 8]", ""),
    ],
    ids=["one image", "half", "channels"],
)
def test_images_that_the_model_fails_on_are_described(images: Any, found: str, reason: str, bn_statistics: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError) as caught:
        measure(model, images, bn_statistics=bn_statistics)
    said = str(caught.value)
    assert said.startswith(f"the model fails on images {found} ({reason}")
    assert said.endswith("); expected a batch [B, C, …] that it accepts")


def test_errors_of_a_loader_are_not_laid_on_the_model() -> None:
    def loader() -> Any:
        yield IMAGES
        raise RuntimeError("a worker exited")

    with pytest.raises(RuntimeError, match="a worker exited"):
        measure(network(), loader())


@pytest.mark.parametrize("groups", ["2", None, 2.0, True, [2]], ids=repr)
@pytest.mark.parametrize(
    "call", [convolutional_similarity, minimize_weight_, orthogonalize_weight_, dct_weight_], ids=lambda f: f.__name__
)
def test_a_number_of_groups_is_a_whole_number(call: Call, groups: Any) -> None:
    assert refusal(lambda: call(torch.ones(4, 3, 3, 3), groups)) == f"`groups` is {groups!r}; expected a whole number"


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.ones(4, 3, 3, 3).to_sparse(), "torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(3, 3, 3)], layout=torch.jagged), "nested"),
    ],
    ids=["sparse", "nested"],
)
@pytest.mark.parametrize(
    "call", [convolutional_similarity, minimize_weight_, orthogonalize_weight_, dct_weight_], ids=lambda f: f.__name__
)
def test_a_weight_is_a_dense_tensor(call: Call, weight: torch.Tensor, kind: str) -> None:
    assert refusal(lambda: call(weight)) == f"expected a dense weight, got a {kind} tensor; convert it first"


@pytest.mark.parametrize("images", [IMAGES.to("meta"), IMAGES.int(), IMAGES.cfloat()], ids=["meta", "int", "complex"])
def test_images_are_floating_and_hold_values(images: torch.Tensor) -> None:
    found = f"{'meta ' * images.is_meta}{images.dtype} [2, 3, 8, 8]"
    assert refusal(lambda: decorrelate_(network(), images)) == f"`images` is {found}; expected floating images"
    assert refusal(lambda: measure(network(), images)).startswith(f"batch 1: got {found}; expected floating images")


@pytest.mark.parametrize(
    "images",
    [IMAGES[0, 0, 0, 0], IMAGES.half(), IMAGES.double(), IMAGES.to_sparse(), torch.ones(2, 1, 8, 8), IMAGES[..., :2]],
    ids=["a number", "half", "double", "sparse", "channels", "too small"],
)
def test_images_that_cannot_be_decorrelated_on_are_described(images: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = model[0].weight.detach().clone()
    said = refusal(lambda: decorrelate_(model, images))
    assert said.startswith(f"the model fails on images {images.dtype} {list(images.shape)} (")
    assert torch.equal(model[0].weight, before)


def test_whatever_a_model_raises_is_reported_with_its_images() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images)[[5, 6][len(images)]]

    for call in (measure, decorrelate_):
        said = refusal(lambda call=call: call(Broken(), IMAGES))
        assert said.startswith("the model fails on images torch.float32 [2, 3, 8, 8] (list index out of range)")


@pytest.mark.parametrize(
    "state",
    [
        "x",
        None,
        {"0.weight": [1.0]},
        {"0.weight": None},
        {"0.weight": torch.ones(4, 3, 3, 3).to_sparse()},
        {"0.weight": torch.ones(4, 3, 3, 3, device="meta")},
        {"0.weight": torch.ones(4, 3, 3, 3, dtype=torch.int32)},
        {"0.weight": torch.ones(4, 3, 3, 3, dtype=torch.complex64)},
        {3: torch.ones(4, 3, 3, 3)},
    ],
    ids=str,
)
def test_a_state_of_another_kind_leaves_the_monitor_as_it_was(state: Any) -> None:
    turned = TurnMonitor(network())
    before = turned.state()
    assert "`state`" in refusal(lambda: turned.load_state(state))
    assert all(torch.equal(before[name], was) for name, was in turned.state().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": ("a", 1, 2)}, "`mean` ('a', 1, 2): expected three numbers"),
        ({"std": (1, 2)}, "`std` (1, 2): expected three numbers"),
        ({"groups": {"*": "2"}}, "`groups` '*': '2'; expected a pattern and a whole number"),
        ({"groups": {1: 2}}, "`groups` 1: 2; expected a pattern and a whole number"),
        ({"groups": {"*": 2.0}}, "`groups` '*': 2.0; expected a pattern and a whole number"),
    ],
    ids=str,
)
def test_entries_of_options_have_their_types(options: dict[str, Any], said: str) -> None:
    assert refusal(lambda: measure_checkpoint("a.pt", **options)) == said


@pytest.mark.parametrize("path", [5, [], b"x", "a\0b", ""], ids=repr)
def test_a_path_is_a_string_or_a_path(path: Any) -> None:
    assert refusal(lambda: open_checkpoint(path)) == f"`path` is {path!r}; expected a path"
    assert refusal(lambda: measure_checkpoint(path)) == f"`path` is {path!r}; expected a path"
    assert refusal(lambda: init_checkpoint(path)) == f"`path` is {path!r}; expected a path"
    assert refusal(lambda: init_checkpoint(None, path)) == f"`output` is {path!r}; expected a path"


@pytest.mark.parametrize(
    ("beta", "kind"),
    [
        (torch.tensor(1j), "torch.complex64 []"),
        (torch.ones((), device="meta"), "meta torch.float32 []"),
        (torch.ones(1).to_sparse(), "torch.float32 [1]"),
        (torch.ones(2), "torch.float32 [2]"),
    ],
    ids=["complex", "meta", "sparse", "two"],
)
def test_a_tensor_beta_is_one_real_number(beta: torch.Tensor, kind: str) -> None:
    penalty = ConvSimPenalty(network())
    assert refusal(lambda: penalty.add_gradient_(beta)) == f"`beta` is a {kind} tensor; expected one real number"


def test_the_library_and_a_run_allow_the_same_betas() -> None:
    assert declarations(Arguments)["beta"].most == LARGEST_BETA


def test_numbers_beyond_floats_are_no_numbers() -> None:
    penalty = ConvSimPenalty(network())
    assert refusal(lambda: penalty.add_gradient_(10**400)).startswith("`beta` 1000")
    assert refusal(lambda: minimize_(network(), lr=10**400)).startswith("`lr` is 1000")


def test_preserve_norm_is_true_or_false() -> None:
    said = "`preserve_norm` is 'no'; expected true or false"
    assert refusal(lambda: minimize_weight_(torch.ones(4, 3, 3, 3), preserve_norm="no")) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda filters, _: filters.detach().square().sum(), "does not depend on the filters differentiably"),
        (lambda filters, _: filters.square().sum() * 1j, "returned torch.complex64 []; expected a real scalar tensor"),
    ],
    ids=["detached", "complex"],
)
def test_an_objective_is_real_and_differentiable(objective: Any, said: str) -> None:
    penalty = ConvSimPenalty(network(), objective)
    assert said in refusal(lambda: penalty.add_gradient_(1.0))
