"""What is selected of a model or a file, what is left out and why, and the user's patterns that decide it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape

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
    transposed: these are kernels of transposed convolutions. A pattern that is the name of a tensor stands for that
    tensor alone, whatever characters it has. Raises InputError for a string in place of a list.
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

    def resolved(self, names: Collection[str]) -> Patterns:
        """Return the same patterns with what is literal in these names escaped: `layers[0].weight`, `layers[0].*`.

        Raises InputError for a pattern that matches no name: it would have no effect.
        """
        include, exclude, transposed = (
            [_resolved(pattern, names) for pattern in patterns]
            for patterns in (self.include, self.exclude, self.transposed)
        )
        groups = [(_resolved(pattern, names), count) for pattern, count in self.groups]
        return Patterns(include, exclude, groups, transposed)

    def forced(self, names: Collection[str], left_out: Container[str]) -> set[str]:
        """Return the names that `include` asks for though they are left out: by a pattern that matches no others.

        `*` asks for kernels, not for everything.
        """
        found = [[name for name in names if fnmatchcase(name, pattern)] for pattern in self.include]
        return {name for some in found if all(name in left_out for name in some) for name in some}

    def refusal(self, name: str) -> str | None:
        """Return why the patterns leave the tensor out, or None."""
        if self.include and not matches([name], self.include):
            return "not matched by `include`"
        return "matched by `exclude`" if matches([name], self.exclude) else None


@dataclass
class Selection:
    """The kernels to work on, in their order, and what is left out.

    doubts: a line for each kind of guess that may be wrong, with the names of the layers.
    """

    kernels: list[Kernel] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

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


def _resolved(pattern: str, names: Collection[str]) -> str:
    """Return a pattern, escaped where it is a name, or its brackets where they stand in names."""
    if pattern in names:
        return escape(pattern)
    for meant in (pattern.replace("[", "[[]"), pattern):
        if matches(names, [meant]):
            return meant
    some = [name for name, _ in zip(names, range(3), strict=False)]
    like = f"names look like {', '.join(some)}" if some else "there are no kernels to match"
    raise InputError(f"the pattern {pattern!r} matches no tensor; {like}")
