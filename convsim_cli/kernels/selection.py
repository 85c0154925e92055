"""What is selected of a model or a file, what is left out and why, and the user's patterns that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import Kernel


@dataclass(frozen=True)
class Skipped:
    """A tensor that is left out, and why.

    unsupported: convsim cannot act on it as it is. Otherwise it has no pairs, counts elsewhere, or you left it out.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    unsupported: bool = False


@dataclass(frozen=True)
class Patterns:
    """The user's corrections, as globs over full tensor names (`layer1.*`).

    include: only these, and of these also 3-D and 5-D tensors; exclude: not these; groups: (glob, number of groups);
    transposed: these are kernels of transposed convolutions. Raises InputError for a string in place of a list.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()
    transposed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "transposed"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise InputError(f"`{name}` is the string {value!r}; expected a list of patterns, such as [{value!r}]")

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError for a pattern that matches no name: it would have no effect."""
        names = list(names)
        for pattern in [*self.include, *self.exclude, *self.transposed, *(glob for glob, _ in self.groups)]:
            if not matches(names, [pattern]):
                like = f"names look like {', '.join(names[:3])}" if names else "there are no kernels to match"
                raise InputError(f"the pattern {pattern!r} matches no tensor; {like}")

    def refusal(self, name: str) -> str | None:
        """Return why the patterns leave the tensor out, or None."""
        if self.include and not matches([name], self.include):
            return "not matched by `include`"
        return "matched by `exclude`" if matches([name], self.exclude) else None


@dataclass
class Selection:
    """The kernels to work on, in their order, and what is left out."""

    kernels: list[Kernel] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, kernel: Kernel, reason: str | None = None, unsupported: bool = False) -> None:
        """Select the kernel, or list it as skipped where there is a reason or it has no pairs."""
        without_pairs = _without_pairs(kernel)
        if reason:
            self.skipped.append(Skipped(kernel.name, kernel.shape, reason, unsupported and without_pairs is None))
        elif without_pairs:
            self.skipped.append(Skipped(kernel.name, kernel.shape, without_pairs))
        else:
            self.kernels.append(kernel)


def _without_pairs(kernel: Kernel) -> str | None:
    if kernel.pairs:
        return None
    if kernel.groups > 1:
        return "depthwise: one filter per group, no pairs" + (" (assumed from its shape)" if kernel.assumed else "")
    return "a single filter, no pairs"


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    patterns = list(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
