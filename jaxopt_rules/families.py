"""What a state is made of: the states of rules, inside tuples, dicts and the states of wrappers."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Place = tuple[str | int, ...]


class Family(NamedTuple):
    """The state of one rule, or another part of a state, and where it stands in the whole."""

    place: Place  # names of chain members and labels of groups, and positions where there are none
    state: Any

    @property
    def name(self) -> str:
        """`adam` for an AdamState, `weight_decay` for a WeightDecayState."""
        words = type(self.state).__name__.removesuffix("State")
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in words).lstrip("_")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(part for part in self.place if isinstance(part, str))

    @property
    def own(self) -> dict[str, Any]:
        """The fields of the state but for that of a wrapped rule."""
        return {name: value for name, value in self.state._asdict().items() if name != "inner"}

    @property
    def slots(self) -> tuple[str, ...]:
        """The fields that hold memory: that of each parameter, and what belongs to the rule as a whole."""
        return tuple(name for name in self.own if name not in ("count", "hyper", "metrics", "key"))


def access(state: Any, place: Place, name: str = "state") -> str:
    """The expression that gives the part of a state at this place."""
    text = name
    for step in place:
        text += ".inner" if is_family(state) else f"[{step!r}]"
        state = state.inner if is_family(state) else state[step]
    return text


def is_family(state: Any) -> bool:
    """Whether this is the state of a rule that a lift or a wrapper made."""
    return getattr(type(state), "_fields", ())[:2] == ("count", "hyper")


def is_record(state: Any) -> bool:
    """Whether this is a NamedTuple with fields, as the states of rules are here and in other libraries."""
    return bool(getattr(type(state), "_fields", ()))


def _parts(state: Any) -> list[tuple[str | int, Any]]:
    """The states inside a state, each with its name or position."""
    if is_family(state):
        # A position, so that the names of what is inside do not move when a rule is wrapped.
        return [(0, state.inner)] if state._fields[-1] == "inner" else []
    if isinstance(state, Mapping):
        return list(state.items())
    return list(enumerate(state)) if isinstance(state, list | tuple) else []


def _with_parts(state: Any, parts: list[Any]) -> Any:
    if is_family(state):
        return state._replace(inner=parts[0])
    if isinstance(state, dict):
        new = copy.copy(state)
        new.update(zip(state, parts, strict=True))
        return new
    make: Any = getattr(type(state), "_make", type(state))
    return make(dict(zip(state, parts, strict=True)) if isinstance(state, Mapping) else parts)


def nodes(state: Any, place: Place = ()) -> Iterator[Family]:
    """A state and all that it is made of, from the outermost to the innermost."""
    yield Family(place, state)
    for step, part in _parts(state):
        yield from nodes(part, (*place, step))


def families(state: Any) -> Iterator[Family]:
    """The states of rules in a state. A wrapper comes first, and then what is inside it."""
    return (node for node in nodes(state) if is_family(node.state))


def map_nodes(function: Callable[[Family], Any], state: Any, place: Place = ()) -> Any:
    """A state with `function(node)` for each node, asked in the order of `nodes` and before what is inside it."""
    state = function(Family(place, state))
    parts = _parts(state)
    new = [map_nodes(function, part, (*place, step)) for step, part in parts]
    # Containers of other libraries may not come back equal from being built anew.
    same = all(x is part for x, (_, part) in zip(new, parts, strict=True))
    return state if same else _with_parts(state, new)


def map_families(function: Callable[[Family], Any], state: Any) -> Any:
    """A state with `function(family)` for each family; of a wrapper's state, it leaves `inner` as it is."""
    return map_nodes(lambda node: function(node) if is_family(node.state) else node.state, state)


def per_parameter(treedef: Any, node: Family, field: Any) -> list[Any] | None:
    """The parts of a field that belong to one parameter each, if it is made of such."""
    try:
        parts = treedef.flatten_up_to(field)
    except (ValueError, TypeError):
        return None
    # A field of another library's state may hold a tuple of states, which is built like a tuple of parameters.
    states = not is_family(node.state) and any(is_record(inner.state) for part in parts for inner in nodes(part))
    return None if states else parts
