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


def is_module(x: object) -> bool:
    """Whether `x` is an NNX module, or another object of which NNX knows the variables."""
    flax = nnx()
    return flax is not None and isinstance(x, flax.Pytree)


class Listing(NamedTuple):
    """Variables of a model in the order in which NNX flattens them. One that is in several places comes once."""

    parts: tuple[Parts, ...]
    by_path: dict[str, Any]  # blocks/0/kernel -> variable


# What was listed is found again as long as every node of the model holds the very same objects: to walk through a model
# as NNX does takes several times as long as to update it, if it is small.
_Snapshot = list[tuple[Any, tuple[Any, ...]]]
_listed: weakref.WeakKeyDictionary[Any, tuple[Any, _Snapshot, Listing]] = weakref.WeakKeyDictionary()


def listing(model: Any, wrt: Any = ...) -> Listing:
    """The variables of a model that a filter of NNX selects; all, if none is given."""
    try:
        known = _listed.get(model)
    except TypeError:  # a list of modules, for example, cannot be hashed
        return _listing(model, wrt)
    if known is not None and known[0] == wrt and all(itertools.starmap(_holds, known[1])):
        return known[2]
    found, snapshot = _listing(model, wrt), _snapshot(model)
    if snapshot is not None:
        _listed[model] = wrt, snapshot, found
    return found


def _listing(model: Any, wrt: Any) -> Listing:
    flax = nnx()
    chosen = flax.to_flat_state(flax.state(model, wrt)).paths
    everything = {parts: x for parts, x in flax.iter_graph(model) if is_variable(x)}
    return Listing(tuple(chosen), {path(parts): everything[parts] for parts in chosen})


def path(parts: Iterable[str | int]) -> str:
    """The text that stands for a path of NNX in patterns, names and messages."""
    return "/".join(map(str, parts))


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node


def _holds(node: Any, children: tuple[Any, ...]) -> bool:
    return len(node) == len(children) and all(map(operator.is_, _children(node), children))


def _snapshot(model: Any) -> _Snapshot | None:
    """What every node of a model holds; `None` where variables are in a container that does not tell."""
    snapshot = []
    for _, x in nnx().iter_graph(model):
        if is_module(x):
            node = vars(x)
        elif isinstance(x, dict | list | tuple):
            node = x
        elif not is_variable(x) and any(map(is_variable, jax.tree.leaves(x, is_leaf=is_variable))):
            return None
        else:
            continue
        snapshot.append((node, tuple(_children(node))))
    return snapshot


def gradients(grads: Any, wrt: Any = ...) -> tuple[tuple[Parts, ...], list[Any]]:
    """Paths and arrays of what `nnx.grad` gave: a state, or in tree mode a model."""
    flax = nnx()
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
