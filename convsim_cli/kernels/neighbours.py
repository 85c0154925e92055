"""Infer a layer's number of groups from its neighbors: those that produce its input and consume its output.

The layers of a file form a chain, in its order (`in_layer_order`). A kernel is dense if the layer before it gives its
channels, and grouped if that gives a multiple, which the kernel keeps, and no layer nearby gives so few. A kernel of
one channel is depthwise if something gives as many channels as it has filters, and a first layer otherwise. Where
something speaks for both, the layer is in doubt.

A name is split at dots and slashes into parts, and a part into words: `conv.RelativePosition_bias2` has the parts conv
and RelativePosition_bias2, and the latter the words relative, position and bias.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from convsim_cli.kernels.kernel import Kernel

WEIGHT = re.compile(r"weights?|kernels?|w")  # the last word of a kernel's name, where it has any of these
PERHAPS_MULTIPLIED = "perhaps depthwise with several filters per channel"
PERHAPS_GROUPED = "perhaps grouped, by the channels of the layers around them"
PERHAPS_FIRST = "of one channel, so depthwise or a first layer, which the layers around them do not tell"

_DEEPEST = 100  # modules around a tensor
_LONGEST = 200  # characters of a part: the time that patterns take on a hostile one grows with its third power
_SQUEEZE = re.compile(r"(?i)(.*_)?(se|squeeze\w*|excit\w*|attn|attention|ca|gate)(_.*|\d*)")
_DOWNWARD = re.compile(r"(?i)(.*_)?(sr|down\w*|reduc\w*|patch\w*|pool\w*|stem|embed\w*|proj\w*|merg\w*)(_.*|\d*)")
_ENCODING = re.compile(r"(?i)(.*_)?(encoder|subsampl\w*|extractor)(_.*|\d*)")
_SHORTCUT = re.compile(r"(?i)(.*_)?shortcut\d*|skip\w*|identity|residual|project")  # beside other layers of its block
_GROUPED = re.compile(r"(conv)?(dw|depthwise|grouped?|grp)(conv)?\d*")  # a word in a layer's own part
_SPLIT = re.compile(r"(?i)paths?\d*|branch(es)?\d*|splits?\d*")  # a part of layers that may share out their input
_TABLE = re.compile(r"emb|embeds?|embeddings?|wte|wpe")  # a word in the own part of a table: its second axis goes on


def name_parts(name: str) -> list[str]:
    """Return the parts of a name, very long ones cut."""
    return [part[:_LONGEST] for part in re.split(r"[./]", name)]


def layer_parts(name: str) -> list[str]:
    """Return the parts of a name that name layers: neither numbers nor the weight's own."""
    return [part for part in name_parts(name)[:-1] if not part.isdecimal()]


@cache
def part_words(part: str) -> tuple[str, ...]:
    """Return the words of a part, in small letters."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part))


def weight_word(name: str) -> str | None:
    """Return the word that ends a name as those of layers' weights do, None for any other name."""
    found = part_words(name_parts(name)[-1])
    return found[-1] if found and WEIGHT.fullmatch(found[-1]) else None


def says_downward(name: str) -> bool:
    """Return whether a name is of a layer that reduces its maps, or of an encoder."""
    return _says(_DOWNWARD, name) or _says(_ENCODING, name)


def _says(pattern: re.Pattern[str], name: str) -> bool:
    return any(map(pattern.fullmatch, layer_parts(name)))


def _says_grouped(name: str) -> bool:
    return any(map(_GROUPED.fullmatch, _own_words(name)))


def _own_words(name: str) -> tuple[str, ...]:
    """Return the words of a layer's own part, and of the one before where that is a wrapped convolution's."""
    own = name_parts(name)[:-1][-2:]
    wrapped = not own or own[-1] in ("conv", "convolution") or own[-1].isdecimal()
    return part_words("_".join(own) if wrapped else own[-1])


@cache
def _prefixes(name: str) -> tuple[str, ...]:
    """Return the modules around a tensor, the innermost first, of very many only some."""
    found: list[str] = []
    while len(found) < _DEEPEST and (name := name[: max(name.rfind("."), name.rfind("/"), 0)]):
        found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class _Link:
    """A layer in the chain: what it gives and takes, its block, and whether a squeeze keeps its output to itself."""

    name: str
    gives: int
    takes: int
    block: str
    inner: bool = False


def groups_by_neighbours(
    chain: Sequence[str], kernels: Mapping[str, Kernel], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, str]]:
    """Return the number of groups of kernels that are not dense, or perhaps not: name → groups, doubt.

    chain: the layers of a file, kernels and matrices, in their order.
    """
    sizes = Counter(prefix for name in chain for prefix in _prefixes(name))
    links = []
    for name in chain:
        kernel, (gives, takes) = kernels.get(name), shapes[name][:2]
        if kernel:
            gives, takes = kernel.filters, kernel.channels
        elif any(map(_TABLE.fullmatch, _own_words(name))):
            gives, takes = takes, gives
        block = next((prefix for prefix in _prefixes(name) if sizes[prefix] > 1), "")
        links.append(_Link(name, gives, takes, block))
    walk = _Walk(_mark_squeezes(links, kernels), kernels)
    for place, link in enumerate(walk.links):
        walk.step(link, walk.links[place + 1] if place + 1 < len(chain) else None)
    doubts = {link: walk.found.get(link.name, (1, ""))[1] for link in links}
    alike = {(k.block, kernels[k.name].shape[:2]) for k, doubt in doubts.items() if doubt not in ("", PERHAPS_FIRST)}
    uncertain = kernels.keys() - walk.certain
    for link, doubt in doubts.items():  # parallel layers, such as the 1×1 beside the 3×3 of a RepVGG block
        if link.name in uncertain and not doubt and (link.block, kernels[link.name].shape[:2]) in alike:
            walk.found[link.name] = walk.found.get(link.name, (1, ""))[0], PERHAPS_GROUPED
    return walk.found


class _Walk:
    """A walk along the chain, which judges each layer by those before it and by the block that it stands in."""

    def __init__(self, links: Sequence[_Link], kernels: Mapping[str, Kernel]) -> None:
        self.links, self.kernels = links, kernels
        self.nearby: dict[str, Counter[int]] = defaultdict(Counter)  # a module → what its layers give
        for link in links:
            for prefix in ("", *_prefixes(link.name)) if not link.inner else ():
                self.nearby[prefix][link.gives] += 1
        self.squeezed = {(link.block, link.gives) for link in links if link.inner}
        self.changing = Counter((link.block, link.gives) for link in links if link.gives != link.takes)
        self.takers = Counter((link.block, link.takes) for link in links)
        beside = [link for link in links if _says(_SHORTCUT, link.name)]
        self.widened = {(link.block, link.gives) for link in links if 1 < link.takes < link.gives} - {
            (link.block, link.gives) for link in beside
        }
        channels = [link.takes for link in links if link.name in kernels and kernels[link.name].groups == 1]
        first = channels[0] if channels and links[0].name in kernels else 0
        self.images = next((usual for usual in (3, 1) if usual in channels), first)
        self.of_one = Counter(len(kernel.shape) for kernel in kernels.values() if _is_of_one_channel(kernel))
        self.alike = Counter(_pattern(name) for name, kernel in kernels.items() if _is_of_one_channel(kernel))
        self.places: dict[str, set[str]] = defaultdict(set)  # a name's pattern → the parents of layers so named
        for link in links:
            self.places[_pattern(link.name)].add(next(iter(_prefixes(link.name)[1:]), ""))
        self.starts: dict[str, int] = {}  # a module → what comes in: the output of the layer before its first
        self.inputs: dict[str, set[int]] = defaultdict(set)  # a block → what its dense layers take, so far
        self.wide = {name for name, kernel in kernels.items() if not kernel.pointwise}
        self.beside = {(link.block, link.takes) for link in beside}
        self.opening: dict[str, str] = {}  # a block → its first layer
        self.seen: dict[str, set[int]] = defaultdict(set)  # a module → what its layers have given or taken, so far
        self.before = 0  # what the last layer gives
        self.block = self.previous = ""  # the block of the layer, and the one before that
        self.doubted = False  # whether that may be grouped
        self.found: dict[str, tuple[int, str]] = {}
        self.certain: set[str] = set()  # layers that take what the last one gives

    def step(self, link: _Link, following: _Link | None) -> None:
        """Judge a layer. following: the next one."""
        kernel, around = (
            self.kernels.get(link.name),
            ["", *reversed(_prefixes(link.name))],
        )  # from the file to the layer
        for prefix in around:
            self.starts.setdefault(prefix, self.before)
            self.opening.setdefault(prefix, link.name)
        if link.block != self.block:
            self.previous, self.block = self.block, link.block
        judged = None
        if kernel and kernel.assumed and _is_of_one_channel(kernel):
            judged = self._of_one_channel(link, kernel, following, around)
        elif link.takes == self.before:
            self.certain.add(link.name)
            if kernel and link.takes > 1 and link.name in self.wide and _says_grouped(link.name):
                judged = 1, PERHAPS_GROUPED
        elif kernel and kernel.groups == 1 and not kernel.transposed:
            judged = self._grouping(link, kernel, around)
        self.doubted = judged == (1, PERHAPS_GROUPED)
        if judged:
            self.found[link.name] = judged
        elif not link.inner:
            self.inputs[link.block].add(link.takes)
        parallel = self.takers[link.block, link.takes] > 1 and "downsample" in link.name
        squeezes = link.inner or (link.block, link.takes) in self.squeezed
        if not (squeezes or parallel or _says(_SHORTCUT, link.name)):
            self.before = link.gives
        for prefix in around if not (link.inner or _says(_SHORTCUT, link.name)) else ():
            self.seen[prefix] |= {link.gives} if judged else {link.gives, link.takes}

    def _of_one_channel(
        self, link: _Link, kernel: Kernel, following: _Link | None, around: Sequence[str]
    ) -> tuple[int, str] | None:
        """Return the groups of a kernel of one channel, None if it is dense: a first layer."""
        filters, before = link.gives, self.before
        outer = around[max(around.index(link.block) - 1, 0)]
        seen, downward = filters in self.seen[outer], _says(_DOWNWARD, link.name)
        named = _says_grouped(link.name)
        repeated = self.alike[_pattern(link.name)] > 1  # images come in once
        wanted = max(following.takes, following.gives if following.takes == 1 else 0) if following else 0
        if before <= 1 and wanted == filters and self.images != 3 and not named:
            return (filters, PERHAPS_FIRST) if filters in self.seen[""] else None
        once = (following is not None and following.takes > 1) or len(self.places[_pattern(link.name)]) == 1
        inside = following is not None and following.block.startswith(link.block) and once
        wide = inside and following is not None and following.name in self.wide
        if filters in (before, *(self.starts[prefix] for prefix in around)):
            uncertain = self.opening[link.block] == link.name and (wide if wanted == filters else not repeated)
            return filters, PERHAPS_FIRST if uncertain and not (named or downward) else ""
        given = self.nearby[self.previous.rpartition(".")[0]][filters]  # near the last block: perhaps its output
        earlier = set() if given else {before, *self.inputs[self.previous]}
        multiple = filters == 2 * before > 2 or bool({filters / 2, filters / 4} & (earlier - {1}))
        new = downward or (wanted in (filters, 1) and not ((seen and outer) or (link.block, filters) in self.widened))
        if multiple and new:
            return filters, PERHAPS_MULTIPLIED
        if named or seen:
            return filters, "" if named or repeated else PERHAPS_FIRST
        if self.of_one[len(kernel.shape)] > 1:
            strange = wide or filters not in self.seen[""]
            return filters, PERHAPS_FIRST if (wanted == filters and strange) or not repeated else ""
        return None if before <= 1 or wanted == filters else (1, PERHAPS_FIRST)

    def _grouping(self, link: _Link, kernel: Kernel, around: Sequence[str]) -> tuple[int, str] | None:
        """Return the groups of a kernel, and whether they are in doubt; None if it is dense."""
        few, filters, before, start = link.takes, link.gives, self.before, self.starts[link.block]
        if link.inner or (link.block, few) in self.squeezed | self.beside:
            return None
        if few == self.images and (
            _says(_DOWNWARD, link.name) or filters not in self.seen[link.block] | {before} or not start
        ):
            return None
        wide, groups = not kernel.pointwise, _divided(before, link)
        outer = around[max(around.index(link.block) - 1, 0)] if wide or groups else ""
        narrows = filters < before and few in {self.starts[prefix] for prefix in around}
        known = narrows or few == start or few in self.inputs[link.block]
        given = self.nearby[outer][few] + (self.nearby[self.previous][few] if filters < before else 0)
        near = known or given > (few == filters)  # given by others than itself
        keeps = groups > 0 and filters == before and min(kernel.taps) > 1
        others = (
            many
            for many, count in self.nearby[link.block].items()
            if wide or (link.block and (many != filters or count > 1))
        )
        elsewhere = any(_divided(many, link) for many in (start, *others))
        keeps_another = self.changing[link.block, filters] > 1 and self.takers[link.block, filters]
        alone = not self.nearby[link.block][few] and self.takers[link.block, few] == 1
        if keeps and not near and few not in (1, self.images) and not _says(_SPLIT, link.name):
            return groups, "" if link.block and not _says(_DOWNWARD, link.name) else PERHAPS_GROUPED
        if (
            (not near and (elsewhere or (wide and groups)))
            or (wide and keeps_another and alone and _divided(filters, link))
            or (groups and self.doubted)
            or (wide and groups and (keeps or (not known and (filters > before or few not in self.nearby[""]))))
            or (wide and _says_grouped(link.name))
        ):
            return 1, PERHAPS_GROUPED
        return None


def _pattern(name: str) -> str:
    """Return a name without the numbers of blocks: what the layers of repeated blocks have in common."""
    return ".".join(part for part in name_parts(name) if not part.isdecimal())


def _is_of_one_channel(kernel: Kernel) -> bool:
    return kernel.shape[1] == 1 < kernel.shape[0] and not kernel.pointwise and not kernel.transposed


def _divided(many: int, link: _Link) -> int:
    """Return the number of groups in which a layer takes `many` channels, 0 if it cannot."""
    groups = many // link.takes
    return groups if groups > 1 and many % link.takes == 0 == link.gives % groups else 0


def _mark_squeezes(links: Sequence[_Link], kernels: Mapping[str, Kernel]) -> list[_Link]:
    """Mark the narrow layer of a squeeze, wide → narrow → wide: its output reaches only its partner."""
    marked = list(links)
    for place, (one, two) in enumerate(pairwise(links)):
        pointwise = all(link.name not in kernels or kernels[link.name].pointwise for link in (one, two))
        if not pointwise or one.block != two.block or (one.gives, one.takes) != (two.takes, two.gives):
            continue
        named = any(map(_SQUEEZE.fullmatch, name_parts(one.block)[-1:]))
        if one.gives < one.takes:
            marked[place] = _Link(one.name, one.gives, one.takes, one.block, inner=True)
        elif named and two.gives < two.takes:
            marked[place + 1] = _Link(two.name, two.gives, two.takes, two.block, inner=True)
    return marked
