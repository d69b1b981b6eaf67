"""Arrays as matrices: which axes are rows and which are columns, for the rules whose formula needs to know.

A layer's kernel is a matrix W in y = x W, whose rows are its inputs and whose columns are its outputs. Arrays with
more than two axes are one matrix whose rows or columns several axes make together (a convolution), or a stack of
matrices (scanned layers, heads), or both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.select import Selector, check_selector, select
from jaxopt_rules.trees import quoted


@dataclass(frozen=True)
class MatrixView:
    """Which axes of an array are the rows and the columns of the matrices in it; the other axes count matrices.

        layer                                shape                    view
        Flax, Haiku, Keras kernel            (in, out)                MatrixView()
        PyTorch, Equinox weight              (out, in)                MatrixView(rows=-1, columns=-2)
        HWIO convolution (Flax)              (h, w, in, out)          MatrixView(rows=(-4, -3, -2))
        OIHW convolution (PyTorch, Equinox)  (out, in, h, w)          MatrixView(rows=(-3, -2, -1), columns=-4)
        scanned or stacked layers            (layers, in, out)        MatrixView()
        queries of all heads, as one matrix  (in, heads, size)        MatrixView(rows=-3, columns=(-2, -1))
        each head by itself                  (in, heads, size)        MatrixView(rows=-3, columns=-1)
        projection out of all heads          (heads, size, out)       MatrixView(rows=(-3, -2), columns=-1)
        fused Q, K and V                     (in, 3 out)              MatrixView(parts=3)
        with fewer keys and values           (in, 512 + 128 + 128)    MatrixView(parts=(512, 128, 128))

    Axes are counted from the end, so that a view holds for the layers of a stack, too.

    Args:
      rows, columns: an axis, or several that are joined in this order, each negative.
      parts: the columns consist of so many equal parts, or of parts of these widths, each a matrix of its own.

    Raises:
      TypeError: an axis or a part is no integer.
      ValueError: an axis is not negative, or is named twice; or a part is less than 1.
    """

    rows: int | tuple[int, ...] = -2
    columns: int | tuple[int, ...] = -1
    parts: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "parts"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
                raise TypeError(f"MatrixView: {name} is an integer or several, not {value!r}")
            object.__setattr__(self, name, value if isinstance(value, int) else numbers)
        if any(axis >= 0 for axis in self._axes) or len(set(self._axes)) < len(self._axes):
            raise ValueError(f"MatrixView: axes count from the end, -1, -2, ..., each at most once, not {self._axes}")
        if any(part < 1 for part in _several(self.parts)):
            raise ValueError(f"MatrixView: a part has at least one column, not {self.parts}")

    @property
    def _axes(self) -> tuple[int, ...]:
        return (*_several(self.rows), *_several(self.columns))

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses a shape that has not these axes, or columns that do not make these parts.

        Raises:
          ValueError: says which.
        """
        if len(shape) < -min(self._axes):
            raise ValueError(f"{self!r} needs {-min(self._axes)} axes, not shape {shape}")
        columns = prod(shape[axis] for axis in _several(self.columns))
        fits = columns % self.parts == 0 if isinstance(self.parts, int) else columns == sum(self.parts)
        if not fits:
            raise ValueError(f"{self!r}: {columns} columns of shape {shape} do not make these parts")

    def stacked(self, x: Array) -> list[Array]:
        """The matrices of an array, as stacks of shape (matrices, rows, columns); one stack for each width of parts.

        Equal parts are matrices of one stack.

        Raises:
          ValueError: as `check`.
        """
        self.check(x.shape)
        sizes = [prod(x.shape[axis] for axis in axes) for axes in self._sides(x.ndim)]
        matrices = x.transpose(self._order(x.ndim)).reshape(sizes)
        if isinstance(self.parts, tuple):
            ends = list(accumulate(self.parts))[:-1]
            return jnp.split(matrices, ends, axis=-1)
        many, height, width = sizes
        apart = matrices.reshape(many, height, self.parts, width // self.parts).swapaxes(1, 2)
        return [apart.reshape(many * self.parts, height, width // self.parts)]

    def joined(self, stacks: Sequence[Array], shape: tuple[int, ...]) -> Array:
        """The array of this shape whose matrices these are: what undoes `stacked`.

        Raises:
          ValueError: as `check`.
        """
        self.check(shape)
        many, height, width = (prod(shape[axis] for axis in axes) for axes in self._sides(len(shape)))
        if isinstance(self.parts, int):
            apart = stacks[0].reshape(many, self.parts, height, width // self.parts)
            matrices = apart.swapaxes(1, 2)
        else:
            matrices = jnp.concatenate(stacks, axis=-1)
        order = self._order(len(shape))
        back = sorted(range(len(shape)), key=order.__getitem__)
        return matrices.reshape([shape[axis] for axis in order]).transpose(back)

    def map(self, function: Callable[[Array], Array], x: Array) -> Array:
        """The array whose matrices are function(stack), for every stack (matrices, rows, columns) of `x`."""
        return self.joined([function(stack) for stack in self.stacked(x)], x.shape)

    def _sides(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes of an array that count matrices, rows and columns."""
        others = tuple(axis for axis in range(ndim) if axis - ndim not in self._axes)
        rows, columns = (tuple(axis + ndim for axis in _several(side)) for side in (self.rows, self.columns))
        return others, rows, columns

    def _order(self, ndim: int) -> list[int]:
        return [axis for side in self._sides(ndim) for axis in side]


def _several(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else numbers


# What says how the arrays of a model are matrices: one view for all, or one for each selector. What has two axes and no
# view is (in, out).
Views = MatrixView | Mapping[str, MatrixView] | Sequence[tuple[Selector, MatrixView]] | None


def viewed(
    views: Views, owner: str, *, partial: bool = False
) -> Callable[[Sequence[str], Sequence[Any]], list[MatrixView | None]]:
    """For `leafwise(..., given={"view": viewed(views, owner)})`: the view of each leaf.

    The function that it returns raises ValueError where two selectors choose one leaf, or a selector none; where a view
    does not fit a shape; and where a leaf is no matrix: where it has fewer than two axes, or more and no view. A rule
    that is `partial` to matrices takes such leaves, too, which have the view `None`.

    Raises:
      TypeError: `views` is none.
    """
    known = [] if views is None or isinstance(views, MatrixView) else views
    pairs: Any = list(known.items()) if isinstance(known, Mapping) else known
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], MatrixView)):
            raise TypeError(f"{owner}: views are a MatrixView, or one for each selector, not {views!r}")
        check_selector(pair[0], f"{owner}: views")

    def view_of(path: str, shape: tuple[int, ...], found: list[MatrixView]) -> MatrixView | None:
        if len(found) > 1:
            raise ValueError(f"{owner}: two views, {found[0]!r} and {found[1]!r}, are meant for {quoted(path)}")
        if partial and (len(shape) < 2 or not found):
            return None
        if len(shape) < 2:
            raise ValueError(
                f"{owner} is for matrices, and {quoted(path)} has shape {shape}; leave it to another rule: "
                f"partition({{'matrix': {owner}(...), 'rest': adamw(...)}}, by={{'matrix': by_ndim(2)}})"
            )
        if not found and len(shape) > 2:
            raise ValueError(
                f"{owner}: which axes of {quoted(path)}, of shape {shape}, are rows and which columns? "
                f"views={{'{path}': MatrixView(rows=..., columns=...)}}, or leave it to another rule by partition"
            )
        view = found[0] if found else MatrixView()
        try:
            view.check(shape)
        except ValueError as error:
            raise ValueError(f"{owner}: {quoted(path)}: {error}") from None
        return view

    def of_leaves(paths: Sequence[str], leaves: Sequence[Any]) -> list[MatrixView | None]:
        columns = [(select(selector, paths, leaves), view) for selector, view in pairs]
        of_all = [views] if isinstance(views, MatrixView) else []
        return [
            view_of(path, leaf.shape, of_all + [view for hits, view in columns if hits[k]])
            if is_inexact(leaf)
            else None
            for k, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        ]

    return of_leaves
