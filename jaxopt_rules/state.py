"""What a state can be asked: its hyperparameters, its recorded values, and its content under stable names."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, check, complement, encode, public_name


class Family(NamedTuple):
    """The state of one lifted rule and where it stands in the whole."""

    place: tuple[str | int, ...]  # names of chain members, positions where they have none
    state: Any

    @property
    def name(self) -> str:
        """`adam` for an AdamState, `weight_decay` for a WeightDecayState."""
        words = type(self.state).__name__.removesuffix("State")
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in words).lstrip("_")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(part for part in self.place if isinstance(part, str))


def _is_family(state: Any) -> bool:
    return getattr(type(state), "_fields", ())[:2] == ("count", "hyper")


def _families(state: Any, place: tuple[str | int, ...] = ()) -> Iterator[Family]:
    if _is_family(state):
        yield Family(place=place, state=state)
    elif isinstance(state, Mapping):
        for key, part in state.items():
            yield from _families(part, (*place, key))
    elif isinstance(state, list | tuple):
        for i, part in enumerate(state):
            yield from _families(part, (*place, i))


def _map_families(function: Callable[[Family], Any], state: Any, place: tuple[str | int, ...] = ()) -> Any:
    if _is_family(state):
        return function(Family(place, state))
    if isinstance(state, Mapping):
        parts = {key: _map_families(function, part, (*place, key)) for key, part in state.items()}
        if not isinstance(state, dict):
            make: Any = type(state)
            return make(parts)
        new = copy.copy(state)
        new.update(parts)
        return new
    if isinstance(state, list | tuple):
        parts = [_map_families(function, part, (*place, i)) for i, part in enumerate(state)]
        make = getattr(type(state), "_make", type(state))
        return make(parts)
    return state


class Entry(NamedTuple):
    """One hyperparameter, or one recorded value, in a state."""

    family: Family
    key: str  # the name within the family's state
    value: Any

    @property
    def name(self) -> str:
        return public_name(self.key)

    @property
    def address(self) -> Address:
        return self.family.place, self.key


def _named(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Entries under the shortest names that tell them apart: the bare name, else with labels in front of it."""
    named = {}
    for name in dict.fromkeys(entry.name for entry in entries):
        same = [entry for entry in entries if entry.name == name]
        spellings: tuple[Callable[[Entry], tuple[Any, ...]], ...] = (
            lambda e: (e.name,),
            lambda e: (*e.family.labels, e.name),
            lambda e: (*e.family.labels, e.family.name, e.name),
            lambda e: (*e.family.place, e.family.name, e.name),
        )
        for spelling in spellings:
            keys = [".".join(map(str, spelling(entry))) for entry in same]
            # Of several, none is called by the bare name: it would be taken for all of them.
            if len(set(keys)) == len(keys) and (len(same) == 1 or name not in keys):
                named |= dict(zip(keys, same, strict=True))
                break
    return named


def hyperparameter_entries(state: Any) -> dict[str, Entry]:
    """The hyperparameters of a state with the places where they stand, under the names of `hyperparams`."""
    return _named(
        [Entry(family, key, value) for family in _families(state) for key, value in family.state.hyper.items()]
    )


def _value(entry: Entry) -> Array:
    stored = entry.value.value if isinstance(entry.value, Scheduled) else entry.value
    return complement(stored) if entry.key.startswith(COMPLEMENT) else stored


def hyperparams(state: Any) -> dict[str, Array]:
    """The hyperparameters that a state holds, as a flat dict of scalars.

    A name that occurs once in the state stands bare (`learning_rate`); others carry what tells them apart in front:
    names of chain members, or of families (`step.weight_decay`), or positions. Of a decay rate the state stores 1 − β;
    here it is β. For a hyperparameter that a schedule owns it is the value last used, and before the first update that
    for count 0.
    """
    return {name: _value(entry) for name, entry in hyperparameter_entries(state).items()}


def set_hyperparams(state: Any, **values: Any) -> Any:
    """A state in which hyperparameters have new values, under the names of `hyperparams(state)`.

        state = set_hyperparams(state, learning_rate=3e-4)
        state = set_hyperparams(state, **{"step.weight_decay": 0.0})

    Nothing is compiled anew: shapes and dtypes stay. Works under `jax.jit` with traced values, too.

    Raises:
      KeyError: the state has no such hyperparameter; names those it has.
      ValueError: the value is not legal or not of the shape of the old one, or a schedule owns the name.
      TypeError: the value is not a number.
    """
    entries = hyperparameter_entries(state)
    new: dict[Address, Array] = {}
    for name, value in values.items():
        if name not in entries:
            raise KeyError(f"the state has no hyperparameter {name!r}; it has {', '.join(entries) or 'none'}")
        entry = entries[name]
        if isinstance(entry.value, Scheduled):
            raise ValueError(f"{name} is owned by a schedule, whose values it follows; it cannot be set")
        if callable(value):
            raise TypeError(f"{name} is set to a number; a schedule is given when the rule is made")
        new[entry.address] = replacement(entry, value)
    return replace_hyperparameters(state, new)


def replacement(entry: Entry, value: Any) -> Array:
    """`value` checked, encoded, and stored as the entry's old value was: its shape, dtype and sharding."""
    old = entry.value
    check(entry.name, value, jnp.shape(old))
    new = jnp.array(encode(entry.key, value), old.dtype)
    return trees.placed_like(new, old)


def replace_hyperparameters(state: Any, new: Mapping[Address, Any]) -> Any:
    """A state with other entries at these addresses, unchecked."""

    def replace(family: Family) -> Any:
        hyper = {key: new.get((family.place, key), value) for key, value in family.state.hyper.items()}
        return family.state._replace(hyper=hyper)

    return _map_families(replace, state)


def metrics(state: Any) -> dict[str, Array]:
    """What the last update recorded, as a flat dict of scalars named as in `hyperparams`.

    The learning rates used, and what rules record on the way: `grad_norm` where something clips. Before the first
    update recorded values are 0. The structure never changes, so `jax.lax.scan` can stack the dict.
    """
    rates = {
        name: _value(entry) for name, entry in hyperparameter_entries(state).items() if entry.name == "learning_rate"
    }
    recorded = [
        Entry(family, key, value)
        for family in _families(state)
        for key, value in getattr(family.state, "metrics", {}).items()
    ]
    return rates | {name: entry.value for name, entry in _named(recorded).items()}


def leaf_names(state: Any) -> list[str]:
    """A name for every leaf of a state, in the order of `jax.tree.leaves`.

    Names are made of labels, family, field and path (`adam.m.blocks/0/w`, `step.hyper.learning_rate`), and not of
    positions, so that putting a hook of another family in front of a chain renames nothing. Of several members of one
    family under one label, the second is `adam#2`, and so on; states of other libraries are named by their positions.
    """
    taken: dict[str, int] = {}

    def name_family(family: Family) -> Any:
        prefix = ".".join((*family.labels, family.name))
        taken[prefix] = taken.get(prefix, 0) + 1
        if taken[prefix] > 1:
            prefix = f"{prefix}#{taken[prefix]}"
        fields = family.state._asdict()
        named = {name: _with_names(part, f"{prefix}.{name}") for name, part in fields.items()}
        # The value of a schedule is saved under the name of the hyperparameter, which may be a plain number later.
        named["hyper"] = {
            key: _with_names(x, f"{prefix}.hyper.{key}", deep=False) for key, x in fields["hyper"].items()
        }
        return type(family.state)(**named)

    named = _map_families(name_family, state)
    leaves, _ = trees.flatten_with_paths(named)
    return [str(leaf) if isinstance(leaf, _Name) else path.replace("/", ".") for path, leaf in leaves]


class _Name(str):
    """A leaf's name, told apart from the leaves of states that are no families."""


def _with_names(part: Any, prefix: str, deep: bool = True) -> Any:
    leaves, treedef = trees.flatten_with_paths(part)
    return jax.tree.unflatten(treedef, [_Name(f"{prefix}.{path}" if path and deep else prefix) for path, _ in leaves])
