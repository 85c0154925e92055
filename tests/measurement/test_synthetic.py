from __future__ import annotations

import pytest
import torch

from convsim_cli.errors import InputError
from convsim_cli.measurement import synthetic as synthetic_inputs
from convsim_cli.measurement.synthetic import make_inputs


def test_inputs_are_what_their_names_say_and_repeat_with_their_seed() -> None:
    white, uniform, natural = (make_inputs(name, 64, 3, (32, 32), seed=1) for name in ("white", "uniform", "natural"))
    assert abs(white.mean()) < 0.02
    assert abs(white.std() - 1) < 0.02
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() <= 1
    torch.testing.assert_close(natural.mean((2, 3)), torch.zeros(64, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(natural.std((2, 3), correction=0), torch.ones(64, 3))
    assert torch.equal(natural, make_inputs("natural", 64, 3, (32, 32), seed=1))
    assert not torch.equal(natural, make_inputs("natural", 64, 3, (32, 32), seed=2))


@pytest.mark.parametrize("space", [(32, 32), (15, 9), (64,), (8, 6, 5)])
def test_natural_inputs_have_unit_variance_whatever_their_space(space: tuple[int, ...]) -> None:
    natural = make_inputs("natural", 4, 2, space)
    axes = tuple(range(2, 2 + len(space)))
    torch.testing.assert_close(natural.std(axes, correction=0), torch.ones(4, 2))


def test_the_amplitude_of_natural_inputs_falls_as_one_over_f() -> None:
    spectrum = torch.fft.fft2(make_inputs("natural", 4, 2, (32, 32))).abs()
    frequency = (torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.fftfreq(32)[None, :] ** 2).sqrt()
    product = (spectrum * frequency)[..., frequency > 0]
    torch.testing.assert_close(product, product.mean(-1, keepdim=True).expand_as(product), rtol=1e-3, atol=0)


def test_natural_inputs_have_the_phases_of_the_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise, whole = (make_inputs(name, 5, 2, (16, 16), seed=3) for name in ("white", "natural"))
    phases = [torch.fft.fft2(images.double())[..., 1:, :].angle().cos() for images in (noise, whole)]
    torch.testing.assert_close(*phases, rtol=0, atol=1e-4)
    monkeypatch.setattr(synthetic_inputs, "_FILTERED_AT_ONCE", 1000)
    torch.testing.assert_close(make_inputs("natural", 5, 2, (16, 16), seed=3), whole)


def test_a_single_pixel_has_no_spectrum_and_gives_no_nan() -> None:
    assert make_inputs("natural", 2, 1, (1, 1)).isfinite().all()


def test_an_unknown_input_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'natural'"):
        make_inputs("naturel", 1, 1, (4, 4))
