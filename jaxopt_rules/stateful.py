"""The documented mutating API: parameters that hold their gradient, and optimizers that update a model in place.

    opt = Adam(alpha=0.001, hook=[weight_decay(1e-4), clip_grad(1.0)])
    for x, t in batches:
        cleargrads(model)
        loss = backward(loss_fn, model, x, t)
        opt.update(model)

Everything here is a thin shell around rules: an optimizer holds one rule, one state over `{name: array}`, and calls one
compiled function per update.
"""

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import DictKey, tree_flatten_with_path

from jaxopt_rules import markup, trees, variables
from jaxopt_rules.averages import eval_params
from jaxopt_rules.compose import chain
from jaxopt_rules.families import families
from jaxopt_rules.hyperparameters import Address, Scheduled, check, decimal, encode, scheduled
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.parameters import Model, Parameter, holding, is_model, named_parameters
from jaxopt_rules.rule import (
    Rule,
    as_rule,
    check_extra,
    definition_of,
    extra_for,
    is_constructor,
    is_pair,
    not_an_update,
    title,
    value_html,
)
from jaxopt_rules.rules.adam import adam, adamw
from jaxopt_rules.rules.sgd import momentum as momentum_rule
from jaxopt_rules.rules.sgd import sgd
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.state import (
    hyperparameter_entries,
    hyperparams,
    leaf_names,
    load_state_dict,
    metrics,
    replace_hyperparameters,
    state_dict,
)
from jaxopt_rules.tables import size_text
from jaxopt_rules.trees import Structure
from jaxopt_rules.variables import LossOfModule, is_module

Hook = Rule | Callable[[list[Parameter]], Any]


def params(model: Model, hook: Iterable[Hook] = ()) -> list[Parameter]:
    """The parameters that have a gradient, after the hooks have run on them in order.

    What hooks do to the gradients stays in `.grad`. They run when the list is empty, too.

    Raises:
      TypeError: a hook is a rule that remembers something between updates; such a hook belongs to an `Optimizer`.
    """
    hooks = _hooks(hook)
    for rule in hooks:
        if isinstance(rule, Rule) and definition_of(rule).remembers:
            raise TypeError(f"{rule!r} needs a state; give it to an Optimizer: Optimizer(rule, hook=[...])")
    named = named_parameters(model)
    listed = [parameter for parameter in named if parameter.grad is not None]
    with _restored_on_error(named):
        for run in hooks:
            if isinstance(run, Rule):
                keys = [named.get(p, f"parameter#{i}") for i, p in enumerate(listed)]
                values = dict(zip(keys, [p.data for p in listed], strict=True))
                grads = dict(zip(keys, [p.grad for p in listed], strict=True))
                grads, _ = run.update(grads, run.init(values), values)
                _write_grads(listed, [grads[key] for key in keys])
            else:
                run(listed)
    return listed


def _hooks(hook: Iterable[Hook]) -> tuple[Hook, ...]:
    members: Iterable[Any] = hook if isinstance(hook, Iterable) and not is_pair(hook) else [hook]
    return tuple(as_rule(h, "hook") if is_pair(h) or is_constructor(h) or not callable(h) else h for h in members)


def _write_grads(listed: Sequence[Parameter], grads: Sequence[Array | None]) -> None:
    for parameter, grad in zip(listed, grads, strict=True):
        if grad is not None and parameter.grad is not None:
            parameter.grad = grad.astype(parameter.grad.dtype)


class _restored_on_error:
    """Puts parameters back as they were when what runs inside raises."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.saved = [(p, p.data, p.grad) for p in parameters]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for parameter, data, grad in self.saved:
                parameter.data, parameter.grad = data, grad


@dataclass(frozen=True)
class _Settings:
    """All that is fixed while an optimizer's update is compiled."""

    rule: Rule
    hooks: tuple[Rule, ...]  # those that run in the same call, after the hooks that are Python functions
    first: int  # the position of the first of them among all hooks
    schedules: tuple[tuple[str, Schedule], ...]  # schedules assigned to fields of the optimizer
    treedef: Structure  # of the state
    known: tuple[Any, ...]  # the keys that the state is over
    present: tuple[Any, ...]  # the keys of those that have a gradient, in the order of the arguments
    functions: tuple[tuple[str, Callable[..., Any]], ...]  # extra arguments that are functions


def _step(
    settings: _Settings,
    leaves: list[Array],
    datas: list[Array],
    grads: list[Array],
    rest: list[Any],
    extra: dict[str, Any],
) -> tuple[list[Array], list[Array], list[Array] | None]:
    state = jax.tree.unflatten(settings.treedef, leaves)
    absent: dict[str, Any] = dict.fromkeys(settings.known)
    values = absent | dict(zip(settings.present, datas, strict=True))
    gradients = absent | dict(zip(settings.present, grads, strict=True))
    extra = extra | {
        name: functools.partial(f.at, rest) if isinstance(f, _LOSSES) else f for name, f in settings.functions
    }
    entries = hyperparameter_entries(state["rule"])
    new_values = {
        entries[name].address: scheduled(entries[name].key, schedule, entries[name].family.state.count)
        for name, schedule in settings.schedules
    }
    rule_state = replace_hyperparameters(state["rule"], new_values)
    hook_states = list(state["hook"])
    for i, hook in enumerate(settings.hooks, settings.first):
        gradients, hook_states[i] = hook.update(gradients, hook_states[i], values, **extra_for(hook, extra))
    values, rule_state = settings.rule.apply(gradients, rule_state, values, **extra_for(settings.rule, extra))
    hooked = None
    if settings.hooks:
        hooked = [
            g if gradients[key] is None else gradients[key].astype(g.dtype)
            for key, g in zip(settings.present, grads, strict=True)
        ]
    new, treedef = jax.tree.flatten({"hook": tuple(hook_states), "rule": rule_state})
    if treedef != settings.treedef:
        raise TypeError(f"{settings.rule!r} returned a state of another structure than it was given")
    return new, [values[key] for key in settings.present], hooked


def _new_program(settings: _Settings, donate: bool) -> Callable[..., Any]:
    def optimizer_update(*arguments: Any) -> tuple[list[Array], list[Array], list[Array] | None]:
        return _step(settings, *arguments)

    # State leaves come first among arguments and results alike, so that XLA reuses each donated buffer in its place.
    return jax.jit(optimizer_update, donate_argnums=(0, 1) if donate else 0)


# Equal settings have one program, whichever optimizers they are of. Functions may hold on to data, and are not in it.
_shared_program = functools.lru_cache(maxsize=4096)(_new_program)

# How many functions of the model an optimizer keeps compiled. They may be new ones in every update.
MOST_LOSSES = 8


@dataclass(frozen=True)
class _LossOfTree:
    """A function of a pytree as one of the arrays that a rule sees, by their keys."""

    function: Callable[[Any], Any]
    structure: Structure
    keys: tuple[Any, ...]
    fixed: tuple[Any, ...]  # leaves that are no arrays, and `_ARRAY` in the place of the others

    def at(self, rest: Sequence[Any], params: Mapping[Any, Any]) -> Any:
        """Its value at these parameters. What is absent among them is that of `rest`."""
        arrays = iter(rest)
        leaves = [next(arrays) if x is _ARRAY else x for x in self.fixed]
        leaves = [x if params.get(key) is None else params[key] for key, x in zip(self.keys, leaves, strict=True)]
        return self.function(jax.tree.unflatten(self.structure, leaves))


_ARRAY = object()


@dataclass(frozen=True)
class _LossOfParameters:
    """A function of a model as one of its parameters' data, by their keys."""

    function: Callable[[Any], Any]
    model: weakref.ref[Any] = field(compare=False)
    parameters: tuple[weakref.ref[Parameter], ...]
    keys: tuple[Any, ...]

    def at(self, rest: Sequence[Any], params: Mapping[Any, Any]) -> Any:
        """Its value at these parameters. What is absent among them is that of `rest`."""
        model, parameters = self.model(), [cast(Parameter, ref()) for ref in self.parameters]
        datas = [x if params.get(key) is None else params[key] for key, x in zip(self.keys, rest, strict=True)]
        with holding(model, parameters, datas):
            return self.function(model)


_LOSSES = LossOfModule | _LossOfTree | _LossOfParameters


class _Running:
    """What an update leaves to its end."""

    __slots__ = ("finish", "pending")

    def __init__(self) -> None:
        self.finish: Callable[[], bool] = lambda: False  # writes what the compiled step gave, if it has been
        self.pending: dict[str, Any] = {}  # what hooks assign to fields


@dataclass(frozen=True, order=True)
class _Key:
    """What a parameter's slots are filed under: its name when first seen, made unique where two models use one name.

    Patterns and error messages see the name alone.
    """

    name: str
    number: int = 1

    def __str__(self) -> str:
        return self.name


class _OfVariable(Parameter):
    """A variable of a Flax NNX module as a Parameter. Those of one variable are equal."""

    __slots__ = ("variable",)

    def __init__(self, variable: Any) -> None:
        self.variable, self.grad = variable, None

    def __eq__(self, other: object) -> bool:
        return type(other) is _OfVariable and other.variable is self.variable

    def __hash__(self) -> int:
        return id(self.variable)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OfVariable, (self.variable,)

    @property
    def data(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return variables.value(self.variable)

    @data.setter
    def data(self, new: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        variables.write([self.variable], [new])


def _holds_parameters(model: Any) -> bool:
    """Whether a model is updated in place."""
    return is_model(model) or is_module(model)


class Optimizer:
    """Updates models in place with a rule.

        opt = Optimizer(chain(clip_by_global_norm(1.0), adamw(3e-4)))
        opt.update(model)                 # a model with params(): uses and keeps Parameter.grad
        opt.update(module, grads)         # a Flax NNX module: in place
        tree = opt.update(tree, grads)    # any other pytree: returns the new one

    The hyperparameters of the rule are attributes (`opt.learning_rate = 1e-4`). An assigned number, or schedule,
    takes effect at the next update; a number does not compile anything anew.

    State belongs to the Parameter object and begins when it first has a gradient. There is one counter, which every
    update advances; one optimizer may serve several models. The state's buffers are donated in every update. Those of
    the parameters are with `donate=True`, which saves the memory of a second copy and makes arrays that you still
    hold unusable.

    Args:
      rule: the optimizer, as a pair of pure functions.
      hook: what runs on the gradients first, in order: rules, and functions of the list of those Parameters that have
        a gradient. What hooks do stays in `.grad`.
      donate: whether parameters are updated in their own memory.
    """

    _aliases: ClassVar[Mapping[str, str]] = {}  # documented field -> hyperparameter

    def __init__(self, rule: Rule, hook: Iterable[Hook] = (), donate: bool = False) -> None:
        self._rule = as_rule(rule, type(self).__name__)
        if not definition_of(self._rule).gives_updates:
            raise ValueError(not_an_update(repr(rule)))
        self._set_hooks(hook)
        self._donate = donate
        self._keys: dict[Parameter | str, Any] = {}  # what is known (in a pytree: its path) -> its key in the state
        self._born: frozenset[Parameter | str] = frozenset()  # those of them that have slots
        self._structure: Structure | None = None  # of the model, where it is a pytree
        self._schedules: dict[str, Schedule] = {}  # assigned to fields
        self._overruled: set[Address] = set()  # hyperparameters for which the rule has a schedule, and a field another
        self._running: _Running | None = None
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        try:
            self._set_state(self._init({}))
        except Exception as error:
            error.add_note(
                f"{type(self).__name__} begins without parameters, with rule.init({{}}), which {self._rule!r} does not "
                "take; use its functions, or jaxopt_rules.interop.nnx.Optimizer"
            )
            raise

    def _set_hooks(self, hook: Iterable[Hook]) -> None:
        hooks = _hooks(hook)
        whole = chain(*(h for h in hooks if isinstance(h, Rule)), self._rule)
        self._hook, self._accepts = hooks, definition_of(whole).accepts
        self._defers = definition_of(self._rule).defers
        # Where the rules begin that run in the compiled call: behind the last Python function.
        self._first = 1 + max((i for i, h in enumerate(hooks) if not isinstance(h, Rule)), default=-1)

    # The state is kept as a list of leaves: the form in which a compiled call takes it fastest.

    def _init(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        hooks = tuple(h.init(values) if isinstance(h, Rule) else () for h in self._hook)
        rule = self._rule.init(values)
        scheduled = {entry.address: entry.value for entry in hyperparameter_entries(rule).values()}
        plain = {address: scheduled[address].value for address in self._overruled}
        state = {"hook": hooks, "rule": replace_hyperparameters(rule, plain)}
        # Rules of this library share nothing; those of others may hold the parameters themselves.
        return trees.unshared(state, values)

    @property
    def _state(self) -> dict[str, Any]:
        return jax.tree.unflatten(self._treedef, self._leaves)

    def _set_state(self, state: Any) -> None:
        self._leaves, self._treedef = jax.tree.flatten(state)
        self._programs.clear()
        # Where in the list the value of each field is, and how it is stored.
        positions = jax.tree.unflatten(self._treedef, range(len(self._leaves)))
        self._fields = hyperparameter_entries(positions["rule"])

    def _enlarge(self, known: Mapping[Parameter | str, Any], arrays: Mapping[Parameter | str, Any]) -> None:
        """Gives slots to those that have arrays. All that the state holds already is carried over.

        The others of the model are known from now on, too, so that patterns that are for them find them.
        """
        self._keys |= known
        self._born |= arrays.keys()
        self._set_state(_carried_over(self._state, self._init(self._values(arrays))))

    def _values(self, arrays: Mapping[Any, Any]) -> dict[Any, Any]:
        """For each key the array that its slots are like; `None` where it has none yet."""

        def array(x: Parameter | str) -> Any:
            return arrays[x] if x in arrays else x.data if isinstance(x, Parameter) else None

        return {key: array(x) if x in self._born else None for x, key in self._keys.items()}

    # Fields

    def _field(self, name: str) -> str | None:
        """The hyperparameter that an attribute stands for."""
        name = self._aliases.get(name, name)
        return name if name in self._fields else None

    def _field_names(self) -> list[str]:
        documented = {hyperparameter: field for field, hyperparameter in self._aliases.items()}
        return [documented.get(name, name) for name in self._fields]

    def __getattr__(self, name: str) -> Any:
        field = None if name.startswith("_") else self._field(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if self._running is not None and field in self._running.pending:
            return self._running.pending[field]
        if field in self._schedules:
            return self._schedules[field]
        entry = self._fields[field]
        if isinstance(entry.value, Scheduled):
            return definition_of(self._rule).schedules[entry.address]
        return decimal(entry.key, self._leaves[entry.value])

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        field = self._field(name)
        if field is None:
            raise AttributeError(
                f"{type(self).__name__} has no field {name!r}; its fields are {', '.join(self._field_names())}, hook"
            )
        entry = self._fields[field]
        check(entry.key, value)
        if callable(value):
            scheduled(entry.key, cast(Schedule, value), self._count_of(field))
        if self._running is not None:
            self._running.pending[field] = value
        else:
            self._assign(field, value)

    def _count_of(self, field: str) -> Array:
        return hyperparameter_entries(self._state["rule"])[field].family.state.count

    def _assign(self, field: str, value: Any) -> None:
        entry = self._fields[field]
        if callable(value):
            self._schedules[field] = cast(Schedule, value)
            value = self._schedules[field](self._count_of(field))
            self._programs.clear()
        elif self._schedules.pop(field, None) is not None:
            self._programs.clear()
        if isinstance(entry.value, Scheduled):
            self._overruled.add(entry.address)
            state = self._state
            old = self._leaves[entry.value.value]
            state["rule"] = replace_hyperparameters(state["rule"], {entry.address: old})
            self._set_state(state)
            entry = self._fields[field]
        old = self._leaves[entry.value]
        self._leaves[entry.value] = trees.placed_like(jnp.array(encode(entry.key, value), old.dtype), old)

    @property
    def hook(self) -> tuple[Hook, ...]:
        """The hooks. Assigning others begins their states anew."""
        return self._hook

    @hook.setter
    def hook(self, hook: Iterable[Hook]) -> None:
        if self._structure is not None:
            raise ValueError("hooks can be assigned before the first update of a pytree model, not after it")
        self._set_hooks(hook)
        self._set_state(self._init(self._values({})) | {"rule": self._state["rule"]})

    @property
    def hyperparams(self) -> dict[str, float]:
        """The hyperparameters of the rule and of the hooks, as numbers. See `jaxopt_rules.hyperparams`.

        Those of the rule are fields, `opt.learning_rate = 1e-4`; those of groups have a dot in their name:
        `setattr(opt, "matrix.learning_rate", 1e-4)`.
        """
        return {name.removeprefix("rule."): _shortest(value) for name, value in hyperparams(self._state).items()}

    @property
    def metrics(self) -> dict[str, float]:
        """What the last update recorded, as numbers. See `jaxopt_rules.metrics`."""
        return {name.removeprefix("rule."): _shortest(value) for name, value in metrics(self._state).items()}

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._field_names())
        shown = fields if self._aliases or type(self) is not Optimizer else repr(self._rule)
        hook = f", hook={list(self._hook)!r}" if self._hook else ""
        return f"{type(self).__name__}({shown}{hook})"

    def _repr_html_(self) -> str:
        """The rule, and what it is at now: hyperparameters, the number of updates, and the size of the state."""
        rows = [["rule", markup.code(title(self._rule))]]
        rows += [["hook", markup.code(repr(list(self._hook)))]] if self._hook else []
        for name in self._field_names():
            shown, entry = getattr(self, name), self._fields[cast(str, self._field(name))]
            position = entry.value.value if isinstance(entry.value, Scheduled) else entry.value
            now = markup.faint(f", now {decimal(entry.key, self._leaves[position])!r}") if callable(shown) else ""
            rows.append([escape(name), value_html(shown) + now])
        counts = [int(family.state.count) for family in families(self._state["rule"])]
        rows += [["updates", str(max(counts))]] if counts else []
        rows.append(["state", size_text(sum(leaf.nbytes for leaf in self._leaves))])
        return markup.table((type(self).__name__, ""), rows)

    def __copy__(self) -> "Optimizer":
        """An optimizer in the same state, which goes on by itself."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._leaves = [trees.placed_like(jnp.array(leaf), leaf) for leaf in self._leaves]
        other._keys, other._schedules, other._overruled = dict(self._keys), dict(self._schedules), set(self._overruled)
        other._programs, other._running = {}, None
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_programs": {}, "_running": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optimizer":
        """A copy for the copy of the model that is made by the same `copy.deepcopy`.

        Raises:
          TypeError: it is for an NNX module, whose variables are new ones in a copy that nothing connects with the old.
        """
        if any(isinstance(parameter, _OfVariable) for parameter in self._keys):
            raise TypeError(
                "the copy of an NNX module has other variables, which this optimizer could not tell; copy it by "
                "state_dict(model) and load_state_dict(copy, saved), or use jaxopt_rules.interop.nnx.Optimizer"
            )
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._field_names()]

    # Updates

    def update(self, model: Any, grads: Any = None, **extra: Any) -> Any:
        """One step: runs the hooks, advances the counter, and updates what has a gradient.

        Args:
          model: with `params()`: its parameters are updated in place from their `.grad`; gradients are not cleared.
            With `grads`: a Flax NNX module, which is updated in place, too, or any other pytree of arrays.
          grads: a tree like the model, or what `nnx.grad` gives. `None` in it, as in `.grad`, means that the parameter
            takes no part.
          **extra: extra arguments of the rule, such as `value`. `value_fn` is a function of the model. It is compiled
            into the update: pass the same function every time.

        Returns:
          The model: the same object where it was mutated, and the new one where `grads` were given.

        Raises:
          ValueError: a gradient has another shape than its parameter, or a pytree has another structure than before,
            or an NNX module has no variable at the path of a gradient.
          TypeError: the model is neither; it is called on traced arrays; an extra argument is unknown.
          When it raises, nothing has changed. An interrupt that comes too late to undo the step completes it.
        """
        leaves, treedef, born, keys = self._leaves, self._treedef, self._born, len(self._keys)
        running = _Running()
        try:
            self._running = running
            if is_module(grads) and not is_module(model):
                raise TypeError("update takes the model first, and then the gradients: update(model, grads)")
            if is_module(model) and grads is not None:
                new = self._update_module(model, grads, extra)
            elif grads is None:
                new = self._update_parameters(model, named_parameters(model), extra)
            else:
                new = self._update_tree(model, grads, extra)
        except BaseException:
            # An interrupt behind the compiled step finds the old state donated: the step is completed.
            if running.finish():
                raise
            for key in list(self._keys)[keys:]:
                del self._keys[key]
            self._born = born
            if self._leaves is not leaves:
                self._set_state(jax.tree.unflatten(treedef, leaves))
            raise
        finally:
            self._running = None
        for name, value in running.pending.items():
            self._assign(name, value)
        return new

    def _update_module(self, model: Any, grads: Any, extra: Mapping[str, Any]) -> Any:
        parts, gs = variables.gradients(grads)
        given = dict(zip(map(variables.path, parts), gs, strict=True))
        named = self._parameters(model, given)
        by_path = {path: parameter for parameter, path in named.items()}
        if unknown := [name for name in given if name not in by_path]:
            shown = ", ".join(map(trees.quoted, unknown[:3]))
            raise ValueError(f"the module has no variable at {shown}, where the gradients have one")
        try:
            for name, g in given.items():
                by_path[name].grad = g
            return self._update_parameters(model, named, extra)
        finally:
            for parameter in named:
                parameter.grad = None

    def _parameters(self, model: Any, given: Container[str] = ()) -> Mapping[Parameter, str]:
        """What a model holds that can be updated in place, and its names.

        Of a module it is what NNX calls parameters, what has state, and what is `given`: all else may be another
        variable the next time, such as an activation.
        """
        if not is_module(model):
            return named_parameters(model)
        found = ((_OfVariable(x), name) for name, x in variables.listing(model).by_path.items())
        return {p: name for p, name in found if variables.is_parameter(p.variable) or name in given or p in self._keys}

    def _update_parameters(self, model: Any, named: Mapping[Parameter, str], extra: Mapping[str, Any]) -> Any:
        self._check_kind(Parameter)
        listed = [parameter for parameter in named if parameter.grad is not None]
        if self._first:
            with _restored_on_error(named):
                self._run_hooks(listed, named, extra)
                self._run([p for p in listed if p.grad is not None], model, named, extra)
        else:
            self._run(listed, model, named, extra)
        return model

    def _check_kind(self, kind: type) -> None:
        known = next(iter(self._keys), None)
        if known is not None and not isinstance(known, kind):
            had, has = ("a pytree", "Parameters") if kind is Parameter else ("Parameters", "a pytree")
            raise ValueError(f"this optimizer has the state of {had}; it cannot have that of {has}, too")

    def _run_hooks(self, listed: list[Parameter], named: Mapping[Parameter, str], extra: Mapping[str, Any]) -> None:
        """The hooks up to the last Python function among them, one at a time."""
        for i, hook in enumerate(self._hook[: self._first]):
            if not isinstance(hook, Rule):
                hook(listed)
                continue
            self._welcome(listed, named)
            state = self._state
            absent = dict.fromkeys(self._keys.values())
            keys = [self._keys[p] for p in listed]
            values = absent | dict(zip(keys, [p.data for p in listed], strict=True))
            grads = absent | dict(zip(keys, [p.grad for p in listed], strict=True))
            grads, new = hook.update(grads, state["hook"][i], values, **extra_for(hook, extra))
            state["hook"] = (*state["hook"][:i], new, *state["hook"][i + 1 :])
            self._leaves = jax.tree.leaves(state)
            _write_grads(listed, [grads[key] for key in keys])

    def _welcome(self, listed: Iterable[Parameter], named: Mapping[Parameter, str]) -> None:
        """Makes sure that all of these have a key and their slots."""
        if self._born.issuperset(listed):
            return
        newborn = set(listed) - self._born
        taken = set(self._keys.values())
        known: dict[Parameter | str, _Key] = {}
        for parameter in (*named, *listed):
            if parameter not in self._keys and parameter not in known:
                known[parameter] = _unused(named.get(parameter, "parameter"), taken)
                taken.add(known[parameter])
        self._enlarge(known, {parameter: parameter.data for parameter in newborn})

    def _run(
        self, listed: list[Parameter], model: Any, named: Mapping[Parameter, str], extra: Mapping[str, Any]
    ) -> None:
        self._welcome(listed, named)
        if self._defers:
            # These may be updated now, by gradients that they had before.
            listed = [*listed, *(p for p in named if p.grad is None and p in self._born)]

        def write(new: list[Array], hooked: list[Array] | None) -> None:
            for parameter, data in zip(listed, new, strict=True):
                parameter.data = data
            if hooked is not None:
                for parameter, grad in zip(listed, hooked, strict=True):
                    parameter.grad = grad

        def loss(function: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
            if is_module(model):
                return variables.loss_of_module(function, model, {name: self._keys.get(p) for p, name in named.items()})
            parameters, keys = tuple(map(weakref.ref, named)), tuple(map(self._keys.get, named))
            return _LossOfParameters(function, weakref.ref(model), parameters, keys), [p.data for p in named]

        self._call(tuple(listed), [p.data for p in listed], [p.grad for p in listed], extra, loss, write)

    def _update_tree(self, model: Any, grads: Any, extra: Mapping[str, Any]) -> Any:
        if not all(isinstance(hook, Rule) for hook in self._hook):
            raise TypeError("hooks that are Python functions see Parameters; on a pytree, every hook must be a rule")
        leaves, structure = trees.flatten(model)
        self._check_kind(str)
        if self._structure is not None and structure != self._structure:
            trees.align(self._structure, model, "the model", "the one that this optimizer updated before")
            raise ValueError("the model differs in its static fields from the one that this optimizer updated before")
        gs, treedef = trees.flatten(grads)
        parts = trees.align(treedef, model, "the model")
        paths = trees.paths(grads)
        for k, (g, part) in enumerate(zip(gs, parts, strict=True)):
            trees.check_gradient(lambda k=k: paths[k], g, part)
        present = [k for k, g in enumerate(gs) if is_inexact(g) and is_inexact(parts[k])]
        if not self._born.issuperset(paths[k] for k in present):
            trees.check_distinct(trees.paths(model), "the model")
            everyone = dict(zip(trees.paths(model), leaves, strict=True))
            newborn = self._born | {paths[k] for k in present}
            known: dict[Parameter | str, Any] = {path: _Key(path) for path in everyone if path not in self._keys}
            self._enlarge(known, {path: x for path, x in everyone.items() if path in newborn})
        if self._defers:
            # These may be updated now, by gradients that they had before.
            present += [k for k, g in enumerate(gs) if g is None and paths[k] in self._born]

        def write(new: list[Array], hooked: list[Array] | None) -> None:
            self._structure = structure
            for k, value in zip(present, new, strict=True):
                parts[k] = value

        def loss(function: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
            fixed = tuple(_ARRAY if hasattr(x, "dtype") else x for x in leaves)
            keys = tuple(self._keys.get(name) for name in trees.paths(model))
            rest = [x for x in leaves if hasattr(x, "dtype")]
            return _LossOfTree(function, structure, keys, fixed), rest

        those = tuple(paths[k] for k in present)
        self._call(those, [parts[k] for k in present], [gs[k] for k in present], extra, loss, write)
        return jax.tree.unflatten(treedef, parts)

    def _call(
        self,
        those: tuple[Parameter | str, ...],
        datas: list[Any],
        grads: list[Any],
        extra: Mapping[str, Any],
        loss: Callable[[Callable[[Any], Any]], tuple[Any, list[Any]]],
        write: Callable[[list[Array], list[Array] | None], None],
    ) -> None:
        """The compiled part of an update, and `write` for the new parameters and the hooked gradients.

        `loss` makes of a function of the model one of what the rule sees, and says what else in the model it reads.
        """
        if self._donate and len({*map(id, datas), *map(id, grads)}) < 2 * len(those):
            self._refuse_shared(those, datas, grads)
        functions: tuple[tuple[str, Any], ...] = ()
        rest: list[Any] = []
        if extra:
            check_extra(repr(self), self._accepts, extra)
            # What every rule ignores must not count: a new `value_fn` each time would compile each time.
            extra = {k: value for k, value in extra.items() if self._accepts is None or k in self._accepts}
            if "value_fn" in extra:
                extra["value_fn"], rest = loss(extra["value_fn"])
            functions = tuple((name, value) for name, value in extra.items() if _is_function(value))
            extra = {name: value for name, value in extra.items() if not _is_function(value)}
        program = self._programs.get((those, functions))
        if program is None:
            program = self._programs[those, functions] = self._program(those, functions)
        results: list[Any] = []

        def finish() -> bool:
            if not results:
                return False
            self._leaves, new, hooked = results[0]
            write(new, hooked)
            return True

        cast(_Running, self._running).finish = finish
        # No interrupt can fall between this call and its results being in the list: both happen outside of Python.
        results.extend(itertools.starmap(program, [(self._leaves, datas, grads, rest, extra)]))
        state, new, _ = results[0]
        if any(isinstance(x, Tracer) for x in (*state[:1], *new[:1])):
            results.clear()
            raise TypeError(
                f"{type(self).__name__}.update changes objects, which jax.jit cannot trace; "
                "inside a compiled function, use the rule: params, state = rule.apply(grads, state, params), "
                "or, for a Flax NNX module, jaxopt_rules.interop.nnx.Optimizer"
            )
        finish()

    def _program(
        self, those: tuple[Parameter | str, ...], functions: tuple[tuple[str, Any], ...]
    ) -> Callable[..., Any]:
        """The compiled step for parameters that have gradients, and for functions among the extra arguments."""
        settings = _Settings(
            rule=self._rule,
            hooks=tuple(hook for hook in self._hook[self._first :] if isinstance(hook, Rule)),
            first=self._first,
            schedules=tuple(self._schedules.items()),
            treedef=self._treedef,
            known=tuple(self._keys.values()),
            present=tuple(self._keys[x] for x in those),
            functions=functions,
        )
        if not functions:
            return _shared_program(settings, self._donate)
        others = [key for key in self._programs if key[1]]
        for key in others[: len(others) - MOST_LOSSES + 1]:
            del self._programs[key]
        return _new_program(settings, self._donate)

    def _refuse_shared(self, those: Sequence[Parameter | str], datas: Sequence[Any], grads: Sequence[Any]) -> None:
        seen: dict[int, str] = {}
        keys = [self._keys[x] for x in those]
        what = [f"the data of '{key}'" for key in keys] + [f"the gradient of '{key}'" for key in keys]
        for name, array in zip(what, (*datas, *grads), strict=True):
            if array is not None and id(array) in seen:
                raise ValueError(
                    f"{seen[id(array)]} and {name} are one array, which cannot be donated twice; copy it, "
                    "jnp.array(x), or use donate=False"
                )
            seen[id(array)] = name

    # Averages

    @contextlib.contextmanager
    def evaluating(self, model: Model) -> Iterator[Model]:
        """Within it, the model has the parameters to evaluate with; behind it, those that are trained.

            with opt.evaluating(model):
                loss = evaluate(model)

        They differ where the rule keeps an average (`average`, `lookahead`). What is assigned inside to `.data` is
        lost.
        """
        known = {self._keys[p]: p for p in self._parameters(model) if p in self._keys}
        values = dict.fromkeys(self._keys.values()) | {key: p.data for key, p in known.items()}
        averaged = eval_params(self._state["rule"], values)
        try:
            for key, parameter in known.items():
                parameter.data = cast(Array, averaged[key])
            yield model
        finally:
            for key, parameter in known.items():
                parameter.data = cast(Array, values[key])

    def eval_params(self, model: Any) -> Any:
        """Of a pytree, the parameters to evaluate with. See `jaxopt_rules.eval_params`."""
        leaves, treedef = trees.flatten(model)
        paths = trees.paths(model)
        values = dict(zip(paths, leaves, strict=True))
        if not self._keys.keys() <= values.keys():
            raise ValueError(
                "eval_params takes the pytree that this optimizer updates; with a model of Parameters, "
                "`with opt.evaluating(model):` gives it the parameters to evaluate with"
            )
        averaged = eval_params(self._state["rule"], {key: values[cast(str, path)] for path, key in self._keys.items()})
        values |= {str(key): x for key, x in averaged.items()}
        return jax.tree.unflatten(treedef, [values[path] for path in paths])

    # Saving

    def _named(self, model: Any) -> dict[str, Parameter | str]:
        """What can have state in this model, by its name there."""
        if _holds_parameters(model):
            return {name: parameter for parameter, name in self._parameters(model).items()}
        return {path: path for path in trees.paths(model)}

    def state_dict(self, model: Any) -> dict[str, np.ndarray]:
        """The state of what this model holds, as a flat dict of NumPy arrays, to be saved.

        Its names are made of the parameters' names in this model: `rule.adam.m.linear[0].w`.
        """
        names = {self._keys[x]: name for name, x in self._named(model).items() if x in self._keys}
        state = _rekeyed(self._state, frozenset(self._keys.values()), names)
        return state_dict(state)

    def load_state_dict(self, model: Any, saved: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave for this model or one like it: slots, counters and hyperparameters.

        A parameter without state in `saved` has none afterwards. The state of other models' parameters stays.

        Raises:
          ValueError: names are missing or unexpected, or a shape differs; then nothing has changed.
        """
        named = self._named(model)
        self._check_kind(Parameter if _holds_parameters(model) else str)
        arrays = named if _holds_parameters(model) else dict(zip(named, trees.flatten(model)[0], strict=True))
        values = {name: x.data if isinstance(x, Parameter) else x for name, x in arrays.items()}
        complete = self._init({_Key(name): x for name, x in values.items()})
        paths = [path for path, _ in tree_flatten_with_path(complete)[0]]
        stateful = frozenset(
            key.key.name
            for path, name in zip(paths, leaf_names(complete), strict=True)
            for key in path
            # Labels of groups, which are text, may be called like a parameter.
            if name in saved and isinstance(key, DictKey) and isinstance(key.key, _Key)
        )
        template = self._init({_Key(name): x if name in stateful else None for name, x in values.items()})
        state, _ = load_state_dict(template, saved)
        mine = set(named.values())
        keys: dict[Parameter | str, Any] = {
            x: key for x, key in self._keys.items() if isinstance(x, Parameter) and x not in mine
        }
        born = (self._born & keys.keys()) | {named[name] for name in stateful}
        keys |= {x: self._keys[x] for x in named.values() if x in self._keys}
        for name in sorted(name for name, x in named.items() if x not in keys):
            keys[named[name]] = _unused(name, set(keys.values()))
        loaded = {_Key(name): keys[x] for name, x in named.items()}
        state = _rekeyed(state, frozenset(loaded), loaded)
        before, self._keys, self._born = self._state, keys, born
        self._structure = None if _holds_parameters(model) else trees.flatten(model)[1]
        self._set_state(_carried_over(state, _carried_over(before, self._init(self._values(values)))))


def _is_function(x: Any) -> bool:
    return callable(x) or isinstance(x, _LOSSES)


def _shortest(x: Any) -> float:
    """The number with the fewest digits that is this scalar in its own precision: 0.001, not 0.0010000000474974513."""
    return float(str(np.asarray(x)))


def _unused(name: str, taken: set[_Key]) -> _Key:
    """A key for a parameter; two parameters of one name, in two models, are two parameters."""
    return next(key for number in itertools.count(1) if (key := _Key(name, number)) not in taken)


def _carried_over(old: Any, new: Any) -> Any:
    """`new` with the leaves of `old` in all places that both have, where `new` has them: scalars go with the mesh."""
    before = dict(tree_flatten_with_path(old)[0])
    leaves, treedef = tree_flatten_with_path(new)
    carried = []
    for path, leaf in leaves:
        home = trees.scalar_home([leaf])
        x = before.get(path, leaf)
        carried.append(x if home is None or leaf.ndim else jax.device_put(x, home))
    return jax.tree.unflatten(treedef, carried)


def _rekeyed(state: Any, keys: frozenset[Any], names: Mapping[Any, Any]) -> Any:
    """A state over `keys` as one over those of them that have a name."""
    if isinstance(state, dict):
        if keys and state.keys() == keys:
            return {names[key]: value for key, value in state.items() if key in names}
        return {key: _rekeyed(value, keys, names) for key, value in state.items()}
    if isinstance(state, tuple):
        parts = [_rekeyed(value, keys, names) for value in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The documented optimizers
#
# Their arguments are assigned to fields and are no part of the rule: whatever the numbers, the program is the same.
# ---------------------------------------------------------------------------------------------------------------------


class SGD(Optimizer):
    """p ← p − α g, with α = `learning_rate`."""

    learning_rate: Any

    def __init__(self, learning_rate: float | Schedule, hook: Iterable[Hook] = (), donate: bool = False) -> None:
        super().__init__(sgd(0.0), hook, donate)
        self.learning_rate = learning_rate


class Momentum(Optimizer):
    """v ← μ v − α g,  p ← p + v, with α = `learning_rate` and μ = `momentum`. See `jaxopt_rules.momentum`."""

    learning_rate: Any
    momentum: Any

    def __init__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        hook: Iterable[Hook] = (),
        donate: bool = False,
    ) -> None:
        super().__init__(momentum_rule(0.0), hook, donate)
        self.learning_rate, self.momentum = learning_rate, momentum


class Adam(Optimizer):
    """Adam in the documented form, `adam(..., bias_correction="step")` with ε = 1e-8.

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(g² − v)
        α_t = α √(1 − β₂ᵗ) / (1 − β₁ᵗ)          p ← p − α_t m / (√v + ε)

    t counts the updates of this optimizer; m and v of a parameter begin when it first has a gradient.
    """

    _aliases: ClassVar[Mapping[str, str]] = {"alpha": "learning_rate", "beta1": "b1", "beta2": "b2"}
    alpha: Any
    beta1: Any
    beta2: Any

    def __init__(
        self,
        alpha: float | Schedule = 0.001,
        beta1: float | Schedule = 0.9,
        beta2: float | Schedule = 0.999,
        hook: Iterable[Hook] = (),
        donate: bool = False,
    ) -> None:
        super().__init__(adam(bias_correction="step"), hook, donate)
        self.alpha, self.beta1, self.beta2 = alpha, beta1, beta2


class AdamW(Optimizer):
    """AdamW in the documented form, `adamw(..., bias_correction="step")` with ε = 1e-8.

        p ← p − α_t m / (√v + ε) − α_t λ p          α_t, m, v as in `Adam`, the old p on the right, λ = `weight_decay`

    `AdamW(Adam(alpha=1e-3, hook=hooks), weight_decay=0.01)` takes the settings and hooks of that Adam over (not its
    state); `AdamW(alpha=1e-3, weight_decay=0.01, hook=hooks)` is the same.
    """

    _aliases: ClassVar[Mapping[str, str]] = Adam._aliases
    alpha: Any
    beta1: Any
    beta2: Any
    weight_decay: Any

    def __init__(
        self,
        adam: Adam | None = None,
        weight_decay: float | Schedule = 0.01,
        *,
        alpha: float | Schedule | None = None,
        beta1: float | Schedule | None = None,
        beta2: float | Schedule | None = None,
        hook: Iterable[Hook] | None = None,
        donate: bool | None = None,
    ) -> None:
        if not (adam is None or isinstance(adam, Adam)):
            raise TypeError(f"AdamW: the first argument is an Adam, not {adam!r}; a rate is given as alpha=...")
        source = Adam() if adam is None else adam
        given = {"alpha": alpha, "beta1": beta1, "beta2": beta2}
        if adam is not None and (double := [name for name, value in given.items() if value is not None]):
            raise TypeError(f"AdamW: {', '.join(double)} given both by the Adam and directly")
        settings = {name: getattr(source, name) if value is None else value for name, value in given.items()}
        super().__init__(
            adamw(bias_correction="step"),
            source.hook if hook is None else hook,
            source._donate if donate is None else donate,
        )
        for name, value in (settings | {"eps": source.eps, "weight_decay": weight_decay}).items():
            setattr(self, name, value)
