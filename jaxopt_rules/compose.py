"""Composition: rules made of rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxopt_rules.hyperparameters import Address
from jaxopt_rules.rule import Definition, Rule, as_rule, constructor, definition_of, extra_for
from jaxopt_rules.schedules import Schedule


@dataclass(frozen=True, eq=False)
class _Chain(Definition):
    names: tuple[str, ...] | None  # of the members, where at least one was given a name
    rules: tuple[Rule, ...]

    @property
    def terminal(self) -> bool | None:
        members = [definition_of(rule).terminal for rule in self.rules]
        return True if True in members else None if None in members else False

    @property
    def schedules(self) -> dict[Address, Schedule]:
        places = range(len(self.rules)) if self.names is None else self.names
        return {
            ((place, *inner), key): schedule
            for place, rule in zip(places, self.rules, strict=True)
            for (inner, key), schedule in definition_of(rule).schedules.items()
        }

    @property
    def remembers(self) -> bool:
        return any(definition_of(rule).remembers for rule in self.rules)

    @property
    def accepts(self) -> frozenset[str] | None:
        members = [definition_of(rule).accepts for rule in self.rules]
        return None if None in members else frozenset().union(*(names for names in members if names))

    def _pack(self, states: list[Any]) -> Any:
        return tuple(states) if self.names is None else dict(zip(self.names, states, strict=True))

    def _unpack(self, state: Any) -> list[Any]:
        if self.names is None and isinstance(state, tuple) and len(state) == len(self.rules):
            return list(state)
        if self.names is not None and isinstance(state, dict) and state.keys() == set(self.names):
            return [state[name] for name in self.names]
        wanted = f"{len(self.rules)} states" if self.names is None else f"states named {', '.join(self.names)}"
        raise TypeError(
            f"chain: update got a state of type {type(state).__name__} where it needs {wanted}; "
            "was it made by the init of another rule?"
        )

    def init(self, params: Any) -> Any:
        return self._pack([rule.init(params) for rule in self.rules])

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        states = self._unpack(state)
        for i, rule in enumerate(self.rules):
            grads, states[i] = rule.update(grads, states[i], params, **extra_for(rule, extra))
        return grads, self._pack(states)

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        *hooks, last = self.rules
        if definition_of(last).terminal is False:
            # Behind a member of another library that gives updates, as far as one can know.
            return super().apply(grads, state, params, extra)
        states = self._unpack(state)
        for i, rule in enumerate(hooks):
            grads, states[i] = rule.update(grads, states[i], params, **extra_for(rule, extra))
        params, states[-1] = last.apply(grads, states[-1], params, **extra_for(last, extra))
        return params, self._pack(states)


@constructor
def chain(*rules: Rule, **named_rules: Rule) -> Definition:
    """Rules one after another: each member's result is the next one's gradient.

        chain(clip_by_global_norm(1.0), adamw(3e-4, weight_decay=0.1))
        chain(clip=clip_by_global_norm(1.0), optimizer=adamw(3e-4))

    The state is the tuple of the members' states, or, where members are named, the dict of them under these names
    (members without a name then have their position as one). Members come in the order in which they are written.
    Pairs (init, update) from other libraries are members like any other.

    Raises:
      TypeError: a member is no rule, or a name no identifier.
      ValueError: something stands behind the member that turns gradients into updates: a second such member, or a
        hook or direction, which is made for gradients.
    """
    for name in named_rules:
        if not name.isidentifier():
            raise TypeError(f"chain: members have identifiers as names, not {name!r}")
    members = {str(i): as_rule(rule, "chain") for i, rule in enumerate(rules)}
    members |= {name: as_rule(rule, "chain") for name, rule in named_rules.items()}
    ended_by = None
    for rule in members.values():
        terminal = definition_of(rule).terminal
        if ended_by is not None and terminal is not None:
            raise ValueError(
                f"chain: {rule!r} stands behind {ended_by!r}, which has turned the gradient into an update (sign and "
                "learning rate); hooks and directions stand in front of the one member that does so"
            )
        ended_by = rule if terminal else ended_by
    return _Chain(tuple(members) if named_rules else None, tuple(members.values()))


@constructor
def identity() -> Definition:
    """The rule that changes nothing: a chain of no rules. Its state is `()`."""
    return _Chain(None, ())
