"""The two lifts that make a rule from a formula.

A formula for one array becomes a rule through `leafwise`, a formula that looks across arrays through `treewise`. The
lifts make the clock, evaluate schedules, skip what is absent, choose the precision, and put the results back into
trees; the formulas do nothing of that.

The words, in every module: `g` gradient, `d` descent direction, `p` parameter, `m` and `v` slots (memory per
parameter), `count` finished updates (0 at birth; schedules see it), `t = count + 1` (formulas see it).
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, check, encode, scheduled
from jaxopt_rules.numerics import is_inexact, real, widened
from jaxopt_rules.rule import Definition, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector, check_selector, select
from jaxopt_rules.trees import Structure


def zeros(p: Any) -> Array:
    """The birth of a slot, unless it is declared otherwise: zeros like the parameter, in float32 or wider."""
    return jnp.zeros_like(p, dtype=widened(p.dtype))


def real_zeros(p: Any) -> Array:
    """The birth of a slot that holds |g|² or another real quantity: zeros like the parameter, but real."""
    return jnp.zeros_like(p, dtype=real(widened(p.dtype)))


def _born(birth: Callable[[Any], Any], p: Any) -> Any:
    slot = birth(p)
    # A birth of its own may hand out the parameter's buffer, as `astype` does where it has nothing to do.
    return slot if birth in (zeros, real_zeros) else jax.tree.map(jnp.array, slot)


class _Leaves(NamedTuple):
    """The arguments of an update, flattened and matched leaf by leaf."""

    treedef: Structure
    gs: list[Any]
    ps: list[Any]  # all None where no parameters were given
    slots: list[list[Any]]  # slots[i][k]: slot i of leaf k
    present: list[bool]  # whether leaf k takes part
    paths: Callable[[], list[str]]


@dataclass(frozen=True, eq=False)
class _Lift(Definition):
    """The front half that both lifts share: clock, hyperparameters, schedules, and what is absent."""

    function: Callable[..., Any]
    State: type
    hyper: Mapping[str, Any]  # by the name in the state: a number or a schedule
    births: Mapping[str, Callable[[Any], Any]]  # by slot, in the order of the state's fields
    where: Mapping[str, Selector | None]
    metrics: tuple[str, ...]
    wants: frozenset[str]  # the keyword-only arguments of `function`
    ends: bool  # the chain
    extra: frozenset[str]

    @property
    def terminal(self) -> bool:
        return self.ends

    @property
    def accepts(self) -> frozenset[str]:
        return self.extra

    @property
    def name(self) -> str:
        return self.State.__name__.removesuffix("State")

    @property
    def schedules(self) -> dict[Address, Schedule]:
        return {((), name): cast(Schedule, value) for name, value in self.hyper.items() if callable(value)}

    @property
    def remembers(self) -> bool:
        return bool(self.births) or "t" in self.wants or any(map(callable, self.hyper.values()))

    def init(self, params: Any) -> Any:
        leaves, treedef = trees.flatten(params)
        home = trees.scalar_home(leaves)
        count = jnp.zeros((), jnp.int32)
        hyper = {name: self._birth(name, value, count) for name, value in self.hyper.items()}
        metrics = {name: jnp.zeros((), jnp.result_type(float)) for name in self.metrics}
        scalars = {"count": count, "hyper": hyper} | ({"metrics": metrics} if metrics else {})
        if home is not None:
            scalars = jax.device_put(scalars, home)
        slots = {
            slot: jax.tree.unflatten(treedef, [_born(birth, p) if is_inexact(p) else None for p in leaves])
            for slot, birth in self.births.items()
        }
        return self.State(**scalars, **slots)

    def _birth(self, name: str, value: Any, count: Array) -> Any:
        if callable(value):
            return Scheduled(scheduled(name, cast(Schedule, value), count))
        return jnp.array(encode(name, value), jnp.result_type(float))

    def _begin(self, grads: Any, state: Any, params: Any) -> _Leaves:
        if not isinstance(state, self.State):
            raise TypeError(
                f"{self.name}: update got a state of type {type(state).__name__}, not {self.State.__name__}; "
                "was it made by the init of another rule?"
            )
        if state.hyper.keys() != self.hyper.keys():
            raise TypeError(
                f"{self.name}: the state has the hyperparameters {', '.join(sorted(state.hyper))}, the rule has "
                f"{', '.join(sorted(self.hyper))}; was the state made by the init of another rule?"
            )
        if params is None and "p" in self.wants:
            raise TypeError(f"{self.name} needs the parameters: update(grads, state, params)")
        gs, treedef = trees.flatten(grads)
        ps = [None] * len(gs) if params is None else trees.align(treedef, params, "the parameters")
        slots = [trees.align(treedef, getattr(state, slot), f"the state's {slot}") for slot in self.births]
        paths = functools.lru_cache(lambda: trees.paths(grads))
        present = [is_inexact(g) and (params is None or is_inexact(p)) for g, p in zip(gs, ps, strict=True)]
        for k, (g, p) in enumerate(zip(gs, ps, strict=True)):
            trees.check_gradient(lambda k=k: paths()[k], g, p)
            for (slot, birth), values in zip(self.births.items(), slots, strict=True):
                if present[k] and values[k] is not None and birth in (zeros, real_zeros) and values[k].shape != g.shape:
                    raise ValueError(
                        f"{self.name}: the gradient at {trees.quoted(paths()[k])} has shape {g.shape}, "
                        f"the state's {slot} has shape {values[k].shape}"
                    )
                if present[k] and values[k] is None:
                    raise ValueError(
                        f"{self.name}: the state has no {slot} for {trees.quoted(paths()[k])}: it was no trainable "
                        "array when init ran; init again with the parameters that are trained now"
                    )
        return _Leaves(treedef, gs, ps, slots, present, paths)

    def _advance(self, state: Any) -> tuple[Array, dict[str, Any], dict[str, Any]]:
        """The next count; t and the hyperparameters by the names that the function asks for; what is stored."""
        count = jnp.where(state.count == jnp.iinfo(jnp.int32).max, state.count, state.count + 1)
        values: dict[str, Any] = {"t": count.astype(jnp.result_type(float))} if "t" in self.wants else {}
        stored = {}
        for name, source in self.hyper.items():
            entry = state.hyper[name]
            # The state decides: a plain value in place of a `Scheduled` mark overrules the rule's schedule.
            if isinstance(entry, Scheduled):
                if not callable(source):
                    raise TypeError(f"{self.name}: a schedule owns {name} in the state, and this rule has none for it")
                values[name] = scheduled(name, cast(Schedule, source), state.count).astype(entry.value.dtype)
                stored[name] = Scheduled(values[name])
            else:
                values[name] = stored[name] = entry
        return count, values, stored

    def _extra(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        if missing := sorted(self.extra - extra.keys()):
            raise TypeError(f"{self.name} needs {', '.join(missing)}: update(grads, state, params, {missing[0]}=...)")
        return {name: extra[name] for name in self.extra}


class _Leafwise(_Lift):
    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        at = self._begin(grads, state, params)
        count, scalars, hyper = self._advance(state)
        scalars |= self._extra(extra)
        like = at.gs if params is None else at.ps
        chosen = {name: self._selected(selector, grads, params) for name, selector in self.where.items()}
        outs: list[Any] = [None] * len(at.gs)
        slots = [list(column) for column in at.slots]
        for k in (k for k, present in enumerate(at.present) if present):
            mine = scalars | {name: None for name, paths in chosen.items() if at.paths()[k] not in paths}
            mine |= {"p": at.ps[k]} if "p" in self.wants else {}
            outs[k], new = _on_leaf(self.function, at.gs[k], [column[k] for column in slots], mine, like[k].dtype)
            for column, value in zip(slots, new, strict=True):
                column[k] = value
        grown = {slot: jax.tree.unflatten(at.treedef, column) for slot, column in zip(self.births, slots, strict=True)}
        return jax.tree.unflatten(at.treedef, outs), self.State(count=count, hyper=hyper, **grown)

    def _selected(self, selector: Selector | None, grads: Any, params: Any) -> set[str]:
        """Paths of the whole model, also of that part for which `None` stands among the gradients."""
        model = grads if params is None else params
        paths = trees.paths(model)
        hits = select(selector, paths, trees.flatten(model)[0])
        return {path for path, hit in zip(paths, hits, strict=True) if hit}


def _on_leaf(leaf: Callable[..., Any], g: Any, slots: list[Any], keywords: dict[str, Any], dtype: Any) -> Any:
    slot_dtypes = [x.dtype for x in jax.tree.leaves(slots) if jnp.issubdtype(x.dtype, jnp.inexact)]
    wide = functools.reduce(jnp.promote_types, slot_dtypes) if slot_dtypes else widened(dtype)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        wide = jnp.promote_types(wide, jnp.complex64)
    return _compiled_leaf(leaf, jnp.dtype(wide))(g, slots, keywords)


# By the function that was compiled, which may go: nothing here keeps it alive.
_compiled: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _compiled_leaf(leaf: Callable[..., Any], wide: jnp.dtype) -> Callable[..., Any]:
    """The leaf function in slot precision, traced once for each shape.

    Within an outer `jax.jit` this keeps one copy of the formula per shape in the program, not one per leaf.
    """
    by_dtype = _compiled.setdefault(leaf, {})
    if wide not in by_dtype:
        by_dtype[wide] = _compile_leaf(weakref.ref(leaf), wide, _name_of(leaf))
    return by_dtype[wide]


def _compile_leaf(leaf_ref: Callable[[], Any], wide: jnp.dtype, name: str) -> Callable[..., Any]:
    scalar = real(wide)

    def call(g: Array, slots: list[Any], keywords: dict[str, Any]) -> tuple[Array, tuple[Any, ...]]:
        cast_keywords = {
            key: None if value is None else jnp.asarray(value).astype(wide if key == "p" else scalar)
            for key, value in keywords.items()
        }
        result = leaf_ref()(g.astype(wide), *slots, **cast_keywords)
        out, new = _parts(name, result, len(slots))
        out = jnp.asarray(out, wide)
        if out.shape != g.shape:
            raise ValueError(f"{name} gave a result of shape {out.shape} for a gradient of shape {g.shape}")
        return out, tuple(_as_before(name, x, old) for x, old in zip(new, slots, strict=True))

    call.__name__ = name.lstrip("_")
    return jax.jit(call)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _parts(name: str, result: Any, slots: int) -> tuple[Any, tuple[Any, ...]]:
    if not slots:
        return result, ()
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple) and len(result[1]) == slots:
        return result
    raise TypeError(f"{name} must return its result and a tuple of {slots} new slots: d, (slot, ...)")


def _as_before(name: str, slot: Any, before: Any) -> Any:
    """A new slot in the dtypes of the one before it."""
    if jax.tree.structure(slot) != jax.tree.structure(before):
        raise ValueError(f"{name} gave a slot of another structure than it had")
    for x, old in zip(jax.tree.leaves(slot), jax.tree.leaves(before), strict=True):
        if jnp.shape(x) != old.shape:
            raise ValueError(f"{name} gave a slot of shape {jnp.shape(x)} for one of shape {old.shape}")
    return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), slot, before)


class _Treewise(_Lift):
    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        at = self._begin(grads, state, params)
        count, keywords, hyper = self._advance(state)
        keywords |= self._extra(extra)

        def present_only(column: Sequence[Any]) -> Any:
            kept = [x if present else None for x, present in zip(column, at.present, strict=True)]
            return jax.tree.unflatten(at.treedef, kept)

        if "p" in self.wants:
            keywords["p"] = present_only(at.ps)
        # Extra arguments may be functions, which nothing compiled can take.
        function = self.function if self.extra else _compiled_tree(self.function)
        result = function(present_only(at.gs), *map(present_only, at.slots), **keywords)
        parts = list(result) if self.births or self.metrics else [result]
        fields: dict[str, Any] = {}
        if self.births:
            for slot, old, new in zip(self.births, at.slots, parts[1], strict=True):
                column = [
                    jax.tree.map(lambda x, before: jnp.asarray(x, before.dtype), value, before) if present else before
                    for present, before, value in zip(
                        at.present, old, trees.align(at.treedef, new, f"{self.name}: the new {slot}"), strict=True
                    )
                ]
                fields[slot] = jax.tree.unflatten(at.treedef, column)
        if self.metrics:
            recorded = parts[-1]
            fields["metrics"] = {name: jnp.asarray(recorded[name], state.metrics[name].dtype) for name in self.metrics}
        return parts[0], self.State(count=count, hyper=hyper, **fields)


def _compiled_tree(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = _compiled.setdefault(function, {})
    if "tree" not in compiled:
        ref: Any = weakref.ref(function)
        compiled["tree"] = jax.jit(lambda *args, **keywords: ref()(*args, **keywords))
    return compiled["tree"]


@constructor
def leafwise(
    leaf: Callable[..., Any],
    State: type,
    *,
    slots: Mapping[str, Callable[[Any], Any]] | None = None,
    where: Mapping[str, Selector | None] | None = None,
    extra: Sequence[str] = (),
    terminal: bool = False,
    **hyper: Any,
) -> Definition:
    """Lifts a formula on one array to a rule on pytrees.

        def _heavy_ball(g, v, *, momentum):
            v = momentum * v + g
            return v, (v,)

        leafwise(_heavy_ball, VelocityState, momentum=0.9)

    Args:
      leaf: `leaf(g, *slots, *, **keywords)`. It is called with arrays of one shape in slot precision (float32 or
        wider) and returns the result and a tuple of the new slots; without slots, the result alone. Its positional
        arguments after the first are the slots, in the order of the state's fields. Its keyword-only arguments are all
        that it may read: hyperparameters, `t` (number of this update, from 1), `p` (the parameter) and extra
        arguments. Where it asks for `one_minus_b1` and the hyperparameter is `b1`, the state stores 1 − b1.
      State: a NamedTuple with the fields `count`, `hyper` and then the slots.
      slots: how a slot is born from a parameter, for slots that are not zeros like it: `{"v": real_zeros}`.
      where: for a hyperparameter, the leaves that it applies to; elsewhere the leaf function receives `None` for it.
      extra: names of extra arguments of `update` that the leaf function asks for.
      terminal: whether the result is an update, with sign and learning rate applied, and not a direction.
      **hyper: the hyperparameters, each a number or a schedule.

    Raises:
      TypeError: the signature of `leaf` does not fit the slots and the hyperparameters, or a value is not numeric.
      ValueError: a hyperparameter is outside its domain.
    """
    return _lift(_Leafwise, leaf, State, slots, where, extra, terminal, hyper)


@constructor
def treewise(
    function: Callable[..., Any],
    State: type,
    *,
    slots: Mapping[str, Callable[[Any], Any]] | None = None,
    metrics: Sequence[str] = (),
    extra: Sequence[str] = (),
    terminal: bool = False,
    **hyper: Any,
) -> Definition:
    """Lifts a formula that looks across the arrays of a tree to a rule.

    `function` is called like a leaf function, with trees in place of arrays; in them, what is absent is `None`, so
    that `jax.tree.map` passes over it. Gradients and parameters come in their own precision: widen them (see
    `numerics.scale`) before computing. It returns the result, then a tuple of the new slots if it has slots, then a
    dict of recorded values if it has `metrics`.

    Args:
      function: `function(grads, *slots, *, **keywords)`.
      State: a NamedTuple with the fields `count`, `hyper`, the slots, and `metrics` if values are recorded.
      slots, extra, terminal, **hyper: as in `leafwise`.
      metrics: the names of the recorded values, scalars that `metrics(state)` collects.

    Raises:
      TypeError, ValueError: as `leafwise`.
    """
    return _lift(_Treewise, function, State, slots, None, extra, terminal, hyper, tuple(metrics))


def _lift(
    kind: type[_Lift],
    function: Callable[..., Any],
    State: type,
    births: Mapping[str, Callable[[Any], Any]] | None,
    where: Mapping[str, Selector | None] | None,
    extra: Sequence[str],
    terminal: bool,
    hyper: Mapping[str, Any],
    metrics: tuple[str, ...] = (),
) -> _Lift:
    fields = State._fields
    slots = [name for name in fields[2:] if name != "metrics"]
    title = f"{_name_of(function)}{inspect.signature(function)}"
    if fields[:2] != ("count", "hyper"):
        raise TypeError(f"{State.__name__}: the fields of a state begin with count, hyper, not {fields[:2]}")
    if ("metrics" in fields) != bool(metrics):
        raise TypeError(f"{State.__name__}: a state has a field `metrics` exactly where the rule records values")
    for name in (*hyper, *extra):
        if name in ("t", "p") or name.startswith(COMPLEMENT):
            raise TypeError(f"{title}: {name} is given by the lift and cannot be a hyperparameter or an extra argument")
    if unknown := sorted((births or {}).keys() - set(slots)):
        raise TypeError(f"{title}: {unknown[0]} is no slot of {State.__name__}, which has {tuple(slots)}")
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    wants = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if positional[1:] != slots:
        raise TypeError(f"{title}: after the gradient come the slots of {State.__name__}, {tuple(slots)}")
    stored = {COMPLEMENT + name if COMPLEMENT + name in wants else name: name for name in hyper}
    for name in sorted(wants - stored.keys() - {"t", "p"} - set(extra)):
        raise TypeError(f"{title} asks for {name}, which is no hyperparameter: {tuple(hyper)}")
    for name in sorted(stored.keys() - wants) + sorted(set(extra) - wants):
        raise TypeError(f"{title} does not ask for {name}")
    for name, value in hyper.items():
        check(name, value)
    selectors = {name: selector for name, selector in (where or {}).items() if selector is not None}
    for name, selector in selectors.items():
        check_selector(selector, f"{State.__name__.removesuffix('State')}: where")
        if name not in stored:
            raise TypeError(f"where names {name}, which is no hyperparameter: {tuple(stored)}")
    return kind(
        function=function,
        State=State,
        hyper={stored_name: hyper[name] for stored_name, name in stored.items()},
        births={slot: (births or {}).get(slot, zeros) for slot in slots},
        where=selectors,
        metrics=metrics,
        wants=frozenset(wants),
        ends=terminal,
        extra=frozenset(extra),
    )
