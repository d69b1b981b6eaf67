"""Rules as values.

A rule is a pair of pure functions over pytrees: `init(params) -> state` and
`update(grads, state, params=None, **extra) -> (updates, state)`; updates are *added* to the parameters. What stands
behind the pair is a `Definition`; how it was written, a call of its constructor, is its text, equality, hash and
pickle. Both are reached through the functions of the pair, so that a rule never has a third field.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, ParamSpec, cast

import jax
import numpy as np
from jax.core import Tracer

from jaxopt_rules import markup, trees
from jaxopt_rules.hyperparameters import Address
from jaxopt_rules.schedules import Schedule

P = ParamSpec("P")

# What training loops pass to every optimizer, used or not.
COMMON_EXTRA = frozenset({"value", "grad", "value_fn", "loss"})

# Where in a chain a rule stands. "end" is the terminal's: it turns a direction into an update, by sign and learning
# rate. In "front" of it are hooks and directions, "behind" it what works on updates; "anywhere" is for what does not
# mind. `None`: not known, or whatever the others are.
Place = Literal["front", "end", "behind", "anywhere"] | None


def joint_place(places: Iterable[Place]) -> Place:
    """The place of a rule that is made of rules with these places."""
    present = set(places)
    order: list[Place] = ["end", None, "front", "behind", "anywhere"]
    return order[min((order.index(place) for place in present), default=-1)]


class Share(NamedTuple):
    """What a rule does with one leaf, for `explain`."""

    group: str = ""  # labels of `partition`, from the outermost to the innermost, or "frozen"
    decay: tuple[str, ...] = ()  # the weight decays that act on it
    rate: Any = 1.0  # what its updates are multiplied by

    def joined(self, other: "Share") -> "Share":
        group = "/".join(filter(None, (self.group, other.group)))
        return Share(group, self.decay + other.decay, self.rate * other.rate)


class Rule(NamedTuple):
    """An optimizer, or a part of one: a pair of pure functions over pytrees.

    The pair is what Optax calls a gradient transformation, so `init, update = rule`, `optax.chain(rule, ...)` and
    `nnx.Optimizer(model, rule, wrt=...)` work. Rules made by the constructors of this library print as they were
    written, and those made with equal arguments are equal, have equal hashes, and can be pickled.
    """

    init: Callable[[Any], Any]
    """init(params) -> state. Works on arrays, under `jax.jit` and `jax.eval_shape`, and on `ShapeDtypeStruct`s."""

    update: Callable[..., tuple[Any, Any]]
    """update(grads, state, params=None, **extra) -> (updates, state)."""

    def apply(self, grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        """One step, (grads, state, params) -> (params, state): the numbers of `update` and `apply_updates`.

        A rule that may decide to do nothing costs nothing here when it does. Where parameters and state are donated,
        let the compiled function return them in the order in which it takes them (as
        `lambda params, state, grads: rule.apply(grads, state, params)` does): XLA matches donated buffers to
        results by their order, and copies those that it matched wrongly.

        Raises:
          ValueError: the rule gives gradients or directions, which point uphill.
        """
        fused = getattr(self.update, "apply", None)
        if fused is not None:
            return fused(grads, state, params, **extra)
        updates, state = self.update(grads, state, params, **extra)
        return trees.apply_updates(params, updates), state

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rule) and isinstance(self.update, Update) and isinstance(self.init, Init):
            # Both functions were written as one: comparing one of them keeps nested rules from doubling the work.
            return self.update == other.update and type(self.init) is type(other.init)
        return tuple.__eq__(self, other) if isinstance(other, tuple) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.update)

    def __repr__(self) -> str:
        written = getattr(self.update, "written", None)
        return str(written) if written else f"Rule(init={self.init!r}, update={self.update!r})"

    def _repr_html_(self) -> str:
        """The text as written, and below it the rules that it is made of, each with its own hyperparameters."""
        return markup.table(("rule", "place", "hyperparameters"), list(_outline(self)))


class Definition:
    """What a rule does. Subclasses are frozen; `Rule` holds them behind its two functions."""

    @property
    def place(self) -> Place:
        """Where it stands in a chain."""
        return None

    @property
    def gives_updates(self) -> bool:
        """Whether its result can be added to parameters, as far as one knows."""
        return self.place not in ("front", "anywhere")

    @property
    def gate(self) -> bool:
        """Whether it may decide to do nothing. What stands behind such a rule would act all the same."""
        return False

    @property
    def parts(self) -> "Sequence[tuple[tuple[str | int, ...], Rule]]":
        """The rules that it is made of, each with the place of its state in the whole state."""
        return ()

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """Its own, without those of its parts: numbers and schedules."""
        return {}

    @property
    def schedules(self) -> dict[Address, Schedule]:
        """The schedules that own hyperparameters, by where these stand in the state."""
        return {}

    @property
    def remembers(self) -> bool:
        """Whether what it returns depends on earlier updates, through a slot, a schedule or the clock."""
        return True

    @property
    def accepts(self) -> frozenset[str] | None:
        """The extra keyword arguments that it uses; it ignores `COMMON_EXTRA` and refuses all others. `None`: any."""
        return frozenset()

    @property
    def defers(self) -> bool:
        """Whether it may update a parameter in a call in which that has no gradient."""
        return False

    @property
    def takes_none(self) -> bool:
        """Whether `None` may stand among its gradients."""
        return True

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        """What it does with each leaf."""
        return [Share()] * len(leaves)

    def init(self, params: Any) -> Any:
        raise NotImplementedError

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        raise NotImplementedError

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        updates, state = self.update(grads, state, params, extra)
        return trees.apply_updates(params, updates), state


@dataclass(frozen=True, eq=False)
class Written:
    """How a rule was written: a call of its constructor. It carries the rule's text, equality, hash and pickle."""

    constructor: Callable[..., Rule]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def _bound(self) -> inspect.BoundArguments:
        return inspect.signature(self.constructor).bind(*self.args, **self.kwargs)

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        complete = inspect.BoundArguments(self._bound.signature, self._bound.arguments.copy())
        complete.apply_defaults()
        return self.constructor, _hashable(complete.arguments)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Written) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return _call(self.constructor, self.args, self.kwargs)

    @property
    def without_defaults(self) -> str:
        """The text without the arguments that are as they would be if they were not given."""
        parameters, args = self._bound.signature.parameters, list(self.args)
        in_order = list(parameters.values())
        while args and len(args) <= len(in_order) and _is_default(in_order[len(args) - 1], args[-1]):
            args.pop()
        given = {
            name: value
            for name, value in self.kwargs.items()
            if name not in parameters or not _is_default(parameters[name], value)
        }
        return _call(self.constructor, args, given)


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    plain = value is None or isinstance(value, int | float | str)
    return plain and type(value) is type(parameter.default) and value == parameter.default


def _call(function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    shown = [_text(value) for value in args] + [f"{name}={_text(value)}" for name, value in kwargs.items()]
    return f"{function.__name__}({', '.join(shown)})"


def _hashable(value: Any) -> Any:
    """A stand-in for an argument that compares and hashes by value. Traced arrays have none and raise."""
    if isinstance(value, Mapping):
        return tuple((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, Rule):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, Tracer):
        raise TypeError("a rule with a traced hyperparameter cannot be compared or hashed")
    if trees.is_key(value):
        return str(value.dtype), _hashable(_key_data(value))
    if isinstance(value, jax.Array | np.ndarray):
        return value.shape, str(value.dtype), np.asarray(value).tobytes()
    return value


def _frozen(value: Any) -> Any:
    """A list as a tuple, a mapping and a NumPy array as ones of its own: a rule does not change with its arguments."""
    if isinstance(value, Mapping):
        return {name: _frozen(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.copy()
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _key_data(key: Any) -> np.ndarray:
    """The numbers of a PRNG key, also where a program is traced: the key itself is not."""
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(key))


def _text(value: Any) -> str:
    if not isinstance(value, Tracer) and trees.is_key(value):
        return f"wrap_key_data({_key_data(value).tolist()})"
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not isinstance(value, Tracer):
        return str(value.item()) if np.ndim(value) == 0 else repr(value)
    if callable(value) and not isinstance(value, Rule) and hasattr(value, "__name__"):
        return value.__name__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


@dataclass(frozen=True)
class _Function:
    """One of the two functions of a rule. Equal when the rules were written alike."""

    definition: Definition = field(compare=False, repr=False)
    written: Written

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.written.constructor, self.written.args, self.written.kwargs)

    def __repr__(self) -> str:
        return f"{self.written}.{type(self).__name__.lower()}"


class Init(_Function):
    """`rule.init`."""

    def __call__(self, params: Any) -> Any:
        return self.definition.init(params)


class Update(_Function):
    """`rule.update`, which also carries what else is known of the rule."""

    def __call__(self, grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        self._check(extra)
        return self.definition.update(grads, state, params, extra)

    def apply(self, grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        self._check(extra)
        if not self.definition.gives_updates:
            raise ValueError(not_an_update(str(self.written)))
        return self.definition.apply(grads, state, params, extra)

    def _check(self, extra: Mapping[str, Any]) -> None:
        if extra:
            check_extra(self.written, self.definition.accepts, extra)


def not_an_update(rule: str) -> str:
    """What is said to one who would add the result of a hook or a direction to parameters."""
    return (
        f"{rule} gives a direction, not an update; end it with step: chain({rule}, step(learning_rate)). "
        "(A rule of your own that gives updates says so: leafwise(..., place='end').)"
    )


def check_extra(owner: object, accepted: frozenset[str] | None, extra: Mapping[str, Any]) -> None:
    """Refuses extra arguments that nothing uses: they are misspelt.

    Raises:
      TypeError: names them and those that are accepted.
    """
    if accepted is None:
        return
    known = accepted | COMMON_EXTRA
    if unknown := sorted(extra.keys() - known):
        raise TypeError(
            f"{owner} does not take {', '.join(unknown)}; the extra arguments it accepts are {', '.join(sorted(known))}"
        )


def _rebuild(
    part: type[_Function], constructor: Callable[..., Rule], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    rule = constructor(*args, **kwargs)
    return rule.init if part is Init else rule.update


def constructor(make: Callable[P, "Rule | Definition"]) -> Callable[P, Rule]:
    """Decorates a function that makes a rule: its calls are what rules print, compare, hash and pickle as.

    @constructor
    def heavy_ball(learning_rate, momentum=0.9):
        return chain(momentum_direction(momentum), step(learning_rate))

    heavy_ball(0.1) == heavy_ball(learning_rate=0.1, momentum=0.9)
    """

    signature = inspect.signature(make)

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Rule:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(_misfit(make.__name__, signature, kwargs, str(error))) from None
        positional, named = tuple(map(_frozen, args)), {name: _frozen(value) for name, value in kwargs.items()}
        made = cast(Any, make)(*positional, **named)
        definition = made if isinstance(made, Definition) else definition_of(made)
        written = Written(build, positional, named)
        return Rule(Init(definition, written), Update(definition, written))

    return build


# What other libraries call it, and what it is here.
_ELSEWHERE = {
    "lr": "learning_rate",
    "betas": "b1 and b2",
    "mask": "where, which selects leaves by path",
    "weight_decay_mask": "where, which selects leaves by path",
    "eps_root": 'eps with eps_placement="inside"',
    "mu_dtype": "not needed: slots are float32 or wider",
    "accumulator_dtype": "not needed: slots are float32 or wider",
    "state_dtype": "not needed: slots are float32 or wider",
    "eps_in_sqrt": 'eps_placement, "inside" or "outside"',
    "weight_decay_rate": 'weight_decay with decay="fixed"',
    "decoupled_weight_decay": 'decay, "decoupled" or "l2"',
    "maximize": "scale(-1.0) in front, in a chain",
}


def _misfit(name: str, signature: inspect.Signature, kwargs: Mapping[str, Any], error: str) -> str:
    foreign = [key for key in kwargs if key not in signature.parameters and key in _ELSEWHERE]
    hint = "".join(f"; {key} is {_ELSEWHERE[key]}" for key in foreign)
    return f"{name}: {error}{hint}; it takes {', '.join(signature.parameters)}"


_CONSTRUCTOR_CODE = constructor(Definition).__code__


def definition_of(rule: Rule) -> Definition:
    """What stands behind a rule; for a pair of functions from elsewhere, a definition that calls them."""
    if isinstance(rule.update, Update):
        return rule.update.definition
    return _Foreign(rule)


@dataclass(frozen=True)
class _Foreign(Definition):
    pair: Rule

    @property
    def takes_none(self) -> bool:
        return False

    @property
    def accepts(self) -> frozenset[str] | None:
        parameters = list(inspect.signature(self.pair.update).parameters.values())
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        named = [p.name for p in parameters[3:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return frozenset(named + [p.name for p in parameters[:3] if p.kind is p.KEYWORD_ONLY])

    def init(self, params: Any) -> Any:
        return self.pair.init(params)

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        return self.pair.update(grads, state, params, **extra_for(self.pair, extra))


def _outline(rule: Rule, label: str = "", depth: int = 0, given: bool = True) -> Iterator[tuple[str, str, str]]:
    """A row for the rule and for each of those inside it: its text, its place in a chain, its hyperparameters."""
    definition = definition_of(rule)
    text = title(rule, given)
    for _, part in definition.parts if depth else ():
        # It has a row of its own.
        text = text.replace(repr(part), "…", 1)
    shown = [markup.code(f"{name} = ") + value_html(value) for name, value in definition.hyperparameters.items()]
    place = ", ".join(filter(None, (definition.place, "gate" if definition.gate else None)))
    name = f"{markup.faint(f'{label}: ')}" if label else ""
    yield markup.indented(name + markup.code(text), depth), place, "".join(f"<div>{x}</div>" for x in shown)
    for steps, part in definition.parts:
        label = "".join(step for step in steps if isinstance(step, str))
        yield from _outline(part, label, depth + 1, repr(part) in repr(rule))


def title(rule: Rule, given: bool = True) -> str:
    """The text of a rule; of a pair from elsewhere, the names of its functions without their addresses."""
    if isinstance(rule.update, Update):
        # One that was not given, but made inside of the other's constructor, has most often been handed all arguments.
        return repr(rule) if given else rule.update.written.without_defaults
    names = [getattr(function, "__qualname__", None) or type(function).__name__ for function in rule]
    return f"({', '.join(names)})"


def value_html(value: Any) -> str:
    """An argument of a rule: as it shows itself, such as a schedule by its course, or by its text."""
    show = getattr(value, "_repr_html_", None)
    return markup.code(_text(value)) if show is None else show()


def is_pair(x: Any) -> bool:
    """Whether `x` is a rule, or has `init` and `update` as one has."""
    return callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


def is_constructor(x: Any) -> bool:
    """Whether `x` makes rules, and was not called."""
    return getattr(x, "__code__", None) is _CONSTRUCTOR_CODE


def as_rule(x: Any, owner: str) -> Rule:
    """`x` as a rule, if it is one or any other pair with the attributes `init` and `update`.

    Raises:
      TypeError: it is not; the message names `owner`, which wanted a rule.
    """
    if isinstance(x, Rule):
        return x
    if is_pair(x):
        return Rule(x.init, x.update)
    hint = ""
    if callable(x):
        hint = f"; was it meant to be called, as in {getattr(x, '__name__', 'constructor')}(...)?"
    raise TypeError(f"{owner} takes rules, pairs of functions (init, update), not {x!r}{hint}")


def extra_for(rule: Rule, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the extra arguments that a member of a chain or a wrapper can be handed."""
    accepted = definition_of(rule).accepts
    if accepted is None:
        return extra
    common = COMMON_EXTRA if isinstance(rule.update, Update) else frozenset()
    return {name: value for name, value in extra.items() if name in accepted | common}
