"""PyTorch: a run that began there goes on here, and back.

    from jaxopt_rules.interop.torch import FLAX, load_model_state, load_optimizer_state

    layout = FLAX.also(names={"conv": "features.0", "dense": "head"})
    params = load_model_state(model.state_dict(), params, layout)
    rule = adamw(3e-4, weight_decay=0.1)
    state = load_optimizer_state(optimizer.state_dict(), params, rule, layout)

and back, into a model and an optimizer that are built there as for a new run:

    model.load_state_dict(model_state_dict(params, layout, like=model.state_dict()))
    optimizer.load_state_dict(optimizer_state_dict(state, params, rule, layout, like=optimizer))

A `Layout` says what the parameters are called there and how their axes are ordered; both are rules that are written
down, never guessed from shapes. Which rule is whose counterpart:

    torch.optim.SGD                       sgd(lr, momentum, nesterov, dampening=..., weight_decay=..., decay="l2"),
                                          with a momentum also in the form "tensorflow" and, where the dampening is
                                          equal to the momentum, "ema"
    torch.optim.Adam                      adam(lr), adamw(lr, weight_decay=..., decay="l2")
    torch.optim.AdamW                     adamw(lr)
    either with amsgrad=True              amsgrad(lr, maximum_of="uncorrected")
    torch.optim.Adafactor                 adafactor_pytorch()
    transformers' Adafactor               adafactor_transformers()
    lion_pytorch's and timm's Lion        lion(lr, weight_decay=...)
    torch.optim.Muon                      muon_pytorch(lr, polar=NewtonSchulz(eps_placement="max", dtype="bfloat16"))

They may stand in chains, groups and wrappers. `polar` of Muon, and a form of decoupled decay other than PyTorch's, are
choices of the rule that are not looked into.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules import trees
from jaxopt_rules.compose import FROZEN, Composed, Wrapper
from jaxopt_rules.families import Family, Place, families, map_families, per_parameter
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, scheduled
from jaxopt_rules.interop import needed
from jaxopt_rules.lift import Lift
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.rule import Definition, Rule, as_rule, definition_of
from jaxopt_rules.rules.adafactor import Factors
from jaxopt_rules.select import Selector, check_selector, select
from jaxopt_rules.state import Entry, hyperparameter_entries, hyperparams, replace_hyperparameters, replacement
from jaxopt_rules.trees import quoted

# ---------------------------------------------------------------------------------------------------------------------
# Names and axes
# ---------------------------------------------------------------------------------------------------------------------


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
                    f"Layout: names has {', '.join(map(repr, unused))}, with which no path begins: {_listed(paths)}"
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


class _Matched(NamedTuple):
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
        there, axes = _numpy(x), self.axes[k]
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


def _matched(params: Any, layout: Layout) -> _Matched:
    leaves, treedef = trees.flatten(params)
    paths = trees.paths(params)
    trees.check_distinct(paths, "the parameters")
    arrays = [k for k, p in enumerate(leaves) if is_inexact(p)]
    names = dict(zip(arrays, layout.names_of([paths[k] for k in arrays]), strict=True))
    return _Matched(treedef, leaves, paths, names, layout.axes_of(paths, leaves))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def _dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _numpy(x: Any) -> np.ndarray:
    """A tensor, wherever it is, or another array. What NumPy does not know, such as bfloat16, becomes float32."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    narrow = x.is_floating_point() and x.element_size() < 4
    return (x.float() if narrow else x.resolve_conj().resolve_neg()).numpy()


def _fitted(x: np.ndarray, like: Any) -> jax.Array:
    """A copy with the dtype of `like`, and where that is."""
    return trees.placed_like(jnp.array(x, like.dtype), like)


def _tensor(x: np.ndarray, like: Any = None) -> Any:
    """A tensor of its own memory, of the dtype and on the device of `like`, if that is one."""
    torch: Any = needed("torch", "torch")
    # PyTorch does not read the narrow types of NumPy's extensions.
    foreign = x.dtype.kind == "V"
    own = torch.from_numpy(np.array(x, np.float32 if foreign else x.dtype, order="C"))
    if like is not None and hasattr(like, "detach"):
        return own.to(device=like.device, dtype=like.dtype)
    return own.to(getattr(torch, x.dtype.name)) if foreign else own


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def load_model_state(state_dict: Mapping[str, Any], params: Any, layout: Layout = FLAX, *, strict: bool = True) -> Any:
    """The parameters of a PyTorch model, as a tree like `params`.

        params = load_model_state(torch.load("model.pt"), params)
        params = load_model_state(module.state_dict(), nnx.state(model, nnx.Param), strict=False)

    Args:
      state_dict: `module.state_dict()`: tensors or NumPy arrays by name.
      params: a tree of parameters, whose values do not matter; structure, shapes, dtypes and placement do. Leaves that
        are no arrays of floating-point numbers are returned as they are.
      layout: what is what; by default that of Flax.
      strict: whether all of `state_dict` must be taken, but for what is no floating-point number there. A model's
        running means and variances are in it as well as its parameters.

    Raises:
      TypeError: `state_dict` is none.
      ValueError: a parameter is missing there, has another shape, or is left over.
    """
    _check_mapping(state_dict, "load_model_state takes module.state_dict()")
    at = _matched(params, layout)
    _check_present(at, state_dict, "the state_dict")
    taken = set(at.names.values())
    left = [name for name, x in state_dict.items() if name not in taken and _numpy(x).dtype.kind in "fcV"]
    if strict and left:
        raise ValueError(
            f"nothing here takes {_listed(left)} of the state_dict; give the layout their names, or strict=False"
        )
    new = list(at.leaves)
    for k, name in at.names.items():
        p = at.leaves[k]
        new[k] = _fitted(at.to_ours(k, state_dict[name], "the parameter", p.shape), p)
    return jax.tree.unflatten(at.treedef, new)


def _check_mapping(x: Any, takes: str) -> None:
    if not isinstance(x, Mapping):
        name = type(x).__name__
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        raise TypeError(f"{takes}, not {None if x is None else f'{article} {name}'}")


def _check_present(at: _Matched, names: Mapping[str, Any], where: str) -> None:
    if missing := [k for k, name in at.names.items() if name not in names]:
        first = missing[0]
        more = f", and {len(missing) - 1} more are not" if len(missing) > 1 else ""
        raise ValueError(
            f"{quoted(at.paths[first])} is {at.names[first]!r} in PyTorch, which is not in {where}{more}; there are "
            f"{_listed(list(names))}; say what it is called: also(names={{'{at.paths[first]}': ...}})"
        )


def model_state_dict(params: Any, layout: Layout = FLAX, *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters as `module.load_state_dict` takes them: what undoes `load_model_state`.

        module.load_state_dict(model_state_dict(params, like=module.state_dict()))

    Args:
      params: a tree of parameters.
      layout: what is what; by default that of Flax.
      like: `module.state_dict()`, from which come dtypes, devices, and whatever is not among `params`. Without it the
        dtypes are those of `params`.

    Raises:
      TypeError: `like` is no state_dict.
      ValueError: a parameter is not in `like`, or has another shape there.
      ImportError: PyTorch is not installed.
    """
    at = _matched(params, layout)
    if like is not None:
        _check_mapping(like, "model_state_dict takes like=module.state_dict()")
        _check_present(at, like, "`like`")
    new = dict(like or {})
    for k, name in at.names.items():
        x = at.to_theirs(k, at.leaves[k])
        if like is not None and x.shape != tuple(like[name].shape):
            raise ValueError(
                f"{quoted(at.paths[k])} has shape {x.shape} in PyTorch's layout, and {name!r} in `like` has shape "
                f"{tuple(like[name].shape)}; say in the layout how the axes are moved"
            )
        new[name] = _tensor(x, None if like is None else like[name])
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers of PyTorch
# ---------------------------------------------------------------------------------------------------------------------


class _Hyper(NamedTuple):
    """Where a hyperparameter of ours stands in a param_group."""

    key: str
    index: int | None = None  # in a pair
    sign: int = 1
    neutral: tuple[Any, ...] = ()  # with these a rule need not have it

    def read(self, group: Mapping[str, Any]) -> Any:
        value = group[self.key] if self.index is None else group[self.key][self.index]
        return None if value is None else self.sign * float(value)

    def write(self, group: dict[str, Any], value: float) -> None:
        new = self.sign * value
        old = group[self.key]
        if self.index is None:
            # A rate that PyTorch holds as a tensor, as under `capturable`, stays one.
            group[self.key] = _tensor(np.asarray(new), old) if hasattr(old, "detach") else new
        else:
            pair = list(old)
            pair[self.index] = new
            group[self.key] = type(old)(pair)


@dataclass(frozen=True)
class _Kind:
    """An optimizer of PyTorch: what its param_groups have, and what its state is here."""

    name: str
    here: str  # the constructor of its counterpart
    knows: Callable[[Mapping[str, Any]], bool]  # whether a param_group is one of its
    slots: Mapping[str, Mapping[str, str]]  # by family here: theirs by slot
    hyper: Mapping[str, _Hyper]  # by the public name here
    families: frozenset[str]  # besides those with slots, whose hyperparameters these are
    decay: str  # "decoupled", "l2" or, as the param_group says, "either"
    counts: bool = True  # whether it saves how many updates were finished

    def counts_for(self, family: Family) -> bool:
        """Whether what a formula here does goes by the number of updates that it saves for each parameter."""
        return self.counts and (family.name in self.slots or family.name in self.families - _ENDS)

    def owns(self, entry: Entry) -> bool:
        """Whether a hyperparameter here is one of this optimizer."""
        return entry.name in self.hyper and (entry.family.name in self.slots or entry.family.name in self.families)

    def decay_of(self, group: Mapping[str, Any]) -> str:
        """Where the decay acts: "l2" in the gradient, "decoupled" beside it, "either" where it is not said."""
        if self.decay != "either" or "decoupled_weight_decay" not in group:
            return self.decay
        return "decoupled" if group["decoupled_weight_decay"] else "l2"


_ADAM_HYPER = {
    "learning_rate": _Hyper("lr"),
    "b1": _Hyper("betas", 0),
    "b2": _Hyper("betas", 1),
    "eps": _Hyper("eps"),
    "weight_decay": _Hyper("weight_decay"),
}
_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_ENDS = frozenset({"step", "weight_decay"})

# By key of a param_group: why it cannot be on.
_REFUSED = {
    "maximize": "negate the loss instead",
    "caution": "the counterpart of timm's cautious optimizers is cautious(direction), which is not converted",
    "corrected_weight_decay": 'its counterpart is decay="corrected", which is not converted',
}

_KINDS = (
    _Kind(
        "torch.optim.Muon",
        "muon_pytorch",
        lambda group: {"ns_coefficients", "ns_steps", "adjust_lr_fn", "momentum", "nesterov"} <= group.keys(),
        {"muon": {"m": "momentum_buffer"}},
        {
            "learning_rate": _Hyper("lr"),
            "beta": _Hyper("momentum"),
            "weight_decay": _Hyper("weight_decay"),
        },
        _ENDS,
        "decoupled",
        counts=False,
    ),
    _Kind(
        "torch.optim.Adafactor",
        "adafactor_pytorch",
        lambda group: {"beta2_decay", "d", "eps"} <= group.keys(),
        {"adafactor": {"v": "variance"}},
        {
            "learning_rate": _Hyper("lr"),
            "decay_rate": _Hyper("beta2_decay", sign=-1),
            "eps": _Hyper("eps", 0),
            "min_rms": _Hyper("eps", 1),
            "clipping_threshold": _Hyper("d"),
            "weight_decay": _Hyper("weight_decay"),
        },
        frozenset({"adafactor_step"}),
        "decoupled",
    ),
    _Kind(
        "transformers.Adafactor",
        "adafactor_transformers",
        lambda group: {"clip_threshold", "scale_parameter", "relative_step", "warmup_init", "beta1"} <= group.keys(),
        {"adafactor": {"v": "exp_avg_sq"}, "adafactor_momentum": {"m": "exp_avg"}},
        {
            "learning_rate": _Hyper("lr"),
            "decay_rate": _Hyper("decay_rate", sign=-1),
            "eps": _Hyper("eps", 0),
            "min_rms": _Hyper("eps", 1),
            "clipping_threshold": _Hyper("clip_threshold"),
            "momentum": _Hyper("beta1"),
            "weight_decay": _Hyper("weight_decay"),
        },
        frozenset({"adafactor_step"}),
        "decoupled",
    ),
    _Kind(
        "torch.optim.Adam(amsgrad=True)",
        "amsgrad",
        lambda group: {"betas", "eps", "amsgrad"} <= group.keys() and group["amsgrad"],
        {"amsgrad": _MOMENTS | {"v_max": "max_exp_avg_sq"}},
        _ADAM_HYPER,
        _ENDS,
        "either",
    ),
    _Kind(
        "torch.optim.Adam or AdamW",
        "adam",
        lambda group: {"betas", "eps", "amsgrad"} <= group.keys() and not group["amsgrad"],
        {"adam": _MOMENTS},
        _ADAM_HYPER,
        _ENDS,
        "either",
    ),
    _Kind(
        "torch.optim.SGD",
        "sgd",
        lambda group: {"momentum", "dampening", "nesterov"} <= group.keys(),
        {"velocity": {"v": "momentum_buffer"}, "momentum": {"v": "momentum_buffer"}},
        {
            "learning_rate": _Hyper("lr"),
            "momentum": _Hyper("momentum", neutral=(0,)),
            "dampening": _Hyper("dampening", neutral=(0,)),
            "weight_decay": _Hyper("weight_decay"),
        },
        _ENDS,
        "l2",
        counts=False,
    ),
    _Kind(
        "Lion",
        "lion",
        lambda group: {"betas", "weight_decay"} <= group.keys() and "eps" not in group,
        {"lion": {"m": "exp_avg"}},
        {name: _ADAM_HYPER[name] for name in ("learning_rate", "b1", "b2", "weight_decay")},
        _ENDS,
        "decoupled",
        counts=False,
    ),
)


def _kind(group: Mapping[str, Any]) -> _Kind:
    kind = next((kind for kind in _KINDS if kind.knows(group)), None)
    if kind is None:
        shown = ", ".join(key for key in group if key not in ("params", "param_names"))
        raise ValueError(f"the param_groups have {shown}, which is none of {', '.join(kind.name for kind in _KINDS)}")
    for key, instead in _REFUSED.items():
        if group.get(key):
            raise ValueError(f"{kind.name} has {key}={group[key]}; {instead}")
    return kind


class _Entry(NamedTuple):
    """A parameter in an optimizer of PyTorch."""

    name: str
    group: Mapping[str, Any]
    kind: _Kind
    state: Mapping[str, Any]
    optimizer: int
    id: Any  # in `state` of that optimizer

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers, without its clock and what is recomputed."""
        return {key: x for key, x in self.state.items() if key not in ("step", "RMS") and x is not None}

    @property
    def step(self) -> int | None:
        return None if self.state.get("step") is None else int(self.state["step"])

    @property
    def counterpart(self) -> str:
        """A call that makes the rule for it here."""
        decay = self.hyper("weight_decay")
        keywords = ['maximum_of="uncorrected"'] if self.kind.here == "amsgrad" else []
        keywords += ["nesterov=True"] if self.kind.here == "sgd" and self.group["nesterov"] else []
        if decay:
            keywords.append(f"weight_decay={decay}")
            keywords += ['decay="l2"'] if self.kind.decay_of(self.group) == "l2" else []
        name = "adamw" if self.kind.here == "adam" and decay else self.kind.here
        return f"{name}({', '.join(['...', *keywords])})"

    def hyper(self, name: str) -> float | None:
        """A hyperparameter by its name here; `None` where it has none."""
        if name == "min_rms" and self.group.get("scale_parameter") is False:
            return None
        value = self.kind.hyper[name].read(self.group)
        if value is None and name == "eps" and self.memory:
            # By default PyTorch's Adafactor takes that of the parameters' dtype.
            return float(jnp.finfo(_dtype_name(next(iter(self.memory.values())))).eps)
        return value


StateDicts = Mapping[str, Any] | Sequence[Mapping[str, Any]]
NamesThere = Sequence[str] | Sequence[Sequence[str]]


def _entries(state_dicts: Sequence[Mapping[str, Any]], names: NamesThere | None) -> dict[str, _Entry]:
    """The parameters of optimizers by name."""
    single = names is None or len(names) == 0 or isinstance(names[0], str)
    columns: Any = [names] * len(state_dicts) if names is None else [names] if single else names
    if len(columns) != len(state_dicts):
        raise ValueError(f"names are {len(columns)} lists, and there are {len(state_dicts)} optimizers: one for each")
    entries: dict[str, _Entry] = {}
    for i, (saved, own) in enumerate(zip(state_dicts, columns, strict=True)):
        if not {"state", "param_groups"} <= saved.keys():
            raise ValueError("a state_dict of an optimizer has state and param_groups: optimizer.state_dict()")
        groups, kinds = saved["param_groups"], [_kind(group) for group in saved["param_groups"]]
        total = sum(len(group["params"]) for group in groups)
        if own is None and not all("param_names" in group for group in groups):
            raise ValueError(
                "the optimizer was not made from named parameters, so its state_dict says nothing of names; give those "
                "of its parameters in their order: names=[name for name, _ in model.named_parameters()]"
            )
        if own is not None and len(own) != total:
            raise ValueError(f"names has {len(own)} names, and the optimizer has {total} parameters")
        rest = iter(own or ())
        for group, kind in zip(groups, kinds, strict=True):
            for j, id_ in enumerate(group["params"]):
                name = group["param_names"][j] if own is None else next(rest)
                if name in entries:
                    raise ValueError(f"two parameters of the optimizers are named {name!r}")
                entries[name] = _Entry(name, group, kind, saved["state"].get(id_) or {}, i, id_)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Rules, part by part
# ---------------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A formula in a rule, and the leaves that it sees."""

    rule: Lift
    leaves: frozenset[int]

    def acting(self, stored_name: str, at: _Matched) -> frozenset[int]:
        """The leaves on which a hyperparameter acts."""
        selector = self.rule.where.get(stored_name)
        own = [p if k in self.leaves else None for k, p in enumerate(at.leaves)]
        hits = select(selector, at.paths, own)
        return frozenset(k for k in self.leaves if hits[k])


def _formulas(
    definition: Definition, paths: Sequence[str], leaves: Sequence[Any], place: Place = ()
) -> Iterator[tuple[Place, Lift, frozenset[int]]]:
    """The formulas that a rule is made of, each with the place of its state and the leaves that it sees."""
    if isinstance(definition, Composed):
        for (step, member), seen in zip(definition.members, definition.seen(paths, leaves), strict=True):
            yield from _formulas(member, paths, seen, (*place, *step))
    elif isinstance(definition, Wrapper):
        yield from _formulas(definition_of(definition.rule), paths, leaves, (*place, 0))
    elif isinstance(definition, Lift):
        yield place, definition, frozenset(k for k, p in enumerate(leaves) if is_inexact(p))


class _Meeting:
    """Parameters, the rule that moves them here, and the optimizers that move them in PyTorch."""

    def __init__(self, params: Any, rule: Rule, layout: Layout, saved: Sequence[Any], names: NamesThere | None) -> None:
        self.rule = rule
        self.at = at = _matched(params, layout)
        there = _entries(saved, names)
        definition = definition_of(rule)
        shares = definition.shares(at.paths, at.leaves)
        moved = {
            k for k in at.names if not (shares[k].rate == FROZEN.rate and FROZEN.group in shares[k].group.split("/"))
        }
        self.parts = {
            place: _Part(formula, seen & moved) for place, formula, seen in _formulas(definition, at.paths, at.leaves)
        }
        names_here = set(at.names.values())
        if left := [name for name in there if name not in names_here]:
            raise ValueError(
                f"the optimizer has {_listed(left)}, and no parameter here has this name; the names of those here are "
                f"{_listed(list(at.names.values()))}"
            )
        for k in sorted(moved):
            if at.names[k] not in there:
                raise ValueError(
                    f"{quoted(at.paths[k])}, {at.names[k]!r}, is in none of PyTorch's param_groups, which is frozen "
                    f"here by freeze(rule, '{at.paths[k]}'); the optimizer has {_listed(list(there))}"
                )
            if np.iscomplexobj(at.leaves[k]):
                raise ValueError(f"{quoted(at.paths[k])} is complex, which PyTorch's optimizers take as pairs of reals")
        self.entries = {k: there[at.names[k]] for k in sorted(moved)}

    def describe(self, k: int) -> str:
        return f"{quoted(self.at.paths[k])} ({self.at.names[k]!r} in PyTorch)"

    def formulas(self, state: Any) -> Iterator[tuple[Family, _Part]]:
        """Each formula of the rule, with its part of a state.

        Raises:
          ValueError, TypeError: the state is that of another rule.
        """
        there = {family.place: family for family in families(state)}
        for place, part in self.parts.items():
            if place not in there:
                raise ValueError(f"the state is not one of {self.rule!r}: there is no {part.rule.State.__name__} in it")
            part.rule.check_state(there[place].state)
            yield there[place], part

    def check_forms(self, state: Any) -> None:
        """Refuses a rule whose formula is another than that of the optimizer.

        Raises:
          ValueError: says in what.
        """
        for family, part in self.formulas(state):
            for k in sorted(part.leaves):
                entry = self.entries[k]
                known = family.name in entry.kind.slots or family.name in entry.kind.families
                if known and (other := _difference(part.rule, entry.group)):
                    raise ValueError(
                        f"{entry.kind.name} has {other[0]} for {entry.name!r}, and {self.rule!r} has {other[1]}; its "
                        f"counterpart is {entry.counterpart}"
                    )

    def column(self, family: Family, slot: str) -> list[Any]:
        """What a slot holds of each leaf; nothing where it is not made of such parts."""
        return per_parameter(self.at.treedef, family, getattr(family.state, slot)) or []

    def counterparts(self, family: Family, slot: str, part: _Part) -> Iterator[tuple[int, _Entry, str]]:
        """(leaf, entry, slot there) for each leaf of which PyTorch has what is in this slot."""
        for k in sorted(part.leaves):
            slots = self.entries[k].kind.slots.get(family.name, {})
            if slot in slots:
                yield k, self.entries[k], slots[slot]

    def values(self, state: Any) -> Iterator[tuple[Entry, dict[int, _Entry]]]:
        """(hyperparameter here, the parameters on which it acts) for all that PyTorch has, too."""
        for entry in hyperparameter_entries(state).values():
            part = self.parts.get(entry.family.place)
            acting = part.acting(entry.key, self.at) if part is not None else ()
            own = {k: there for k, there in self.entries.items() if k in acting and there.kind.owns(entry)}
            if own:
                yield entry, own


def _difference(rule: Lift, group: Mapping[str, Any]) -> tuple[str, str] | None:
    """What an optimizer of PyTorch has, and what a formula here has in its place."""
    static = rule.static
    if "nesterov" in static and bool(group.get("nesterov")) != static["nesterov"]:
        return f"nesterov={bool(group.get('nesterov'))}", f"nesterov={static['nesterov']}"
    if "maximum_of" in static and static["maximum_of"] != "uncorrected":
        return "the largest of the uncorrected second moments", f'maximum_of="{static["maximum_of"]}"'
    if "eps_placement" in static:
        wanted = "max" if "beta2_decay" in group else "inside" if "clip_threshold" in group else "outside"
        if static["eps_placement"] != wanted:
            return f'eps in the place "{wanted}"', f'eps_placement="{static["eps_placement"]}"'
    if rule.State.__name__ == "AdamState" and "c1" not in rule.measures:
        return 'bias_correction "moments"', 'bias_correction="step"'
    if "polar" in static:
        return _muon_difference(static, group)
    if "relative_step" in static:
        if group.get("warmup_init") and not callable(rule.hyper["learning_rate"]):
            return "warmup_init=True", "no warmup"
        relative = group.get("relative_step", True)
        decay = "scaled" if "clip_threshold" in group else "decoupled"
        if static["relative_step"] != relative:
            return f"relative_step={relative}", f"relative_step={static['relative_step']}"
        if group["weight_decay"] and static["decay"] != decay:
            return f'a decay that is "{decay}"', f'decay="{static["decay"]}"'
        if ("min_rms" in rule.hyper) != group.get("scale_parameter", True):
            return (
                f"scale_parameter={group.get('scale_parameter', True)}",
                f"multiply_by_parameter_scale={'min_rms' in rule.hyper}",
            )
    if rule.State.__name__ in ("VelocityState", "MomentumState") and "dampening" in group and group["momentum"]:
        dampening, mean = float(group["dampening"]), COMPLEMENT + "momentum" in rule.hyper
        if mean and dampening != float(group["momentum"]):
            return f"dampening={dampening}", 'form="ema", which has the momentum in its place'
        if not mean and dampening and COMPLEMENT + "dampening" not in rule.hyper:
            return f"dampening={dampening}", "none"
        if "nesterov" not in static and group["nesterov"]:
            return "nesterov=True", "dampening"
    return None


def _muon_difference(static: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, str] | None:
    if static["momentum"] == "debiased":
        return "a momentum that is not corrected", 'momentum="debiased"'
    name = group["adjust_lr_fn"] or "original"
    expected: dict[str, Callable[[int, int], float]] = {
        "original": lambda rows, columns: math.sqrt(max(1, columns / rows)),
        "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    }
    scale, wanted = static["scale"] or (lambda rows, columns: 1.0), expected.get(name, lambda rows, columns: 1.0)
    sides = ((2, 3), (3, 2), (5, 5))
    if any(not math.isclose(scale(*side), wanted(*side)) for side in sides):
        return f'adjust_lr_fn="{name}"', "another scale"
    return None


def _scaling(part: _Part, group: Mapping[str, Any]) -> float:
    """What a slot of PyTorch is multiplied by to be ours."""
    if part.rule.State.__name__ == "MomentumState":
        return -float(group["lr"])
    if part.rule.static.get("polar") and part.rule.static["momentum"] == "sum":
        return 1 / (1 - float(group["momentum"]))
    return 1.0


# Of a matrix, PyTorch and transformers keep the means over its last axis, and those over the last but one.
_FACTORS = {"variance": ("row_var", "col_var"), "exp_avg_sq": ("exp_avg_sq_row", "exp_avg_sq_col")}


def load_optimizer_state(
    state_dict: StateDicts,
    params: Any,
    rule: Rule,
    layout: Layout = FLAX,
    *,
    names: NamesThere | None = None,
    hyperparams: Literal["saved", "new"] = "saved",
    count: int | None = None,
) -> Any:
    """The state of a rule that goes on where a PyTorch optimizer is.

        state = load_optimizer_state(optimizer.state_dict(), params, adamw(3e-4))
        state = load_optimizer_state([muon.state_dict(), adamw.state_dict()], params, partition(...), count=1000)

    Slots are moved into the layout of the parameters. Hyperparameters become those of the saved run; what a schedule
    owns here follows that, from the saved count on. A parameter without a state there, since it never had a gradient,
    is newborn here. So is what the rule has besides (averages, hooks with memory), but its count goes on, too.

    PyTorch counts the updates of each parameter, and here each formula has a count: parameters that did not begin
    together, since they were frozen at first, are groups of a `partition`. What goes by the run and not by its
    parameters, such as a schedule of the learning rate, goes on at the largest of the counts; but a schedule in a
    formula that itself goes by the count, which are Adafactor's step and the betas of Adam, at that of its group.

    Args:
      state_dict: `optimizer.state_dict()`, also one that was saved; or several, of optimizers that share the
        parameters.
      params: the parameters here; of their values nothing but what `rule.init` reads.
      rule: the optimizer here, see the table at the head of this module. Param_groups with other hyperparameters are
        groups of a `partition`; with other decays alone, also `where`.
      layout: what is what; by default that of Flax.
      names: PyTorch's names of the optimizer's parameters, in the order of its param_groups, where it was not made from
        `named_parameters()`; of several optimizers a list for each.
      hyperparams: "saved" are those of the param_groups, "new" those of `rule`.
      count: finished updates, where the optimizer does not save them: SGD, Lion and Muon do not.

    Raises:
      TypeError: `state_dict` is none.
      ValueError: the rule is not the counterpart of the optimizer; names, shapes or numbers of updates do not fit;
        hyperparameters differ within a group here; or the optimizer maximizes.
    """
    if hyperparams not in ("saved", "new"):
        raise ValueError(f"hyperparams is 'saved' or 'new', not {hyperparams!r}")
    saved = list(state_dict) if isinstance(state_dict, list | tuple) else [state_dict]
    for x in saved:
        _check_mapping(x, "load_optimizer_state takes optimizer.state_dict()")
    rule = as_rule(rule, "load_optimizer_state")
    meeting = _Meeting(params, rule, layout, saved, names)
    born = rule.init(params)
    meeting.check_forms(born)
    state = _with_slots(meeting, born, _clock(meeting, count))
    return state if hyperparams == "new" else _with_hyperparameters(meeting, state)


def _clock(meeting: _Meeting, count: int | None) -> int:
    """How many updates the run has finished."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"count is a number of finished updates, not {count!r}")
    saved = max((entry.step for entry in meeting.entries.values() if entry.step is not None), default=None)
    silent = [entry.kind.name for entry in meeting.entries.values() if not entry.kind.counts]
    if saved is None and count is None and silent:
        raise ValueError(f"{silent[0]} does not save how many updates were finished; say it: count=...")
    # Optimizers need not have begun together.
    if saved is not None and count is not None and (count < saved or (count > saved and not silent)):
        raise ValueError(f"count is {count}, and the state_dict has finished {saved} updates")
    # An optimizer that would say it, and has nothing to say, has not begun.
    return count if count is not None else saved or 0


def _clock_of(meeting: _Meeting, family: Family, clock: int) -> int:
    """How many updates a formula has finished."""
    part = meeting.parts.get(family.place)
    leaves = sorted(part.leaves) if part is not None else ()
    own = {k: entry for k, entry in meeting.entries.items() if k in leaves and entry.kind.counts_for(family)}
    if not own:
        return clock
    steps: dict[int, list[str]] = {}
    for entry in own.values():
        if entry.step is not None:
            steps.setdefault(entry.step, []).append(entry.name)
    if len(steps) > 1:
        most = max(steps, key=lambda step: len(steps[step]))
        others = ", ".join(f"{_listed(found)} had {step}" for step, found in steps.items() if step != most)
        raise ValueError(
            f"{meeting.rule!r} has one count for parameters that had different numbers of updates in PyTorch: "
            f"{others}, the others {most}; make them groups, which have one each: partition({{...}}, by=...); or, "
            "where bias correction no longer matters, give all of them the same `step` in the state_dict"
        )
    # As in PyTorch, what never had a gradient begins with the first.
    return next(iter(steps), 0)


def _with_slots(meeting: _Meeting, born: Any, clock: int) -> Any:
    """A newborn state with the memory of PyTorch's, in a run at that count."""
    at, taken = meeting.at, {k: set[str]() for k in meeting.entries}

    def filled(family: Family) -> Any:
        part = meeting.parts.get(family.place)
        new: dict[str, Any] = {"count": _fitted(np.asarray(_clock_of(meeting, family, clock)), family.state.count)}
        if part is None:
            return family.state._replace(**new)
        for slot in family.slots:
            column = meeting.column(family, slot)
            for k, entry, there in meeting.counterparts(family, slot, part):
                if entry.memory:
                    column[k] = _moved(meeting, k, there, column[k], _scaling(part, entry.group), taken[k])
            if column:
                new[slot] = jax.tree.unflatten(at.treedef, column)
        return family.state._replace(**new)

    state = map_families(filled, born)
    for k, entry in meeting.entries.items():
        if left := [key for key in entry.memory if key not in taken[k]]:
            raise ValueError(
                f"PyTorch's state of {entry.name!r} has {', '.join(entry.memory)}, and {meeting.rule!r} has no place "
                f"for {', '.join(left)}; the counterpart of {entry.kind.name} is {entry.counterpart}"
            )
    return state


def _moved(meeting: _Meeting, k: int, there: str, old: Any, scaling: float, taken: set[str]) -> Any:
    """What goes into a slot."""
    at, memory = meeting.at, meeting.entries[k].memory
    factors = _FACTORS.get(there)
    if factors is not None and factors[0] in memory:
        taken.update(factors)
        return _factored(meeting, k, [memory[name] for name in factors], factors, old)
    if there not in memory or isinstance(old, Factors):
        entry = meeting.entries[k]
        if there in memory:
            raise ValueError(
                f"{meeting.rule!r} has means of rows and columns of {quoted(at.paths[k])}, and PyTorch's state of "
                f"{entry.name!r} has {there}, not factored; leave it out of its views: views=[(excluding("
                f"'{at.paths[k]}'), ...)]"
            )
        raise ValueError(
            f"{meeting.rule!r} wants {there} of {entry.name!r}, and PyTorch's state has {', '.join(memory)}; the "
            f"counterpart of {entry.kind.name} is {entry.counterpart}"
        )
    taken.add(there)
    moved = at.to_ours(k, memory[there], f"{there}", old.shape)
    return _fitted(moved if scaling == 1 else scaling * moved.astype(old.dtype), old)


def _with_means_apart(x: Any, axis: int, ndim: int) -> np.ndarray:
    """Means over an axis that is still there, with length 1."""
    x = _numpy(x)
    return x if x.ndim == ndim else np.expand_dims(x, axis)


def _factored(meeting: _Meeting, k: int, means: list[Any], names: Sequence[str], old: Any) -> Any:
    at, axes = meeting.at, meeting.at.axes[k]
    ndim = at.leaves[k].ndim
    moved = [_with_means_apart(x, axis, ndim) for x, axis in zip(means, (-1, -2), strict=True)]
    if axes is not None and not axes.split:
        moved = [axes.to_ours(x, ()) for x in moved]
    shapes = [x.shape for x in old] if isinstance(old, Factors) else [old.shape]
    for pair in (moved, moved[::-1]):
        # Rows and columns have the same part in the formula.
        if [x.shape for x in pair] == shapes and not (axes and axes.split):
            return Factors(*(_fitted(x, like) for x, like in zip(pair, old, strict=True)))
    shown = ", ".join(f"{name} of shape {_numpy(x).shape}" for name, x in zip(names, means, strict=True))
    raise ValueError(
        f"PyTorch's state of {at.names[k]!r} has {shown}, the means over its last two axes there; {meeting.rule!r} has "
        f"means of shape {' and '.join(map(str, shapes))} of {quoted(at.paths[k])}, whose shape is "
        f"{at.leaves[k].shape}; say which axes are its rows and columns: views={{'{at.paths[k]}': "
        "MatrixView(rows=..., columns=...)}"
    )


def _with_hyperparameters(meeting: _Meeting, state: Any) -> Any:
    """A state with the hyperparameters of the param_groups."""
    at, found, new = meeting.at, {k: set[str]() for k in meeting.entries}, dict[Address, Any]()
    schedules = definition_of(meeting.rule).schedules
    for entry, own in meeting.values(state):
        values: dict[float, int] = {}
        for k, there in own.items():
            value = there.hyper(entry.name)
            if entry.name == "weight_decay":
                _check_decay(meeting, k, entry.family.name, value)
            if value and entry.name in found[k]:
                raise ValueError(
                    f"{meeting.rule!r} has {entry.name} twice for {meeting.describe(k)}, and PyTorch has one: "
                    f"{entry.name}={value}"
                )
            found[k].add(entry.name)
            if value is not None:
                values.setdefault(value, k)
        if len(values) > 1:
            (a, first), (b, second), *_ = values.items()
            masked = " or, of a decay, where=..." if entry.name == "weight_decay" else ""
            raise ValueError(
                f"{entry.name} is {a} of {meeting.describe(first)} and {b} of {meeting.describe(second)}, and one "
                f"value of both in {meeting.rule!r}; make them groups: partition({{...}}, by=...){masked}"
            )
        if isinstance(entry.value, Scheduled):
            last = scheduled(entry.key, schedules[entry.address], jnp.maximum(entry.family.state.count - 1, 0))
            new[entry.address] = Scheduled(_fitted(np.asarray(last), entry.value.value))
        elif values:
            new[entry.address] = replacement(entry, next(iter(values)))
    for k, entry in meeting.entries.items():
        for name, source in entry.kind.hyper.items():
            value = entry.hyper(name)
            neutral = value is None or value in source.neutral or (name == "weight_decay" and value == 0)
            # With the form "ema", which `check_forms` has seen, it is the momentum.
            neutral = neutral or (name == "dampening" and "momentum" in found[k])
            if name not in found[k] and not neutral:
                raise ValueError(
                    f"{entry.kind.name} has {source.key}={entry.group[source.key]} for {entry.name!r}, and "
                    f"{meeting.rule!r} has no {name} that acts on {quoted(at.paths[k])}; its counterpart is "
                    f"{entry.counterpart}, or take those of the rule: hyperparams='new'"
                )
    return replace_hyperparameters(state, new)


def _check_decay(meeting: _Meeting, k: int, family: str, value: float | None) -> None:
    entry = meeting.entries[k]
    form, here = entry.kind.decay_of(entry.group), "l2" if family == "weight_decay" else "decoupled"
    if value and form not in (here, "either"):
        raise ValueError(
            f'the weight_decay={value} of {entry.kind.name} is "{form}" for {entry.name!r}, and that of '
            f'{meeting.rule!r} is "{here}"; its counterpart is {entry.counterpart}'
        )


# ---------------------------------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------------------------------


def optimizer_state_dict(
    state: Any,
    params: Any,
    rule: Rule,
    layout: Layout = FLAX,
    *,
    like: Any,
    names: NamesThere | None = None,
    hyperparams: Literal["saved", "new"] = "saved",
) -> Any:
    """A state as `optimizer.load_state_dict` of a PyTorch optimizer takes it: what undoes `load_optimizer_state`.

        optimizer.load_state_dict(optimizer_state_dict(state, params, rule, like=optimizer))

    Args:
      state: the state of `rule` for `params`.
      params: the parameters here.
      rule: the optimizer here, the counterpart of the optimizer there.
      layout: what is what; by default that of Flax.
      like: the optimizer, or its state_dict, from which come the param_groups, and dtypes and devices where it has a
        state; or several, as for `load_optimizer_state`.
      names: as for `load_optimizer_state`.
      hyperparams: "saved" puts those of `state` into the param_groups (of a schedule, the value for the next update),
        "new" leaves those of `like`.

    Returns:
      A dict like `like.state_dict()`, or a list of them where `like` is several.

    Raises:
      ValueError: as `load_optimizer_state`; or the hyperparameters here differ within a param_group.
      ImportError: PyTorch is not installed.
    """
    if hyperparams not in ("saved", "new"):
        raise ValueError(f"hyperparams is 'saved' or 'new', not {hyperparams!r}")
    several = isinstance(like, list | tuple)
    given = [x.state_dict() if hasattr(x, "state_dict") else x for x in (like if several else [like])]
    for x in given:
        _check_mapping(x, "optimizer_state_dict takes like=optimizer, or its state_dict()")
    meeting = _Meeting(params, as_rule(rule, "optimizer_state_dict"), layout, given, names)
    meeting.check_forms(state)
    groups = [[dict(group) for group in saved["param_groups"]] for saved in given]
    if hyperparams == "saved":
        _write_hyperparameters(meeting, state, given, groups)
    memories = _memories(meeting, state, groups, given)
    new = [
        {**saved, "state": memory, "param_groups": own}
        for saved, memory, own in zip(given, memories, groups, strict=True)
    ]
    return new if several else new[0]


def _group_of(entry: _Entry, given: Sequence[Any], groups: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The new param_group of a parameter."""
    place = next(j for j, old in enumerate(given[entry.optimizer]["param_groups"]) if old is entry.group)
    return groups[entry.optimizer][place]


def _write_hyperparameters(
    meeting: _Meeting, state: Any, given: Sequence[Any], groups: Sequence[list[dict[str, Any]]]
) -> None:
    values = hyperparams(state)
    schedules = definition_of(meeting.rule).schedules
    written: dict[tuple[int, str], tuple[float, int]] = {}
    of_leaf: dict[int, dict[str, float]] = {k: {} for k in meeting.entries}
    decays = dict.fromkeys(meeting.entries, 0.0)
    names = {entry.address: name for name, entry in hyperparameter_entries(state).items()}
    for entry, own in meeting.values(state):
        if isinstance(entry.value, Scheduled):
            stored = float(scheduled(entry.key, schedules[entry.address], entry.family.state.count))
            value = 1 - stored if entry.key.startswith(COMPLEMENT) else stored
        else:
            value = _double(entry, values[names[entry.address]])
        for k, there in own.items():
            of_leaf[k][entry.name] = value
            if entry.name == "weight_decay":
                _check_decay(meeting, k, entry.family.name, value)
                decays[k] += value
            if entry.name == "momentum" and entry.key.startswith(COMPLEMENT) and "dampening" in there.kind.hyper:
                of_leaf[k]["dampening"] = value
    for k, there in meeting.entries.items():
        group = _group_of(there, given, groups)
        # What the rule has not is off.
        absent = {name: 0.0 for name, x in there.kind.hyper.items() if x.neutral}
        own = absent | of_leaf[k] | {"weight_decay": decays[k]}
        if missing := [name for name in there.kind.hyper if name not in own and there.hyper(name) is not None]:
            raise ValueError(
                f"{there.kind.name} wants {', '.join(missing)} for {there.name!r}, which {meeting.rule!r} does not "
                f"have; its counterpart is {there.counterpart}, or leave those of `like`: hyperparams='new'"
            )
        for name, value in own.items():
            if there.kind.hyper[name].read(there.group) is None and (
                name != "eps" or math.isclose(value, jnp.finfo(meeting.at.leaves[k].dtype).eps, rel_tol=1e-6)
            ):
                continue  # what it takes by default
            old = written.setdefault((id(group), name), (value, k))
            if old[0] != value:
                raise ValueError(
                    f"{name} is {old[0]} of {meeting.describe(old[1])} and {value} of {meeting.describe(k)}, which are "
                    "in one param_group of PyTorch; give it one for each"
                )
            there.kind.hyper[name].write(group, value)


def _double(entry: Entry, value: Any) -> float:
    """A hyperparameter as the number that was written: the shortest that its precision does not tell from it."""
    if entry.key.startswith(COMPLEMENT):
        return float(1 - np.float64(str(np.asarray(entry.value))))
    return float(str(np.asarray(value)))


def _memories(
    meeting: _Meeting, state: Any, groups: Sequence[list[dict[str, Any]]], given: Sequence[Any]
) -> list[dict[Any, dict[str, Any]]]:
    """The `state` of each optimizer."""
    # What does not take part here stays as it is.
    own = {(entry.optimizer, entry.id) for entry in meeting.entries.values()}
    memories = [
        {id_: memory for id_, memory in saved["state"].items() if (i, id_) not in own} for i, saved in enumerate(given)
    ]
    kept: set[int] = set()
    for family, part in meeting.formulas(state):
        count = int(family.state.count)
        for slot in family.slots:
            column = meeting.column(family, slot)
            for k, entry, there in meeting.counterparts(family, slot, part):
                kept.add(k)
                if count == 0:
                    continue  # newborn, it has no memory in PyTorch
                memory = memories[entry.optimizer].setdefault(entry.id, {})
                scaling = _scaling(part, _group_of(entry, given, groups))
                memory |= _written(meeting.at, k, there, column[k], scaling, entry)
                memory |= {"step": _step_of(count, entry)} if entry.kind.counts else {}
                memory |= {"RMS": 0} if "scale_parameter" in entry.group else {}  # computed anew before it is read
    begun = any(int(family.state.count) > 0 for family, _ in meeting.formulas(state))
    for k, entry in meeting.entries.items() if begun else ():
        plain = entry.kind.here == "sgd" and not _group_of(entry, given, groups)["momentum"]
        if k not in kept and not plain:
            raise ValueError(
                f"{meeting.rule!r} has nothing of what {entry.kind.name} keeps for {entry.name!r}; its counterpart is "
                f"{entry.counterpart}"
            )
    return memories


def _written(at: _Matched, k: int, there: str, x: Any, scaling: float, entry: _Entry) -> dict[str, Any]:
    if not isinstance(x, Factors):
        if there == "momentum_buffer" and scaling == 0:
            raise ValueError(
                f"the velocity of {quoted(at.paths[k])} contains the learning rate, which is 0 now; PyTorch's does "
                "not, and cannot be told from it"
            )
        array = at.to_theirs(k, x)
        return {there: _tensor(array if scaling == 1 else array / scaling, entry.state.get(there))}
    axes, names = at.axes[k], _FACTORS[there]
    pair = [np.asarray(factor) if axes is None else axes.to_theirs(np.asarray(factor)) for factor in x]
    shape = at.to_theirs(k, at.leaves[k]).shape
    wanted = [(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])]
    for means in (pair, pair[::-1]):
        if [mean.shape for mean in means] == wanted:
            if names[0] == "exp_avg_sq_row":
                means = [np.squeeze(mean, axis) for mean, axis in zip(means, (-1, -2), strict=True)]
            return {name: _tensor(mean, entry.state.get(name)) for name, mean in zip(names, means, strict=True)}
    raise ValueError(
        f"{quoted(at.paths[k])} has means of shape {' and '.join(str(mean.shape) for mean in pair)} in the layout of "
        f"PyTorch, which keeps those of the last two axes of {entry.name!r}: {' and '.join(map(str, wanted))}"
    )


def _step_of(count: int, entry: _Entry) -> Any:
    """The clock, as PyTorch keeps it: a tensor of float32, and in transformers a number."""
    torch: Any = needed("torch", "torch")
    if "scale_parameter" in entry.group:
        return count
    old = entry.state.get("step")
    if hasattr(old, "detach"):
        return torch.full_like(old, count)
    wide = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(count), dtype=torch.float64 if wide else torch.float32)
