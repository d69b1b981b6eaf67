"""Composition: rules one after another, and rules for a part of the leaves."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from jaxopt_rules import trees
from jaxopt_rules.hyperparameters import Address
from jaxopt_rules.lift import Clocked, Leafwise, fits_in_a_row, in_a_row
from jaxopt_rules.numerics import after, anew, is_inexact, real, widened
from jaxopt_rules.rule import (
    Definition,
    Place,
    Rule,
    Share,
    as_rule,
    constructor,
    definition_of,
    extra_for,
    joint_place,
)
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import By, Selector, check_by, check_selector, label, select


class Composed(Definition):
    """What is known of a rule that is made of rules."""

    @property
    def members(self) -> Sequence[tuple[tuple[str | int, ...], Definition]]:
        """What stands behind its parts, each with the place of its state in the whole state."""
        return [(place, definition_of(rule)) for place, rule in self.parts]

    def seen(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[list[Any]]:
        """For each member, the leaves as it sees them: `None` for what is not its own."""
        return [list(leaves) for _ in self.members]

    @property
    def place(self) -> Place:
        return joint_place(member.place for _, member in self.members)

    @property
    def gate(self) -> bool:
        return any(member.gate for _, member in self.members)

    @property
    def defers(self) -> bool:
        return any(member.defers for _, member in self.members)

    @property
    def takes_none(self) -> bool:
        return all(member.takes_none for _, member in self.members)

    @property
    def schedules(self) -> dict[Address, Schedule]:
        return {
            ((*outer, *inner), key): schedule
            for outer, member in self.members
            for (inner, key), schedule in member.schedules.items()
        }

    @property
    def remembers(self) -> bool:
        return any(member.remembers for _, member in self.members)

    @property
    def accepts(self) -> frozenset[str] | None:
        accepted = [member.accepts for _, member in self.members]
        return None if None in accepted else frozenset().union(*(names for names in accepted if names))


@dataclass(frozen=True, eq=False)
class _Chain(Composed):
    names: tuple[str, ...] | None  # of the members, where at least one was given a name
    rules: tuple[Rule, ...]

    @property
    def parts(self) -> Sequence[tuple[tuple[str | int, ...], Rule]]:
        names = range(len(self.rules)) if self.names is None else self.names
        return [((name,), rule) for name, rule in zip(names, self.rules, strict=True)]

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        columns = [[Share()] * len(leaves)] + [member.shares(paths, leaves) for _, member in self.members]
        return [reduce(Share.joined, column) for column in zip(*columns, strict=True)]

    @functools.cached_property
    def steps(self) -> list[Rule]:
        """Its members, where in place of a chain stand those of that."""
        inner = [(rule, definition_of(rule)) for rule in self.rules]
        return [step for rule, member in inner for step in (member.steps if isinstance(member, _Chain) else [rule])]

    def _pack(self, states: Iterator[Any]) -> Any:
        """The state from those of its steps."""
        inner = [definition_of(rule) for rule in self.rules]
        parts = [member._pack(states) if isinstance(member, _Chain) else next(states) for member in inner]
        return tuple(parts) if self.names is None else dict(zip(self.names, parts, strict=True))

    def _unpack(self, state: Any) -> list[Any]:
        """The states of its steps."""
        inner = [definition_of(rule) for rule in self.rules]
        parts = zip(inner, self._parts(state), strict=True)
        return [s for member, part in parts for s in (member._unpack(part) if isinstance(member, _Chain) else [part])]

    def _parts(self, state: Any) -> list[Any]:
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
        return self._pack(iter([rule.init(params) for rule in self.steps]))

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        return self._through(grads, state, params, extra, applied=False)

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        return self._through(grads, state, params, extra, applied=True)

    def _through(
        self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any], *, applied: bool
    ) -> tuple[Any, Any]:
        """What comes out behind the last member, or, if `applied`, the parameters that it is added to."""
        states, start = self._unpack(state), 0
        for rules in _rows(self.steps):
            stop = start + len(rules)
            last = applied and stop == len(states)
            grads, states[start:stop] = _together(rules, grads, states[start:stop], params, extra, applied=last)
            start = stop
        return grads, self._pack(iter(states))


def _rows(rules: Iterable[Rule]) -> Iterator[list[Rule]]:
    """Rules that act together: formulas for one array in a row, and all others by themselves."""
    for together, group in itertools.groupby(rules, lambda rule: fits_in_a_row(definition_of(rule))):
        members = list(group)
        yield from [members] if together else [[rule] for rule in members]


def _together(
    rules: Sequence[Rule], grads: Any, states: Sequence[Any], params: Any, extra: Mapping[str, Any], *, applied: bool
) -> tuple[Any, list[Any]]:
    members, extras = [definition_of(rule) for rule in rules], [extra_for(rule, extra) for rule in rules]
    if fits_in_a_row(members[0]):
        return in_a_row(cast(list[Leafwise], members), grads, states, params, extras, applied=applied)
    if applied and members[0].gives_updates:
        result, state = rules[0].apply(grads, states[0], params, **extras[0])
        return result, [state]
    result, state = rules[0].update(grads, states[0], params, **extras[0])
    return trees.apply_updates(params, result) if applied else result, [state]


def _check_order(rules: tuple[Rule, ...]) -> None:
    ended_by = behind = gate = None
    for rule in rules:
        definition = definition_of(rule)
        if gate is not None:
            raise ValueError(
                f"chain: {rule!r} stands behind {gate!r}, which may do nothing while this would still act; put it "
                "inside, as the last member of a chain"
            )
        if ended_by is not None and definition.place in ("front", "end"):
            raise ValueError(
                f"chain: {rule!r} stands behind {ended_by!r}, which has turned the gradient into an update (sign and "
                "learning rate); hooks and directions stand in front of the one member that does so"
            )
        if behind is not None and definition.place in ("front", "end"):
            raise ValueError(
                f"chain: {behind!r} works on updates, and stands in front of {rule!r}; it belongs behind the member "
                "that turns gradients into updates"
            )
        ended_by = rule if definition.place == "end" else ended_by
        behind = rule if definition.place == "behind" else behind
        gate = rule if definition.gate else gate


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
      ValueError: something stands where it cannot: behind the member that turns gradients into updates, a second such
        member, or a hook or direction, which is made for gradients; in front of it, what works on updates; anything
        behind a gate (`accumulate`, `skip_nonfinite`, ...), which would act when the gate does nothing.
    """
    for name in named_rules:
        if not name.isidentifier():
            raise TypeError(f"chain: members have identifiers as names, not {name!r}")
    members = {str(i): as_rule(rule, "chain") for i, rule in enumerate(rules)}
    members |= {name: as_rule(rule, "chain") for name, rule in named_rules.items()}
    _check_order(tuple(members.values()))
    return _Chain(tuple(members) if named_rules else None, tuple(members.values()))


@constructor
def identity() -> Definition:
    """The rule that changes nothing: a chain of no rules. Its state is `()`."""
    return _Chain(None, ())


# ---------------------------------------------------------------------------------------------------------------------
# A part of the leaves
# ---------------------------------------------------------------------------------------------------------------------


Owners = Callable[[Sequence[str], Sequence[Any]], list[Any]]

FROZEN = Share(group="frozen", rate=0.0)


class _Cut:
    """The trees of one update, and which leaves belong to which rule."""

    def __init__(self, owners: Owners, grads: Any, params: Any, extra: Mapping[str, Any]) -> None:
        gs, self.treedef = trees.flatten(grads)
        model = grads if params is None else params
        self.leaves, self.structure = trees.flatten(model)
        self.owners = owners(trees.paths(model), self.leaves)
        parts = trees.align(self.treedef, model, "the parameters")
        # Where one `None` among the gradients stands for a part of the model, its owner does not matter.
        sizes = [len(trees.flatten(part)[0]) for part in parts]
        offsets = itertools.accumulate([0, *sizes[:-1]])
        self.of_gradients = [self.owners[i] if size else None for i, size in zip(offsets, sizes, strict=bool(sizes))]
        self.gs, self.params, self.extra = gs, params, extra
        # Here, since to its rule a leaf of another group is absent, whatever it is.
        for k, (g, p) in enumerate(zip(gs, [None] * len(gs) if params is None else parts, strict=True)):
            trees.check_gradient(lambda k=k: trees.paths(grads)[k], g, p)

    def grads_of(self, label: Any) -> Any:
        return jax.tree.unflatten(self.treedef, _only(self.gs, self.of_gradients, label))

    def params_of(self, label: Any) -> Any:
        if self.params is None:
            return None
        return jax.tree.unflatten(self.structure, _only(self.leaves, self.owners, label))

    def extra_of(self, label: Any) -> dict[str, Any]:
        """Extra arguments; trees like the gradients or the parameters are cut like them."""
        owners = {self.structure: self.owners, self.treedef: self.of_gradients}

        def cut(value: Any) -> Any:
            leaves, treedef = trees.flatten(value)
            whole = treedef not in owners or treedef == jax.tree.structure(0)
            return value if whole else jax.tree.unflatten(treedef, _only(leaves, owners[treedef], label))

        return {name: cut(value) for name, value in self.extra.items()}


def _only(leaves: Sequence[Any], owners: Sequence[Any], label: Any) -> list[Any]:
    return [x if owner == label else None for x, owner in zip(leaves, owners, strict=True)]


@dataclass(frozen=True, eq=False)
class _Groups(Composed):
    rules: Mapping[str, Rule]
    owners: Owners  # (paths, leaves) -> for each leaf a label, or `None`: it belongs to no rule
    labelled: bool = True  # whether the state is a dict by label, or that of the only rule
    passes: bool = False  # whether the gradient of what belongs to no rule passes through; else it is absent

    @property
    def parts(self) -> Sequence[tuple[tuple[str | int, ...], Rule]]:
        return [((label,) if self.labelled else (), rule) for label, rule in self.rules.items()]

    def seen(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[list[Any]]:
        owners = self.owners(paths, leaves)
        return [_only(leaves, owners, label) for label in self.rules]

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        owners = self.owners(paths, leaves)
        shares = [Share() if self.passes or not is_inexact(p) else FROZEN for p in leaves]
        for name, rule in self.rules.items():
            own = Share(group=name if self.labelled else "")
            for k, share in enumerate(definition_of(rule).shares(paths, _only(leaves, owners, name))):
                shares[k] = own.joined(share) if owners[k] == name else shares[k]
        return shares

    def init(self, params: Any) -> Any:
        leaves, treedef = trees.flatten(params)
        owners = self.owners(trees.paths(params), leaves)
        return self._pack(
            {
                label: rule.init(jax.tree.unflatten(treedef, _only(leaves, owners, label)))
                for label, rule in self.rules.items()
            }
        )

    def _pack(self, states: dict[str, Any]) -> Any:
        return states if self.labelled else next(iter(states.values()))

    def _unpack(self, state: Any) -> dict[str, Any]:
        if not self.labelled:
            return dict.fromkeys(self.rules, state)
        if isinstance(state, Mapping) and state.keys() == self.rules.keys():
            return {label: state[label] for label in self.rules}
        raise TypeError(
            f"partition: update got a state of type {type(state).__name__} where it needs a dict of "
            f"{', '.join(self.rules)}; was it made by the init of another rule?"
        )

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        cut, states = _Cut(self.owners, grads, params, extra), self._unpack(state)
        updates = [g.astype(widened(g.dtype)) if self.passes and is_inexact(g) else None for g in cut.gs]
        for name, rule in self.rules.items():
            own, states[name] = rule.update(
                cut.grads_of(name), states[name], cut.params_of(name), **extra_for(rule, cut.extra_of(name))
            )
            for k, u in enumerate(cut.treedef.flatten_up_to(own)):
                updates[k] = u if cut.of_gradients[k] == name else updates[k]
        return jax.tree.unflatten(cut.treedef, updates), self._pack(states)

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        if self.passes:
            return super().apply(grads, state, params, extra)
        cut, states = _Cut(self.owners, grads, params, extra), self._unpack(state)
        leaves = list(cut.leaves)
        for name, rule in self.rules.items():
            own, states[name] = rule.apply(
                cut.grads_of(name), states[name], cut.params_of(name), **extra_for(rule, cut.extra_of(name))
            )
            for k, p in enumerate(trees.flatten(own)[0]):
                leaves[k] = p if cut.owners[k] == name else leaves[k]
        return jax.tree.unflatten(cut.structure, leaves), self._pack(states)


@constructor
def partition(rules: Mapping[str, Rule], by: By) -> Definition:
    """Another rule for each group of leaves.

        partition(
            {"matrix": sgd(0.02, momentum=0.95), "rest": adamw(3e-4)},
            by={"matrix": "blocks/**/w"},
        )

    Args:
      rules: the rule of each group, by label. To a rule, the leaves of other groups are absent: they have no slots in
        its state and are in no norm of its. The state is the dict of the rules' states by label, and labels stand in
        front of the names of hyperparameters that several groups have (`matrix.learning_rate`).
      by: which leaf is in which group: a selector (pattern, regular expression, list of them, predicate) for each
        label, where one label may be left out and has the rest; or a function (path, array) -> label.

    Memory: that of the rules, each for its own leaves.

    Raises:
      TypeError: something is no rule, or `by` is nothing of that.
      ValueError: some rules give updates and others directions; when it is used on a tree: a leaf belongs to two groups
        or to none, or a pattern or a group matches nothing.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"partition takes a dict of rules by label, not {rules!r}")
    if unnamed := [name for name in rules if not isinstance(name, str)]:
        raise TypeError(f"partition: labels are text, not {unnamed[0]!r}")
    members = {name: as_rule(rule, "partition") for name, rule in rules.items()}
    if not members:
        raise ValueError("partition needs at least one rule")
    check_by(by, "partition", tuple(members))
    known = {name: definition_of(rule) for name, rule in members.items() if definition_of(rule).place is not None}
    giving = [name for name, definition in known.items() if definition.gives_updates]
    if giving and len(giving) < len(known):
        other = next(name for name in known if name not in giving)
        raise ValueError(
            f"partition: the rule of {giving[0]!r} gives updates and that of {other!r} a direction; end that with "
            "step, too: chain(..., step(learning_rate))"
        )
    return _Groups(members, lambda paths, leaves: label(by, paths, leaves, tuple(members)))


@constructor
def masked(rule: Rule, where: Selector) -> Definition:
    """A hook or direction for the leaves that `where` selects; the gradients of the others pass through unchanged.

        chain(masked(clip_by_value(1.0), "embed/**"), adam(3e-4))

    To the rule the others are absent: they have no slots in its state and are in no norm of its. The state is that of
    the rule.

    Memory: that of the rule, for the leaves that are selected.

    Raises:
      TypeError: `rule` is no rule, or `where` no selector.
      ValueError: the rule gives updates; the gradients that pass through would be added to the parameters. To train
        a part of the parameters there is `freeze`, for another rule for the rest `partition`.
    """
    member = as_rule(rule, "masked")
    check_selector(where, "masked")
    if definition_of(member).place in ("end", "behind"):
        raise ValueError(
            f"masked: {member!r} gives updates, and the gradients that pass through would be added to the parameters "
            "as they are; freeze(rule, where) leaves a part untrained, partition({...}, by) gives it another rule"
        )
    return _Groups({"masked": member}, _selected(where, True), labelled=False, passes=True)


@constructor
def freeze(rule: Rule, where: Selector) -> Definition:
    """The leaves that `where` selects are not trained; the rule is for the others.

        freeze(chain(clip_by_global_norm(1.0), adamw(3e-4)), "embed/**")

    To the rule the frozen leaves are absent: their update is `None` and they stay as they are to the bit, whatever
    decays or normalises inside; they have no slots in its state and are in no norm of its. The state is that of the
    rule. Put it around the whole: what stands in front of it in a chain still sees their gradients. For
    `optax.apply_updates` and `nnx.Optimizer`, which take no `None` for an update, there is
    partition({"off": set_to_zero(), "on": rule}, {"off": where}).

    Memory: that of the rule, for the leaves that are trained.

    Raises:
      TypeError: `rule` is no rule, or `where` no selector.
    """
    check_selector(where, "freeze")
    return _Groups({"trained": as_rule(rule, "freeze")}, _selected(where, False), labelled=False)


def _selected(where: Selector, hit: bool) -> Owners:
    """Which leaves belong to the only rule: those that are selected, or those that are not."""
    owner = "masked" if hit else "trained"

    def owners(paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        hits = select(where, paths, leaves)
        return [owner if is_inexact(p) and h == hit else None for p, h in zip(leaves, hits, strict=True)]

    return owners


# ---------------------------------------------------------------------------------------------------------------------
# Around a rule
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Wrapper(Clocked):
    """A rule around a rule. Its state has the state of that in its last field, `inner`."""

    rule: Rule

    @property
    def parts(self) -> Sequence[tuple[tuple[str | int, ...], Rule]]:
        return [((0,), self.rule)]

    @property
    def place(self) -> Place:
        return definition_of(self.rule).place

    @property
    def schedules(self) -> dict[Address, Schedule]:
        inner = definition_of(self.rule).schedules
        return super().schedules | {((0, *place), key): schedule for (place, key), schedule in inner.items()}

    @property
    def defers(self) -> bool:
        return definition_of(self.rule).defers

    @property
    def takes_none(self) -> bool:
        return definition_of(self.rule).takes_none

    @property
    def uses(self) -> frozenset[str]:
        """The extra arguments that it reads itself; all are handed on."""
        return frozenset()

    @property
    def accepts(self) -> frozenset[str] | None:
        inner = definition_of(self.rule).accepts
        return None if inner is None else inner | self.uses

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        return definition_of(self.rule).shares(paths, leaves)


def either(go: Array, act: Callable[[], Any], rest: Callable[[], Any]) -> Any:
    """`act()` or `rest()`. Where nothing is traced, Python decides, and nothing is compiled for the other."""
    if isinstance(go, Tracer):
        return lax.cond(go, act, rest)
    return act() if go else rest()


def giving_updates(rule: Any, owner: str) -> Rule:
    """`rule`, where `owner` is to wrap a whole optimizer.

    Raises:
      TypeError: it is no rule.
      ValueError: it gives gradients or directions.
    """
    member = as_rule(rule, owner)
    if definition_of(member).place not in ("end", None):
        raise ValueError(
            f"{owner} wraps a whole optimizer, from the gradient to the update, and {member!r} is a part of one: what "
            f"stood behind {owner} would act on every call. Put it inside: "
            f"{owner}(chain({member!r}, step(learning_rate)))"
        )
    return member


@dataclass(frozen=True, eq=False)
class _Cautious(Composed):
    rule: Rule

    @property
    def parts(self) -> Sequence[tuple[tuple[str | int, ...], Rule]]:
        return [((), self.rule)]

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        return definition_of(self.rule).shares(paths, leaves)

    def init(self, params: Any) -> Any:
        return self.rule.init(params)

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        handed = extra_for(self.rule, extra)
        directions, _ = self.rule.update(grads, state, params, **handed)
        ds, treedef = trees.flatten(directions)
        gs = trees.align(treedef, grads, "the gradients", "the directions")
        shares = [None if d is None else _share(d, g) for d, g in zip(ds, gs, strict=True)]
        # The directions once more, for the update: kept for it, they would be a copy of all parameters.
        state = after([share for share in shares if share is not None], state)
        directions, state = self.rule.update(*anew((grads, state, params)), **handed)
        ds = treedef.flatten_up_to(directions)
        masked = [None if d is None else _where_agreed(d, g, share) for d, g, share in zip(ds, gs, shares, strict=True)]
        return jax.tree.unflatten(treedef, masked), state


def _agreed(d: jax.Array, g: jax.Array) -> jax.Array:
    return (d * g.astype(d.dtype).conj()).real > 0


@jax.jit
def _share(d: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.mean(_agreed(d, g), dtype=real(d.dtype)) if d.size else jnp.ones((), real(d.dtype))


@jax.jit
def _where_agreed(d: jax.Array, g: jax.Array, share: jax.Array) -> jax.Array:
    return jnp.where(_agreed(d, g), d, 0) / jnp.maximum(share, 1e-3)


@constructor
def cautious(rule: Rule) -> Definition:
    """A direction without those elements that point against the gradient (Liang et al. 2024, arXiv:2411.16085).

        φ = 1[d ⊙ g > 0]          d ← d ⊙ φ / max(mean(φ), 10⁻³)

    The mean is that of each array, so that the step keeps its size. Of complex numbers the real part of d ḡ counts.

        chain(cautious(adam_direction()), step(1e-3, weight_decay=0.1))

    Memory: that of the rule, whose state it has. During the update XLA keeps φ as numbers, 4 bytes per parameter.

    Differs from Algorithm 1 of the paper, which divides by mean(φ) + 1/numel; this is what the authors' code and timm
    do now.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives updates.
    """
    member = as_rule(rule, "cautious")
    if definition_of(member).place in ("end", "behind"):
        raise ValueError(
            f"cautious wraps a direction, and {member!r} gives updates; put it around the direction, in front of step: "
            "chain(cautious(adam_direction()), step(learning_rate))"
        )
    return _Cautious(member)
