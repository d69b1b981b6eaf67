"""What arrays are called in PyTorch, and how their axes are ordered there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules import trees
from jaxopt_rules.interop import needed
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.select import Selector, check_selector, select
from jaxopt_rules.trees import quoted


@dataclass(frozen=True)
class Axes:
    """How an array of PyTorch becomes one of ours: axis k here is axis `order[k]` there.

        Axes((1, 0))                                     Linear (out, in) -> (in, out)
        Axes((2, 3, 1, 0))                               Conv2d (out, in, h, w) -> (h, w, in, out)
        Axes((2, 3, 0, 1), flip=(0, 1))                  ConvTranspose2d (in, out, h, w) -> (h, w, in, out), for
                                                         `jax.lax.conv_transpose`, which does not turn the filter round
        Axes((2, 3, 1, 0), split={1: (16, 5, 5)})        Linear behind a flattened (16, 5, 5) -> behind (5, 5, 16)
        Axes((2, 0, 1), split={0: (8, -1)})              Linear (8 * 64, in) -> heads (in, 8, 64)
        Axes((0, 1, 2), split={0: (-1, 1, 1)})           a bias (out,) -> (out, 1, 1)

    Args:
      order: a permutation of the axes there, after the split.
      flip: axes here that run backwards.
      split: axes there that are several, with the sizes of these, of which one may be -1: what the others leave. Where
        ours has fewer axes than `order`, neighbours are joined again.

    Raises:
      ValueError: `order` is no permutation, `flip` is not among its axes, or `split` not among those there.
    """

    order: tuple[int, ...]
    flip: tuple[int, ...] = ()
    split: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"Axes: order names each axis there once, as (1, 0) does, not {self.order}")
        if not set(self.flip) <= set(range(len(self.order))):
            raise ValueError(f"Axes: flip names axes here, from 0 to {len(self.order) - 1}, not {self.flip}")
        object.__setattr__(self, "order", tuple(self.order))
        object.__setattr__(self, "split", {axis: tuple(sizes) for axis, sizes in self.split.items()})
        theirs = len(self.order) - sum(len(sizes) - 1 for sizes in self.split.values())
        if not set(self.split) <= set(range(theirs)):
            raise ValueError(
                f"Axes: split={self.split} makes {len(self.order)} axes, those of order, of {theirs} there, and names "
                "another"
            )
        if any(min(sizes, default=-2) < -1 or sizes.count(-1) > 1 for sizes in self.split.values()):
            raise ValueError(f"Axes: split gives sizes, of which one may be -1 for each axis, not {self.split}")

    def to_ours(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An array of PyTorch as one of this shape here.

        Raises:
          ValueError: it does not fit.
        """
        if not self.split:
            return np.flip(x.transpose(self.order), self.flip)
        apart = x.reshape([size for axis, whole in enumerate(x.shape) for size in self._sizes(axis, whole)])
        moved = np.flip(apart.transpose(self.order), self.flip)
        if not _ways_apart(moved.shape, shape or (1,)):
            raise ValueError(f"{self!r} gives shape {moved.shape}, which does not fit {shape}")
        return moved.reshape(shape)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """An array of ours as PyTorch has it.

        Raises:
          ValueError: it does not fit.
        """
        back = np.argsort(self.order)
        if not self.split:
            return np.flip(x, self.flip).transpose(back)
        sizes = self._apart_here(x.shape)
        apart = np.flip(x.reshape(sizes), self.flip).transpose(back)
        joined, axis = [], 0
        while axis < apart.ndim:
            several = len(self.split.get(len(joined), (0,)))
            joined.append(math.prod(apart.shape[axis : axis + several]))
            axis += several
        return apart.reshape(joined)

    def _sizes(self, axis: int, whole: int) -> tuple[int, ...]:
        """The sizes into which an axis there is split."""
        sizes = self.split.get(axis, (whole,))
        known = math.prod(size for size in sizes if size != -1)
        new = tuple(whole // max(known, 1) if size == -1 else size for size in sizes)
        if math.prod(new) != whole:
            raise ValueError(f"{self!r} splits axis {axis} into {sizes}, and its size is {whole}")
        return new

    def _apart_here(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of our axes where none are joined."""
        theirs: list[int] = []
        axis = 0
        while len(theirs) < len(self.order):
            theirs += self.split.get(axis, (-1,))
            axis += 1
        ways = _ways_apart([theirs[k] for k in self.order], shape or (1,))
        if len(ways) != 1:
            more = "in more than one way: give all sizes of the split" if ways else "in no way"
            raise ValueError(f"{self!r} fits shape {shape} {more}")
        return ways.pop()


def _ways_apart(sizes: Sequence[int], shape: Sequence[int]) -> set[tuple[int, ...]]:
    """What the sizes are, -1 where it is not known, for neighbours among them to make up the axes of this shape."""
    if not shape:
        return set() if sizes else {()}
    ways: set[tuple[int, ...]] = set()
    for n in range(1, len(sizes) - len(shape) + 2):
        own = sizes[:n]
        known = math.prod(size for size in own if size != -1)
        unknown = [shape[0] // max(known, 1)] * list(own).count(-1)
        if len(unknown) < 2 and known * math.prod(unknown) == shape[0]:
            filled = tuple(unknown[0] if size == -1 else size for size in own)
            ways |= {(*filled, *rest) for rest in _ways_apart(sizes[n:], shape[1:])}
    return ways


Names = Mapping[str, str] | Callable[[str], str]
AxesRules = Mapping[str, Axes | tuple[int, ...]] | Sequence[tuple[Selector, Axes | tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """What the parameters of a model are called in PyTorch, and how their axes are ordered there.

        FLAX                                                      Flax, Linen and NNX: names and axes of its layers
        EQUINOX                                                   Equinox: names and axes of its layers
        SAME                                                      the names and axes of PyTorch
        FLAX.also(names={"Conv_0": "features.0", "params": ""})   modules that have other names here
        SAME.also(axes={"**/w": (1, 0)})                          arrays that are transposed

    A path here, `blocks/0/attn/kernel`, has the name there that is made of its segments: `blocks.0.attn.weight`.

    Args:
      names: names there of paths here, or of the modules that paths begin with; the longest that fits holds. Or a
        function of the path that gives the name there.
      axes: by selector of paths here, `Axes` or its `order`; the first that selects a leaf holds. What none selects
        has its axes in the same order on both sides.
      ends: names there of what paths here end with.

    Raises:
      TypeError: a selector is none, or `names` is neither a dict nor a function.
      ValueError: when used: a name or a pattern is used by no parameter.
    """

    names: Names = field(default_factory=dict)
    axes: AxesRules = ()
    ends: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.names) and not isinstance(self.names, Mapping):
            raise TypeError(
                f"Layout: names is a dict from paths here to names there, or a function, not {self.names!r}"
            )
        for selector, _ in self._pairs:
            check_selector(selector, "Layout: axes")

    @property
    def _pairs(self) -> list[tuple[Selector, Axes]]:
        pairs = self.axes.items() if isinstance(self.axes, Mapping) else self.axes
        return [(selector, axes if isinstance(axes, Axes) else Axes(tuple(axes))) for selector, axes in pairs]

    def also(
        self, *, names: Names | None = None, axes: AxesRules = (), ends: Mapping[str, str] | None = None
    ) -> "Layout":
        """This layout and more: what is given here goes before what it has.

        Raises:
          TypeError: one of the two `names` is a function: it does not go together with another.
        """
        if names is None:
            both = self.names
        elif isinstance(self.names, Mapping) and isinstance(names, Mapping):
            both = {**self.names, **names}
        elif not self.names:
            both = names
        else:
            raise TypeError("Layout.also: names of which one is a function do not go together; give them at once")
        return replace(
            self, names=both, axes=(*Layout(axes=axes)._pairs, *self._pairs), ends={**self.ends, **(ends or {})}
        )

    def names_of(self, paths: Sequence[str]) -> list[str]:
        """The names there of these paths.

        Raises:
          ValueError: two have one name, or an entry of `names` is used by none.
        """
        if callable(self.names):
            found = [self.names(path) for path in paths]
        else:
            used: set[str] = set()
            found = [self._name(path, self.names, used) for path in paths]
            if paths and (unused := [key for key in self.names if key not in used]):
                raise ValueError(
                    f"Layout: names has {', '.join(map(repr, unused))}, with which no path begins: {listed(paths)}"
                )
        for name in found:
            if found.count(name) > 1:
                first, second, *_ = (path for path, other in zip(paths, found, strict=True) if other == name)
                raise ValueError(f"Layout: both {quoted(first)} and {quoted(second)} are named {name!r} in PyTorch")
        return found

    def _name(self, path: str, names: Mapping[str, str], used: set[str]) -> str:
        segments = path.split("/")
        rest = [*segments[:-1], self.ends.get(segments[-1], segments[-1])]
        # From the whole path to its beginning, which is empty.
        fitting = [n for n in range(len(segments), -1, -1) if "/".join(segments[:n]) in names]
        used.update("/".join(segments[:n]) for n in fitting)
        if not fitting:
            return ".".join(rest)
        module = names["/".join(segments[: fitting[0]])]
        return ".".join(filter(None, (module, *rest[fitting[0] :])))

    def axes_of(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Axes | None]:
        """How the axes of each leaf are moved; `None` where they are not.

        Raises:
          ValueError: a pattern matches nothing.
        """
        found: list[Axes | None] = [None] * len(leaves)
        for selector, axes in reversed(self._pairs):
            found = [axes if hit else old for hit, old in zip(select(selector, paths, leaves), found, strict=True)]
        return found


@dataclass(frozen=True)
class _Kernel:
    """A predicate: arrays called `kernel` with so many axes."""

    ndim: int

    def __call__(self, path: str, array: Any) -> bool:
        return path.rpartition("/")[2] == "kernel" and array.ndim == self.ndim


@dataclass(frozen=True)
class _ConvolutionBias:
    """A predicate: arrays called `bias` with so many axes, of which those behind the first have length 1."""

    ndim: int

    def __call__(self, path: str, array: Any) -> bool:
        unit = (1,) * (self.ndim - 1)
        return path.rpartition("/")[2] == "bias" and array.ndim == self.ndim and tuple(array.shape[1:]) == unit


SAME = Layout()
"""The names and the axes of PyTorch."""

EQUINOX = Layout(
    axes=[(_ConvolutionBias(n), Axes((*range(n),), split={0: (-1, *[1] * (n - 1))})) for n in (2, 3, 4)],
)
"""The layers of Equinox, which are PyTorch's but for a convolution's `bias`: (out, 1, 1) where PyTorch has (out,).

A `ConvTranspose2d` does not turn the filter round and has its channels as (out, in): `axes` say for its weight
`Axes((1, 0, 2, 3), flip=(2, 3))`. The layers of a `Sequential` are in `layers/0`, where PyTorch's are `0`:
`names={"layers": ""}`. Attention and recurrent cells keep other arrays than PyTorch's. To a rule the bias of a
convolution is an array with more than one axis: what is chosen by that, as by `by_ndim(least=2)` or Adafactor's
`views="last"`, is to leave it out: `excluding(...)`.
"""

FLAX = Layout(
    axes=[(_Kernel(n), (*range(2, n), 1, 0)) for n in (2, 3, 4, 5)],
    ends={"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"},
)
"""The layers of Flax, whose `kernel` is (*spatial, in, out) where PyTorch's `weight` is (out, in, *spatial).

A `ConvTranspose` with `transpose_kernel=True` is PyTorch's; for others, and for heads, `axes` say what is where.
"""


class Matched(NamedTuple):
    """The leaves of a tree that are arrays of numbers, and what they are in PyTorch."""

    treedef: Any
    leaves: list[Any]
    paths: list[str]
    names: dict[int, str]  # of the leaves that are such arrays
    axes: list[Axes | None]

    def to_ours(self, k: int, x: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of PyTorch that belongs to leaf k, as one of this shape here.

        Raises:
          ValueError: it does not fit; `what` says what it is.
        """
        there, axes = as_numpy(x), self.axes[k]
        try:
            moved = there if axes is None else axes.to_ours(there, shape)
        except ValueError:
            moved = None
        if moved is None or moved.shape != shape:
            became = "" if axes is None else f", moved by {axes!r}"
            raise ValueError(
                f"{what} of {self.names[k]!r} has shape {there.shape} in PyTorch{became}; of {quoted(self.paths[k])} "
                f"it has shape {shape} here; say in the layout how the axes are moved: also(axes={{'{self.paths[k]}': "
                f"{_example(there.shape, shape)}}}), or what it is called: also(names=...)"
            )
        return moved

    def to_theirs(self, k: int, x: Any) -> np.ndarray:
        """An array that belongs to leaf k, as PyTorch has it.

        Raises:
          ValueError: it does not fit.
        """
        there, axes = np.asarray(x), self.axes[k]
        try:
            return there if axes is None else axes.to_theirs(there)
        except ValueError as error:
            raise ValueError(
                f"{quoted(self.paths[k])} has shape {there.shape} here, which the layout does not move: {error}"
            ) from error


def _example(there: tuple[int, ...], here: tuple[int, ...]) -> str:
    """What a layout may say of an array of these shapes."""
    if there == here:
        return str((*range(len(here)),))
    if len(there) == len(here) > 1:
        return str((*range(2, len(here)), 1, 0))
    if len(there) == 1 < len(here) and set(here[1:]) == {1}:
        return f"Axes({(*range(len(here)),)}, split={{0: {(-1, *here[1:])}}})"
    return "Axes(order, split={axis: sizes})"


def matched(params: Any, layout: Layout) -> Matched:
    leaves, treedef = trees.flatten(params)
    paths = trees.paths(params)
    trees.check_distinct(paths, "the parameters")
    arrays = [k for k, p in enumerate(leaves) if is_inexact(p)]
    names = dict(zip(arrays, layout.names_of([paths[k] for k in arrays]), strict=True))
    return Matched(treedef, leaves, paths, names, layout.axes_of(paths, leaves))


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def as_numpy(x: Any) -> np.ndarray:
    """A tensor, wherever it is, or another array. What NumPy does not know, such as bfloat16, becomes float32."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    narrow = x.is_floating_point() and x.element_size() < 4
    return (x.float() if narrow else x.resolve_conj().resolve_neg()).numpy()


def fitted(x: np.ndarray, like: Any) -> jax.Array:
    """A copy with the dtype of `like`, and where that is."""
    return trees.placed_like(jnp.array(x, like.dtype), like)


def as_tensor(x: np.ndarray, like: Any = None) -> Any:
    """A tensor of its own memory, of the dtype and on the device of `like`, if that is one."""
    torch: Any = needed("torch", "torch")
    # PyTorch does not read the narrow types of NumPy's extensions.
    foreign = x.dtype.kind == "V"
    own = torch.from_numpy(np.array(x, np.float32 if foreign else x.dtype, order="C"))
    if like is not None and hasattr(like, "detach"):
        return own.to(device=like.device, dtype=like.dtype)
    return own.to(getattr(torch, x.dtype.name)) if foreign else own
