"""What L_CS is invariant under, for any layer that hypothesis can think of."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convsim_cli.similarity import convolutional_similarity

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

Layer = tuple[Tensor, int]


@st.composite
def layers(draw: st.DrawFn, least_filters: int = 1) -> Layer:
    """A weight `[S, C, *taps]` in float64 of one to three axes, and its number of groups; some filters are zero."""
    groups = draw(st.integers(1, 3))
    filters = groups * draw(st.integers(least_filters, 4))
    taps = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda t: math.prod(t) <= 40))
    channels = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(filters, channels, *taps, generator=generator, dtype=torch.float64)
    scales = draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0]), min_size=filters, max_size=filters))
    return weight * torch.tensor(scales, dtype=torch.float64).reshape(-1, *[1] * (weight.ndim - 1)), groups


def check(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-30)


@given(layers(), st.randoms(use_true_random=False))
def test_the_order_of_filters_within_a_group_does_not_matter(layer: Layer, chance: Any) -> None:
    weight, groups = layer
    each = weight.shape[0] // groups
    order = []
    for group in range(groups):
        members = list(range(group * each, (group + 1) * each))
        chance.shuffle(members)
        order += members
    check(convolutional_similarity(weight[order], groups), convolutional_similarity(weight, groups))


@given(layers(), st.integers(0, 2**32 - 1))
def test_mixing_one_filters_channels_orthogonally_does_not_matter(layer: Layer, seed: int) -> None:
    weight, groups = layer
    channels = weight.shape[1]
    noise = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(noise)[0]
    mixed = weight.clone()
    mixed[0] = (rotation @ weight[0].flatten(1)).reshape(weight[0].shape)
    check(convolutional_similarity(mixed, groups), convolutional_similarity(weight, groups))


@given(layers(), st.data())
def test_the_sign_of_a_filter_does_not_matter(layer: Layer, data: st.DataObject) -> None:
    weight, groups = layer
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(weight), max_size=len(weight)))
    flipped = weight * torch.tensor(signs, dtype=torch.float64).reshape(-1, *[1] * (weight.ndim - 1))
    check(convolutional_similarity(flipped, groups), convolutional_similarity(weight, groups))


@given(layers(), st.data())
def test_reflecting_one_filter_through_its_centre_does_not_matter(layer: Layer, data: st.DataObject) -> None:
    weight, groups = layer
    index = data.draw(st.integers(0, len(weight) - 1))
    reflected = weight.clone()
    reflected[index] = weight[index].flip(tuple(range(1, weight.ndim - 1)))
    check(convolutional_similarity(reflected, groups), convolutional_similarity(weight, groups))


@given(layers(), st.data())
def test_flipping_one_axis_of_all_filters_does_not_matter(layer: Layer, data: st.DataObject) -> None:
    weight, groups = layer
    axis = data.draw(st.integers(2, weight.ndim - 1))
    check(convolutional_similarity(weight.flip(axis), groups), convolutional_similarity(weight, groups))


@given(layers(), st.data())
def test_shifting_zero_padded_kernels_does_not_matter(layer: Layer, data: st.DataObject) -> None:
    weight, groups = layer
    padding = [data.draw(st.integers(0, 2)) for _ in range(2 * (weight.ndim - 2))]
    moved = torch.nn.functional.pad(weight, padding)
    check(convolutional_similarity(moved, groups), convolutional_similarity(weight, groups))


@given(layers(), st.sampled_from([1e-3, 0.5, 2.0, 1e3]))
def test_scaling_is_of_degree_four(layer: Layer, scale: float) -> None:
    weight, groups = layer
    check(convolutional_similarity(scale * weight, groups), scale**4 * convolutional_similarity(weight, groups))


@given(layers())
def test_it_is_zero_if_and_only_if_no_group_has_two_filters_that_are_not(layer: Layer) -> None:
    weight, groups = layer
    live = weight.flatten(1).any(1).reshape(groups, -1).sum(1)
    assert bool(convolutional_similarity(weight, groups) == 0) == bool((live <= 1).all())


@settings(max_examples=50)
@given(layers(least_filters=2))
def test_groups_add_up(layer: Layer) -> None:
    weight, groups = layer
    parts = torch.stack([convolutional_similarity(part) for part in weight.chunk(groups)])
    check(convolutional_similarity(weight, groups), parts.sum())
