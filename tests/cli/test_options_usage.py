"""What the parser refuses is said as convsim says everything else: the value found, and what was expected."""

from __future__ import annotations

import pytest
from conftest import Convsim


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--optimizer", "foo"), "--optimizer foo: expected adam or sgd"),
        (("init", "--optimizer=adan"), "--optimizer adan: expected adam or sgd; did you mean 'adam'?"),
        (("measure", "--samples", "x"), "--samples x: expected a whole number"),
        (("measure", "--samples", 0), "--samples 0: expected 1 or more"),
        (("measure", "--threshold", 2), "--threshold 2: expected at most 1"),
        (("init", "--lr", "fast"), "--lr fast: expected a number"),
        (("reproduce",), "Missing argument 'NAME'."),
        (("init", "--no-such"), "No such option: --no-such"),
    ],
)
def test_a_refused_value_is_named_with_what_was_expected(
    arguments: tuple[object, ...], said: str, convsim: Convsim
) -> None:
    failed = convsim(*arguments)
    assert failed.code == 2
    assert failed.error.startswith(f"convsim: error: {said}")
