"""Guesses about kernels of a file that may well be wrong, and the layers that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from convsim_cli.kernels.kernel import Kernel
from convsim_cli.kernels.names import says_transposed
from convsim_cli.kernels.selection import Selection

_NAMED = 3  # layers in a line


def doubts(selection: Selection, depthwise: Sequence[str]) -> list[str]:
    """Return a line for each kind of doubtful guess.

    depthwise: the tensors that are taken for depthwise kernels, in the order of the file.
    """
    return list(_doubts(selection, depthwise))


def _doubts(selection: Selection, depthwise: Sequence[str]) -> Iterator[str]:
    guessed = [kernel for kernel in selection.kernels if kernel.assumed and not kernel.transposed]
    transposed = [kernel for kernel in guessed if says_transposed(kernel.name) and not kernel.pointwise]
    if transposed:
        yield f"perhaps transposed, by their names: {_listed(transposed)}; if so, use `transposed` or `arch`"
    others = [kernel for kernel in guessed if kernel not in transposed]
    grouped = _perhaps_grouped(others, selection)
    if grouped:
        yield (
            f"perhaps grouped, as no layer gives so many channels: {_listed(grouped)}; "
            "`groups` or `arch` sets the number of groups"
        )
    first = [kernel for kernel in selection.skipped if kernel.name in depthwise[:1]]
    if first and guessed and {kernel.shape[1] for kernel in guessed} <= _given(selection):
        yield (
            f"{first[0].name} {list(first[0].shape)} is taken for depthwise, but no other layer takes the images: "
            f"perhaps it is the first layer; if so, use `groups` '{first[0].name}=1' or `arch`"
        )


def _perhaps_grouped(kernels: Sequence[Kernel], selection: Selection) -> list[Kernel]:
    """Return the kernels with fewer channels than any layer gives, of which a layer gives a multiple.

    Layers that take the images are no such: of three channels, else of one, else of as many as the first.
    """
    channels, given = [kernel.shape[1] for kernel in kernels], _given(selection)
    images = next((usual for usual in (3, 1) if usual in channels), channels[0] if channels else 0)
    return [
        kernel
        for kernel, few in zip(kernels, channels, strict=True)
        if few not in given and few != images
        if any(many > few and many % few == 0 and kernel.shape[0] % (many // few) == 0 for many in given)
    ]


def _given(selection: Selection) -> set[int]:
    """Return the numbers of channels that layers give."""
    return {kernel.filters for kernel in selection.kernels} | {skipped.shape[0] for skipped in selection.skipped}


def _listed(kernels: Iterable[Kernel]) -> str:
    every = [f"{kernel.name} {list(kernel.shape)}" for kernel in kernels]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more
