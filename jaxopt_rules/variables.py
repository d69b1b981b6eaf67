"""Flax NNX models: their variables by path. Flax is not imported here; where none is loaded, nothing is of its kind."""

import functools
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

Parts = tuple[Any, ...]  # names and positions


def nnx() -> Any:
    """`flax.nnx`, if something has imported it."""
    return sys.modules.get("flax.nnx")


def is_variable(x: object) -> bool:
    """Whether `x` is an NNX variable."""
    flax = nnx()
    # Not `isinstance`, which the metaclass of variables makes slow.
    return flax is not None and issubclass(type(x), flax.Variable)


def is_parameter(variable: Any) -> bool:
    """Whether a variable is one of those that NNX calls parameters."""
    return issubclass(type(variable), nnx().Param)


def is_module(x: object) -> bool:
    """Whether `x` is an NNX module, or another object of which NNX knows the variables."""
    flax = nnx()
    return flax is not None and isinstance(x, flax.Pytree)


class Listing(NamedTuple):
    """Variables of a model in the order in which NNX flattens them. One that is in several places comes once."""

    parts: tuple[Parts, ...]
    by_path: dict[str, Any]  # blocks/0/kernel -> variable


# What was listed is found again as long as every node of the model holds the very same objects: to walk through a model
# as NNX does takes several times as long as to update it, if it is small. What holds no variables and may be another
# object each time does not count: numbers, flags (`train()` and `eval()` set them), what NNX notes in every node that
# has been through a transform.
_Snapshot = list[tuple[Any, list[Any]]]
_listed: weakref.WeakKeyDictionary[Any, tuple[_Snapshot, list[tuple[Any, Listing]]]] = weakref.WeakKeyDictionary()


@functools.cache
def _passing() -> frozenset[type]:
    note = getattr(getattr(nnx(), "pytreelib", None), "PytreeState", type(None))
    return frozenset({bool, int, float, str, type(None), note})


def listing(model: Any, wrt: Any = ...) -> Listing:
    """The variables of a model that a filter of NNX selects; all, if none is given."""
    try:
        known = _listed.get(model)
    except TypeError:  # a list of modules, for example, cannot be hashed
        return _listing(model, wrt)
    if known is None or not all(itertools.starmap(_holds, known[0])):
        snapshot = _snapshot(model)
        if snapshot is None:
            return _listing(model, wrt)
        known = _listed[model] = snapshot, []
    for other, found in known[1]:
        if other == wrt:
            return found
    known[1].append((wrt, _listing(model, wrt)))
    return known[1][-1][1]


def _listing(model: Any, wrt: Any) -> Listing:
    flax = nnx()
    chosen = flax.to_flat_state(flax.state(model, wrt)).paths
    everything = {parts: x for parts, x in flax.iter_graph(model) if is_variable(x)}
    by_path = {path(parts): everything[parts] for parts in chosen}
    if len(by_path) < len(chosen):
        twice = next(path(a) for a in chosen for b in chosen if a != b and path(a) == path(b))
        raise ValueError(f"two variables of the model have the same path, '{twice}'; rename one of them")
    return Listing(tuple(chosen), by_path)


def path(parts: Iterable[str | int]) -> str:
    """The text that stands for a path of NNX in patterns, names and messages."""
    return "/".join(map(str, parts))


def _children(node: Any) -> list[Any]:
    passing = _passing()
    return [x for x in (node.values() if isinstance(node, dict) else node) if type(x) not in passing]


def _holds(node: Any, children: list[Any]) -> bool:
    now = _children(node)
    return len(now) == len(children) and all(map(operator.is_, now, children))


def _snapshot(model: Any) -> _Snapshot | None:
    """What every node of a model holds.

    `None` where variables are in a container that does not tell, or where a node holds the model itself, which would
    keep it alive.
    """
    snapshot: _Snapshot = []
    for _, x in nnx().iter_graph(model):
        if is_module(x):
            node = vars(x)
        elif isinstance(x, dict | list | tuple):
            node = x
        elif not is_variable(x) and any(map(is_variable, jax.tree.leaves(x, is_leaf=is_variable))):
            return None
        else:
            continue
        children = _children(node)
        if any(child is model for child in children):
            return None
        snapshot.append((node, children))
    return snapshot


def gradients(grads: Any, wrt: Any = ...) -> tuple[tuple[Parts, ...], list[Any]]:
    """Paths and arrays of what `nnx.grad` gave: a state, several in a list or tuple, or in tree mode a model."""
    flax = nnx()
    if isinstance(grads, list | tuple):
        several = [gradients(part, wrt) for part in grads]
        parts = tuple((k, *rest) for k, (paths, _) in enumerate(several) for rest in paths)
        return parts, [x for _, arrays in several for x in arrays]
    if not isinstance(grads, flax.State):
        grads = flax.state(grads, wrt) if is_module(grads) else flax.State(grads)
    flat = flax.to_flat_state(grads)
    return flat.paths, [value(g) if is_variable(g) else g for g in flat.leaves]


@dataclass(frozen=True)
class LossOfModule:
    """A function of a module as one of the parameters that a rule sees, by their keys there."""

    function: Callable[[Any], Any]
    graph: Any
    parts: tuple[Parts, ...]
    keys: tuple[Any, ...]  # of each variable; `None` where the rule does not see it

    def at(self, rest: Sequence[Any], params: Mapping[Any, Any]) -> Any:
        """Its value at these parameters. What is absent among them, and all other variables, are those of `rest`."""
        leaves = [x if params.get(key) is None else params[key] for key, x in zip(self.keys, rest, strict=True)]
        flax = nnx()
        return self.function(flax.merge(self.graph, flax.from_flat_state(zip(self.parts, leaves, strict=True))))


def loss_of_module(
    function: Callable[[Any], Any], model: Any, keys: Mapping[str, Any]
) -> tuple[LossOfModule, list[Any]]:
    """A function of a module for a rule that sees its variables under these keys, and the values of all of them."""
    flax = nnx()
    graph, state = flax.split(model)
    flat = flax.to_flat_state(state)
    rest = [value(x) if is_variable(x) else x for x in flat.leaves]
    return LossOfModule(function, graph, tuple(flat.paths), tuple(keys.get(path(p)) for p in flat.paths)), rest


def value(variable: Any) -> Any:
    """The array in a variable, past the hooks that its readers may have."""
    raw = variable.get_raw_value()
    return raw[...] if variable.ref else raw


@functools.cache
def _is_stored_as_known() -> bool:
    probe = nnx().Variable(0)
    object.__setattr__(probe, "_raw_value", 1)
    return probe.get_raw_value() == 1


def write(variables: Iterable[Any], new: Sequence[Any]) -> None:
    """Puts arrays into variables, past the hooks that its writers may have."""
    # The method asks twice for the trace that it is called in, which takes as long as the update itself. What is no
    # tracer can be stored from every trace.
    directly = _is_stored_as_known() and not any(isinstance(x, Tracer) for x in new[:1])
    for variable, x in zip(variables, new, strict=True):
        if variable.ref and isinstance(ref := variable.get_raw_value(), jax.Ref):
            ref[...] = x
        elif directly:
            object.__setattr__(variable, "_raw_value", x)
        else:
            variable.set_raw_value(x)
