"""The two lifts that make a rule from a formula.

A formula for one array becomes a rule through `leafwise`, a formula that looks across arrays through `treewise`. The
lifts make the clock, evaluate schedules, skip what is absent, choose the precision, and put the results back into
trees; the formulas do nothing of that.

The words, in every module: `g` gradient, `d` descent direction, `p` parameter, `m` and `v` slots (memory per
parameter), `count` finished updates (0 at birth; schedules see it), `t = count + 1` (formulas see it).
"""

import functools
import inspect
import itertools
import weakref
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from jaxopt_rules import trees
from jaxopt_rules.display import make_readable
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, check, encode, public_name, scheduled
from jaxopt_rules.numerics import after, anew, is_inexact, real, widened
from jaxopt_rules.rule import Definition, Place, Share, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector, check_selector, select
from jaxopt_rules.trees import Structure


def zeros(p: Any) -> Array:
    """The birth of a slot, unless it is declared otherwise: zeros like the parameter, in float32 or wider."""
    return jnp.zeros_like(p, dtype=widened(p.dtype))


def real_zeros(p: Any) -> Array:
    """The birth of a slot that holds |g|² or another real quantity: zeros like the parameter, but real."""
    return jnp.zeros_like(p, dtype=real(widened(p.dtype)))


def copied(p: Any) -> Array:
    """The birth of a slot that begins as a copy of the parameter, in float32 or wider."""
    wide = widened(p.dtype)
    return jnp.zeros_like(p, dtype=wide) if isinstance(p, jax.ShapeDtypeStruct) else jnp.array(p, wide)


def _born_shared(value: Any) -> Array:
    """What belongs to the rule as a whole, strong-typed: 32-bit integers, and floats in the widest type enabled."""
    kinds = {"f": jnp.result_type(float), "i": jnp.int32, "u": jnp.int32, "b": jnp.bool_}
    return jnp.array(value, kinds[np.asarray(value).dtype.kind])


def _prng_key(key: Any) -> Array:
    """A typed PRNG key of its own from a seed or a typed key.

    Raises:
      TypeError: it is neither.
    """
    seed = isinstance(key, jax.Array | np.integer) and key.shape == () and jnp.issubdtype(key.dtype, jnp.integer)
    if seed or (isinstance(key, int) and not isinstance(key, bool)):
        return jax.random.key(key)
    if trees.is_key(key) and key.shape == ():
        return trees.own(key)
    raise TypeError(f"a key is a seed (an integer) or a typed key, jax.random.key(0), not {key!r}")


def _born(birth: Callable[..., Any], p: Any, known: Mapping[str, Any]) -> Any:
    asked = inspect.signature(birth).parameters if known else ()
    slot = birth(p, **{name: value for name, value in known.items() if name in asked})
    # A birth of its own may hand out the parameter's buffer, as `astype` does where it has nothing to do.
    return slot if birth in (zeros, real_zeros, copied) else jax.tree.map(jnp.array, slot)


class _Leaves(NamedTuple):
    """Gradients and parameters, flattened and matched leaf by leaf."""

    treedef: Structure
    gs: list[Any]
    ps: list[Any]
    without_params: bool  # none were given, and `ps` are all None
    present: list[bool]  # whether leaf k takes part
    paths: Callable[[], list[str]]

    def present_only(self, column: Sequence[Any]) -> Any:
        """A tree of one value per leaf, `None` for those that take no part."""
        kept = [x if present else None for x, present in zip(column, self.present, strict=True)]
        return jax.tree.unflatten(self.treedef, kept)


def matched(grads: Any, params: Any) -> _Leaves:
    """Gradients and parameters leaf by leaf.

    Raises:
      ValueError, TypeError: they do not belong together; names the path.
    """
    gs, treedef = trees.flatten(grads)
    ps = [None] * len(gs) if params is None else trees.align(treedef, params, "the parameters")
    paths = functools.lru_cache(lambda: trees.paths(grads))
    for k, (g, p) in enumerate(zip(gs, ps, strict=True)):
        trees.check_gradient(lambda k=k: paths()[k], g, p)
    present = [is_inexact(g) and (params is None or is_inexact(p)) for g, p in zip(gs, ps, strict=True)]
    return _Leaves(treedef, gs, ps, params is None, present, paths)


@dataclass(frozen=True, eq=False)
class Clocked(Definition):
    """What has a state with `count` and `hyper` as its first fields: the clock and the hyperparameters."""

    State: type
    hyper: Mapping[str, Any]  # by the name in the state: a number or a schedule

    def __post_init__(self) -> None:
        make_readable(self.State)

    @property
    def name(self) -> str:
        return self.State.__name__.removesuffix("State")

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        return {public_name(name): value for name, value in self.hyper.items()}

    @property
    def schedules(self) -> dict[Address, Schedule]:
        return {((), name): cast(Schedule, value) for name, value in self.hyper.items() if callable(value)}

    def check_state(self, state: Any) -> None:
        """Refuses a state of another rule.

        Raises:
          TypeError: it is of another type, or has other hyperparameters.
        """
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

    def born(self, **shared: Any) -> dict[str, Any]:
        """The newborn count and hyperparameters, and what else belongs to the rule as a whole."""
        count = jnp.zeros((), jnp.int32)
        hyper = {name: self._birth(name, value, count) for name, value in self.hyper.items()}
        return {"count": count, "hyper": hyper} | shared

    def _birth(self, name: str, value: Any, count: Array) -> Any:
        if callable(value):
            return Scheduled(scheduled(name, cast(Schedule, value), count))
        return jnp.array(encode(name, value), jnp.result_type(float))

    def values(self, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The hyperparameters that hold for the next update, by name, and in the form that the state stores."""
        values, stored = {}, {}
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
        return values, stored


def advanced(count: Array) -> Array:
    """count + 1, but never beyond the largest integer."""
    return jnp.where(count == jnp.iinfo(jnp.int32).max, count, count + 1)


@dataclass(frozen=True, eq=False)
class Lift(Clocked):
    """The front half that both lifts share: clock, hyperparameters, schedules, and what is absent."""

    function: Callable[..., Any]
    births: Mapping[str, Callable[..., Any]]  # by slot, in the order of the state's fields
    shared: Mapping[str, Any]  # by field of the state: the first value of what belongs to no parameter
    key: Any
    where: Mapping[str, Selector | None]
    given: Mapping[str, Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]]
    static: Mapping[str, Any]
    measures: Mapping[str, Callable[..., Any]]  # by the keyword of `function`: what is computed once for all leaves
    sums: Mapping[str, Callable[..., Any]]  # by the keyword of `function`: what is computed of a leaf before
    metrics: tuple[str, ...]
    wants: frozenset[str]  # the keyword-only arguments of `function`
    stands: Place
    ordered: bool
    extra: frozenset[str]

    @property
    def place(self) -> Place:
        return self.stands

    @property
    def accepts(self) -> frozenset[str]:
        return self.extra

    @property
    def remembers(self) -> bool:
        memory = self.births or self.shared or self.asked & {"t", "key"}
        return bool(memory) or any(map(callable, self.hyper.values()))

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        if "weight_decay" not in self.hyper:
            return super().shares(paths, leaves)
        decay = self.hyper["weight_decay"]
        text = f"{decay if callable(decay) else float(decay):} ({self.name})"
        hits = select(self.where.get("weight_decay"), paths, leaves)
        return [Share(decay=(text,) if hit and is_inexact(p) else ()) for hit, p in zip(hits, leaves, strict=True)]

    def init(self, params: Any) -> Any:
        leaves, treedef = trees.flatten(params)
        whole = {field: _born_shared(value) for field, value in self.shared.items()}
        whole |= {"key": _prng_key(self.key)} if "key" in self.wants else {}
        whole |= {"metrics": {name: _born_shared(0.0) for name in self.metrics}} if self.metrics else {}
        given = self._given(params, leaves)
        slots = {
            slot: jax.tree.unflatten(
                treedef,
                [_born(birth, p, {**self.static, **given(k)}) if is_inexact(p) else None for k, p in enumerate(leaves)],
            )
            for slot, birth in self.births.items()
        }
        return self.State(**trees.placed_with(leaves, self.born(**whole)), **slots)

    def _given(self, model: Any, leaves: Sequence[Any]) -> Callable[[int], dict[str, Any]]:
        """For leaf k of the model, what it is `given`."""
        paths = trees.paths(model) if self.given else []
        given = {name: function(paths, leaves) for name, function in self.given.items()}
        return lambda k: {name: values[k] for name, values in given.items()}

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """What the function, a measure or a sum asks for."""
        return self.wants.union(*map(_keywords_of, (*self.measures.values(), *self.sums.values())))

    def _slots(self, at: _Leaves, state: Any) -> list[list[Any]]:
        """The slots, slots[i][k] for slot i of leaf k, and whether all is there that the function asks for."""
        self.check_state(state)
        # A group of `partition` may have nothing of a tree that is one array: gradients and parameters are None.
        if "p" in self.asked and at.without_params and any(at.present):
            raise TypeError(f"{self.name} needs the parameters: update(grads, state, params)")
        slots = [trees.align(at.treedef, getattr(state, slot), f"the state's {slot}") for slot in self.births]
        for k, g in enumerate(at.gs):
            if not at.present[k]:
                continue
            if self.ordered and jnp.iscomplexobj(g):
                raise TypeError(
                    f"{self.name} compares numbers, which complex ones do not allow: {trees.quoted(at.paths()[k])} is "
                    f"{g.dtype}; train its real and imaginary part, or leave it to another rule (partition)"
                )
            for (slot, birth), column in zip(self.births.items(), slots, strict=True):
                if column[k] is None:
                    raise ValueError(
                        f"{self.name}: the state has no {slot} for {trees.quoted(at.paths()[k])}: it was no trainable "
                        "array when init ran; init again with the parameters that are trained now"
                    )
                if birth in (zeros, real_zeros, copied) and column[k].shape != g.shape:
                    raise ValueError(
                        f"{self.name}: the gradient at {trees.quoted(at.paths()[k])} has shape {g.shape}, "
                        f"the state's {slot} has shape {column[k].shape}"
                    )
        return slots

    def _per_leaf(self, at: _Leaves, model: Any) -> Callable[[int], dict[str, Any]]:
        """For leaf k, what its formula is `given`, and `None` for hyperparameters that `where` does not grant it."""
        selectors = {name: by for name, by in self.where.items() if by is not None}
        if not (selectors or self.given):
            return lambda k: {}
        # The whole model decides, also that part of it for which one `None` stands among the gradients.
        leaves = trees.flatten(model)[0]
        paths = trees.paths(model)
        denied = {name: [not hit for hit in select(by, paths, leaves)] for name, by in selectors.items()}
        given = self._given(model, leaves)
        asked = self.given.keys() & self.wants
        parts = at.treedef.flatten_up_to(model)
        offset = [0, *itertools.accumulate(len(trees.flatten(part)[0]) for part in parts)]
        return lambda k: (
            {name: value for name, value in given(offset[k]).items() if name in asked}
            | {name: None for name, values in denied.items() if values[offset[k]]}
        )

    @property
    def _forms(self) -> tuple[tuple[str, Any], ...]:
        """What is static and the formula asks for."""
        return tuple((name, value) for name, value in self.static.items() if name in self.wants)

    def _advance(self, state: Any) -> tuple[Array, dict[str, Any], dict[str, Any]]:
        """The next count; what the function asks for of the rule as a whole; the hyperparameters to be stored."""
        count = advanced(state.count)
        values, stored = self.values(state)
        values |= {"t": count.astype(jnp.result_type(float))} if "t" in self.asked else {}
        values |= {"key": jax.random.fold_in(state.key, state.count)} if "key" in self.wants else {}
        return count, values, stored

    def _measured(self, grads: Callable[[], Any], whole: dict[str, Any], p: Any) -> dict[str, Any]:
        """`whole`, and what the measures say of these gradients, one after another."""
        values = dict(whole)
        for name, measure in self.measures.items():
            seen = [grads()] if _positional_of(measure) else []
            keywords = {asked: p if asked == "p" else values[asked] for asked in _keywords_of(measure)}
            # Extra arguments may be functions, which nothing compiled can take.
            function = measure if self.extra else _compiled_tree(measure, ())
            # Else XLA would compute it once more in the loop over each leaf, and compile that as often.
            values[name] = lax.optimization_barrier(function(*seen, **keywords))
        return values

    def _recorded(self, state: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """The field of the state for what is recorded."""
        if not self.metrics:
            return {}
        # Copies: what is recorded may also be memory, or an argument of the caller's.
        return {"metrics": {name: jnp.array(values[name], state.metrics[name].dtype) for name in self.metrics}}

    def _kept(self, state: Any) -> dict[str, Any]:
        """Fields of the state that no update changes."""
        return {"key": state.key} if "key" in self.wants else {}

    def _extra(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        if missing := sorted(self.extra - extra.keys()):
            raise TypeError(f"{self.name} needs {', '.join(missing)}: update(grads, state, params, {missing[0]}=...)")
        return {name: extra[name] for name in self.extra}


class Leafwise(Lift):
    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        updates, (new_state,) = in_a_row([self], grads, [state], params, [extra])
        return updates, new_state

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        params, (new_state,) = in_a_row([self], grads, [state], params, [extra], applied=True)
        return params, new_state


def fits_in_a_row(rule: Definition) -> bool:
    """Whether a rule can be one of those that `in_a_row` takes: it is a formula for one array and nothing else."""
    return isinstance(rule, Leafwise) and type(rule).apply is Leafwise.apply


def in_a_row(
    rules: Sequence[Leafwise],
    grads: Any,
    states: Sequence[Any],
    params: Any,
    extras: Sequence[Mapping[str, Any]],
    *,
    applied: bool = False,
) -> tuple[Any, list[Any]]:
    """Formulas for one array, one after another: each leaf goes through all of them in one compiled function.

    Returns:
      What the last of them gives, or, if `applied`, the parameters that it is added to; and the new states.
    """
    at = matched(grads, params)
    if not any(isinstance(g, Tracer) for g in at.gs):
        # Where nothing is traced, nothing need be computed anew: the formulas go on from what a measure has read.
        for i, rule in enumerate(rules):
            if i > 0 and any(map(_positional_of, rule.measures.values())):
                passed, first = in_a_row(rules[:i], grads, states[:i], params, extras[:i])
                result, others = in_a_row(rules[i:], passed, states[i:], params, extras[i:], applied=applied)
                return result, first + others
    model = grads if params is None else params
    parts = [_Part(rule, at, state, model, extra) for rule, state, extra in zip(rules, states, extras, strict=True)]
    behind = False  # whether formulas have run before, for a measure of what they give
    for i, part in enumerate(parts):
        done = part.measure(lambda i=i, behind=behind: _passed(parts[:i], at, behind))
        if i > 0 and done:
            behind = True
            for each in parts:
                each.wait_for(done)
    outs = list(at.ps) if applied else [None] * len(at.gs)
    for k in (k for k, present in enumerate(at.present) if present):
        outs[k], new = _on_leaf(parts, at, k, behind, applied=applied)
        for part, slots in zip(parts, new, strict=True):
            part.put(k, slots)
    return jax.tree.unflatten(at.treedef, outs), [part.new_state() for part in parts]


def _passed(parts: Sequence["_Part"], at: _Leaves, behind: bool) -> Any:
    """What comes out of these, a tree in which the absent are `None`."""
    if not parts:
        return at.present_only(at.gs)
    column = [_on_leaf(parts, at, k, behind)[0] if present else None for k, present in enumerate(at.present)]
    return jax.tree.unflatten(at.treedef, column)


class _Part:
    """One of the rules in a row, within one update."""

    def __init__(self, rule: Leafwise, at: _Leaves, state: Any, model: Any, extra: Mapping[str, Any]) -> None:
        self.rule, self.at, self.state = rule, at, state
        self.old = rule._slots(at, state)
        self.new = [list(column) for column in self.old]
        self.count, whole, self.hyper = rule._advance(state)
        self.whole = whole | rule._extra(extra)
        self.own = rule._per_leaf(at, model)
        self.function, self.name, self.forms = weakref.ref(rule.function), _name_of(rule.function), rule._forms
        self.sums = tuple((name, weakref.ref(total)) for name, total in rule.sums.items())
        self.scalars: dict[jnp.dtype, dict[str, Any]] = {}  # for formulas in this precision

    def measure(self, grads: Callable[[], Any]) -> list[Array]:
        """Takes the measures, and returns those of gradients."""
        p = self.at.present_only(self.at.ps) if "p" in self.rule.asked else None
        self.whole = self.rule._measured(grads, self.whole, p)
        return [self.whole[name] for name, measure in self.rule.measures.items() if _positional_of(measure)]

    def wait_for(self, done: Sequence[Array]) -> None:
        self.whole, self.scalars = after(done, self.whole), {}

    def slots(self, k: int) -> list[Any]:
        return [column[k] for column in self.old]

    def put(self, k: int, slots: Sequence[Any]) -> None:
        for column, value in zip(self.new, slots, strict=True):
            column[k] = value

    def formula(self, k: int) -> tuple["_Formula", dict[str, Any]]:
        """The formula for leaf k, and the keywords that are traced."""
        g, like = self.at.gs[k], self.at.gs[k] if self.at.ps[k] is None else self.at.ps[k]
        slot_dtypes = [x.dtype for x in jax.tree.leaves(self.slots(k)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        wide = functools.reduce(jnp.promote_types, slot_dtypes) if slot_dtypes else widened(like.dtype)
        if jnp.issubdtype(g.dtype, jnp.complexfloating):
            wide = jnp.promote_types(wide, jnp.complex64)
        own = self.own(k)
        known = self.forms + tuple((name, value) for name, value in own.items() if _is_static(value))
        traced = self._in(real(wide)) | {
            name: value if value is None else jnp.asarray(value, real(wide))
            for name, value in own.items()
            if not _is_static(value)
        }
        if "key" in self.rule.wants:
            # By path, so that a leaf's noise does not depend on what other leaves there are.
            traced["key"] = jax.random.fold_in(self.whole["key"], zlib.crc32(self.at.paths()[k].encode()))
        return _Formula(self.function, self.name, wide, known, self.sums), traced

    def _in(self, dtype: Any) -> dict[str, Any]:
        """What is the same for all leaves, numbers in this precision."""
        if dtype not in self.scalars:
            wanted = {name: value for name, value in self.whole.items() if name in self.rule.asked and name != "key"}
            self.scalars[dtype] = {
                name: value if value is None else jnp.asarray(value).astype(dtype) for name, value in wanted.items()
            }
        return self.scalars[dtype]

    def new_state(self) -> Any:
        grown = {
            slot: jax.tree.unflatten(self.at.treedef, column)
            for slot, column in zip(self.rule.births, self.new, strict=True)
        }
        fields = self.rule._kept(self.state) | self.rule._recorded(self.state, self.whole)
        return self.rule.State(count=self.count, hyper=self.hyper, **fields, **grown)


def _on_leaf(
    parts: Sequence[_Part], at: _Leaves, k: int, behind: bool, *, applied: bool = False
) -> tuple[Any, list[Any]]:
    formulas, keywords = zip(*(part.formula(k) for part in parts), strict=True)
    p = at.ps[k] if applied or any("p" in part.rule.asked for part in parts) else None
    arrays = at.gs[k], p, [part.slots(k) for part in parts]
    arrays = anew(arrays) if behind else arrays
    return _compiled_row(*(formula.name for formula in formulas))(*arrays, list(keywords), formulas, applied)


class _Formula(NamedTuple):
    """A leaf function and all that is known when it is traced."""

    function: Any  # a weak reference: no compiled function keeps a leaf function alive
    name: str
    wide: Any  # the precision of its arithmetic
    known: tuple[tuple[str, Any], ...]
    sums: tuple[tuple[str, Any], ...]  # by keyword, weak references to the functions

    def __call__(
        self, g: Array, p: Any, slots: list[Any], keywords: Mapping[str, Any]
    ) -> tuple[Array, tuple[Any, ...]]:
        function = self.function()
        result = function(g.astype(self.wide), *slots, **self._asked_by(function, p, keywords))
        out, new = _parts(self.name, result, len(slots))
        out = jnp.asarray(out, self.wide)
        if out.shape != g.shape:
            raise ValueError(f"{self.name} gave a result of shape {out.shape} for a gradient of shape {g.shape}")
        return out, tuple(_as_before(self.name, x, old) for x, old in zip(new, slots, strict=True))

    def summed(self, g: Array, p: Any, slots: list[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The sums over this array, by keyword."""
        found = {}
        for name, ref in self.sums:
            total = ref()
            read = slots if len(_positional_of(total)) > 1 else []
            found[name] = total(g.astype(self.wide), *read, **self._asked_by(total, p, {**keywords, **found}))
        return found

    def _asked_by(self, function: Callable[..., Any], p: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
        known = {**keywords, **dict(self.known)}
        asked = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked):
            return known
        known |= {} if p is None else {"p": p.astype(self.wide)}
        return {name: known[name] for name in _keywords_of(function) if name in known}


def _is_static(value: Any) -> bool:
    """Whether it is known when the formula is traced: neither a number, nor what stands for one that is absent."""
    number = isinstance(value, jax.Array | np.ndarray | np.generic | int | float) and not isinstance(value, bool)
    return not number and value is not None


@functools.cache
def _compiled_row(*names: str) -> Callable[..., Any]:
    """`_row` under the names of its formulas, traced once for each shape.

    Within an outer `jax.jit` this keeps one copy of the formulas per shape in the program, not one per leaf.
    """

    def row(
        g: Array, p: Any, slots: list[Any], keywords: list[Any], formulas: Sequence[_Formula], applied: bool
    ) -> tuple[Array, list[Any]]:
        out, new = _row(formulas, g, p, slots, keywords)
        return trees.added(p, out) if applied else out, new

    row.__name__ = "_".join(name.strip("_") for name in names)
    return jax.jit(row, static_argnums=(4, 5))


def _row(
    formulas: Sequence[_Formula], g: Array, p: Any, slots: list[Any], keywords: list[Any]
) -> tuple[Array, list[Any]]:
    for i, formula in enumerate(formulas):
        if formula.sums:
            x, _ = _one_after_another(formulas[:i], g, p, slots, keywords)
            keywords = list(keywords)
            sums = formula.summed(x, p, slots[i], keywords[i])
            keywords = after(jax.tree.leaves(sums), keywords)
            keywords[i] |= sums
            g, p, slots = anew((g, p, slots))
    return _one_after_another(formulas, g, p, slots, keywords)


def _one_after_another(
    formulas: Sequence[_Formula], g: Array, p: Any, slots: list[Any], keywords: list[Any]
) -> tuple[Array, list[Any]]:
    new = []
    for formula, old, known in zip(formulas, slots, keywords, strict=False):
        g, slot = formula(g, p, old, known)
        new.append(slot)
    return g, new


def _keywords_of(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _positional_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _parts(name: str, result: Any, slots: int) -> tuple[Any, tuple[Any, ...]]:
    if not slots:
        return result, ()
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple) and len(result[1]) == slots:
        return result
    raise TypeError(f"{name} must return its result and a tuple of {slots} new slots: d, (slot, ...)")


def _as_before(name: str, slot: Any, before: Any) -> Any:
    """A new slot in the containers and dtypes of the one before it."""
    if jax.tree.structure(slot) != (structure := jax.tree.structure(before)):
        # Of a slot that is a tree, `nnx.Optimizer` makes an `nnx.State`, with the same keys.
        parts, keys = dict(trees.flatten_with_paths(slot)[0]), [key for key, _ in trees.flatten_with_paths(before)[0]]
        if parts.keys() != set(keys):
            raise ValueError(f"{name} gave a slot of another structure than it had")
        slot = jax.tree.unflatten(structure, [parts[key] for key in keys])
    for x, old in zip(jax.tree.leaves(slot), jax.tree.leaves(before), strict=True):
        if jnp.shape(x) != old.shape:
            raise ValueError(f"{name} gave a slot of shape {jnp.shape(x)} for one of shape {old.shape}")
    return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), slot, before)


class Treewise(Lift):
    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        at = matched(grads, params)
        slots = dict(zip(self.births, self._slots(at, state), strict=True))
        count, keywords, hyper = self._advance(state)
        keywords |= self._extra(extra)
        if "p" in self.wants:
            keywords["p"] = at.present_only(at.ps)
        own = self._per_leaf(at, grads if params is None else params)
        for name in self.where:
            keywords[name] = at.present_only([own(k).get(name, keywords[name]) for k in range(len(at.gs))])
        # Extra arguments may be functions, which nothing compiled can take.
        function = self.function if self.extra else _compiled_tree(self.function, self._forms)
        keywords |= dict(self._forms) if self.extra else {}
        memory = [name for name in self.State._fields if name in slots or name in self.shared]
        old = [at.present_only(slots[name]) if name in slots else getattr(state, name) for name in memory]
        result = function(at.present_only(at.gs), *old, **keywords)
        parts = list(result) if memory or self.metrics else [result]
        fields = self._kept(state)
        for name, new in zip(memory, parts[1] if memory else (), strict=True):
            if name in self.shared:
                fields[name] = _as_before(f"{self.name}: {name}", new, getattr(state, name))
                continue
            column = [
                _as_before(f"{self.name}: {name}", value, before) if present else before
                for present, before, value in zip(
                    at.present, slots[name], trees.align(at.treedef, new, f"{self.name}: the new {name}"), strict=True
                )
            ]
            fields[name] = jax.tree.unflatten(at.treedef, column)
        fields |= self._recorded(state, parts[-1] if self.metrics else {})
        return parts[0], self.State(count=count, hyper=hyper, **fields)


# By the function that was compiled, which may go: nothing here keeps it alive.
_compiled: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _compiled_tree(function: Callable[..., Any], known: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    compiled = _compiled.setdefault(function, {})
    if known not in compiled:
        ref: Any = weakref.ref(function)
        compiled[known] = jax.jit(lambda *args, **keywords: ref()(*args, **keywords, **dict(known)))
    return compiled[known]


@constructor
def leafwise(
    leaf: Callable[..., Any],
    State: type,
    *,
    slots: Mapping[str, Callable[..., Any]] | None = None,
    where: Mapping[str, Selector | None] | None = None,
    given: Mapping[str, Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]] | None = None,
    static: Mapping[str, Any] | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    sums: Mapping[str, Callable[..., Any]] | None = None,
    metrics: Sequence[str] = (),
    key: Any = None,
    extra: Sequence[str] = (),
    place: Place = "front",
    ordered: bool = False,
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
        that it may read: hyperparameters, `t` (number of this update, from 1), `p` (the parameter), `key` (random,
        another one in each update and for each path), what it is `given`, what is `static`, what `measures` say, and
        extra arguments. Where it asks for `one_minus_b1` and the hyperparameter is `b1`, the state stores 1 − b1. A
        hyperparameter that it has a default for may be missing, or `None`; the state then has none of that name.
      State: a NamedTuple with the fields `count`, `hyper`, `key` if the leaf function asks for one, the slots, and
        `metrics` if values are recorded.
      slots: how a slot is born from a parameter, for slots that are not zeros like it: `{"v": real_zeros}`. A slot may
        have any shape, or be a tree of arrays. A birth that has an argument of the name of what leaves are `given`
        receives it.
      where: for a hyperparameter, the leaves that it applies to; elsewhere the leaf function receives `None` for it.
      given: for a keyword, a function of all paths and leaves that returns a value for each of them, and may refuse one
        by an error. A number (or `None`) is traced; anything else, such as a `MatrixView` or a `bool`, must be
        hashable, and is known when the formula is traced.
      static: hashable values that are no hyperparameters, such as the name of a form of the formula: known when it is
        traced, the same for all leaves, and also for births that have an argument of the name.
      measures: scalars that are the same for all leaves, computed once and in this order: by keyword of the leaf
        function, a function that may ask for what the leaf function may (`p` being the tree of them), and for what was
        measured before. Where it has a positional argument, that is the tree of gradients, in their own precision:
        `{"grad_norm": global_norm, "factor": lambda *, grad_norm, max_norm: ...}`.
      sums: norms and the like of one leaf that its formula needs first: by keyword of the leaf function, a function of
        its first argument, or of all its positional ones, that may ask for what it may: `{"d_norm": norm}`. Written
        inside the formula, a sum over what the result is made of makes XLA keep that in memory.
      metrics: the names of those measures that are recorded, and that `metrics(state)` collects.
      key: a seed, or a typed PRNG key (`jax.random.key`); it stays in the state as it is.
      extra: names of extra arguments of `update` that the leaf function asks for.
      place: where in a chain the rule stands: in "front" of the member that makes updates, as hooks and directions do;
        at the "end", as that member, whose result has sign and learning rate applied; "behind" it, as a rule on
        updates; or "anywhere".
      ordered: whether the formula compares numbers, so that complex arrays are refused.
      **hyper: the hyperparameters, each a number or a schedule.

    Raises:
      TypeError: the signature of `leaf` does not fit the slots and the hyperparameters, or a value is not numeric.
      ValueError: a hyperparameter is outside its domain.
    """
    return lift(
        Leafwise,
        leaf,
        State,
        hyper,
        births=slots,
        where=where,
        given=given,
        static=static,
        measures=measures,
        sums=sums,
        metrics=metrics,
        key=key,
        extra=extra,
        place=place,
        ordered=ordered,
    )


@constructor
def treewise(
    function: Callable[..., Any],
    State: type,
    *,
    slots: Mapping[str, Callable[..., Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    where: Mapping[str, Selector | None] | None = None,
    static: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = (),
    key: Any = None,
    extra: Sequence[str] = (),
    place: Place = "front",
    ordered: bool = False,
    **hyper: Any,
) -> Definition:
    """Lifts a formula that looks across the arrays of a tree to a rule.

    `function` is called like a leaf function, with trees in place of arrays; in them, what is absent is `None`, so
    that `jax.tree.map` passes over it. Gradients and parameters come in their own precision: widen them (see
    `numerics.scale`) before computing. It returns the result, then a tuple of the new memory if it has some, then a
    dict of recorded values if it has `metrics`.

    Args:
      function: `function(grads, *memory, *, **keywords)`.
      State: a NamedTuple with the fields `count`, `hyper`, `key` if the function asks for one, the memory (slots and
        what is shared), and `metrics` if values are recorded.
      slots, static, key, extra, place, ordered, **hyper: as in `leafwise`.
      shared: of the memory, what belongs to no parameter: a number or an array to begin with, by field of the state.
      where: by hyperparameter, which leaves it is for (`None`: all). The function gets it as a tree, which holds its
        value for these leaves and `None` for the others.
      metrics: the names of the recorded values, scalars that `metrics(state)` collects.

    Raises:
      TypeError, ValueError: as `leafwise`.
    """
    return lift(
        Treewise,
        function,
        State,
        hyper,
        births=slots,
        shared=shared,
        where=where,
        static=static,
        metrics=metrics,
        key=key,
        extra=extra,
        place=place,
        ordered=ordered,
    )


def lift(
    kind: type[Lift],
    function: Callable[..., Any],
    State: type,
    hyper: Mapping[str, Any],
    *,
    births: Mapping[str, Callable[..., Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    where: Mapping[str, Selector | None] | None = None,
    given: Mapping[str, Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]] | None = None,
    static: Mapping[str, Any] | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    sums: Mapping[str, Callable[..., Any]] | None = None,
    metrics: Sequence[str] = (),
    key: Any = None,
    extra: Sequence[str] = (),
    place: Place = "front",
    ordered: bool = False,
) -> Lift:
    """What `leafwise` and `treewise` do, for a lift of this kind."""
    fields = State._fields
    births, shared, where, given, static = births or {}, shared or {}, where or {}, given or {}, static or {}
    measures, sums = measures or {}, sums or {}
    memory = [name for name in fields[2:] if name not in ("key", "metrics")]
    slots = [name for name in memory if name not in shared]
    title = f"{_name_of(function)}{inspect.signature(function)}"
    parameters = inspect.signature(function).parameters.values()
    positional, wants = _positional_of(function), _keywords_of(function)
    optional = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    absent = {name for name, value in hyper.items() if value is None and {name, COMPLEMENT + name} & optional}
    hyper = {name: value for name, value in hyper.items() if name not in absent}
    if fields[:2] != ("count", "hyper"):
        raise TypeError(f"{State.__name__}: the fields of a state begin with count, hyper, not {fields[:2]}")
    if ("metrics" in fields) != bool(metrics):
        raise TypeError(f"{State.__name__}: a state has a field `metrics` exactly where the rule records values")
    if ("key" in fields) != ("key" in wants) or ("key" in wants) != (key is not None):
        raise TypeError(f"{title}: a rule that asks for a key is given one, and its state has a field for it")
    lifted = {"t", "p", "key"}
    for name in (*hyper, *extra, *given, *static, *measures, *sums):
        if name in lifted or name.startswith(COMPLEMENT):
            raise TypeError(f"{title}: {name} is given by the lift and cannot be a hyperparameter or an extra argument")
    if unknown := sorted((births.keys() | shared.keys()) - set(memory)):
        raise TypeError(f"{title}: {unknown[0]} is no slot of {State.__name__}, which has {tuple(slots)}")
    if positional[1:] != memory:
        raise TypeError(f"{title}: after the gradient come the slots of {State.__name__}, {tuple(memory)}")
    asked = wants.union(*map(_keywords_of, (*measures.values(), *sums.values())))
    stored = {COMPLEMENT + name if COMPLEMENT + name in asked else name: name for name in hyper}
    told = {*extra, *given, *static}
    supplied = stored.keys() | lifted | told | measures.keys() | sums.keys()
    wants -= optional - supplied
    for name in sorted(wants - supplied):
        raise TypeError(f"{title} asks for {name}, which is no hyperparameter: {tuple(hyper)}")
    for kind_of, functions, before in (
        ("measure", measures, stored.keys() | {"t", "p", *extra}),
        ("sum", sums, supplied - sums.keys()),
    ):
        for i, (measured, measure) in enumerate(functions.items()):
            for name in sorted(_keywords_of(measure) - before - set(itertools.islice(functions, i))):
                raise TypeError(f"the {kind_of} {measured} of {title} asks for {name}, which is not known then")
    if measures and (unknown := sorted(set(metrics) - measures.keys())):
        raise TypeError(f"{title}: {unknown[0]} is to be recorded and is none of its measures")
    asked_at_birth = {name for birth in births.values() for name in inspect.signature(birth).parameters}
    unread = sorted(stored.keys() - wants - asked) + sorted(told - wants - asked - asked_at_birth)
    for name in unread + sorted({*measures, *sums} - wants - asked - set(metrics)):
        raise TypeError(f"{title} does not ask for {name}")
    for stored_name, name in stored.items():
        check(stored_name, hyper[name])
    if key is not None:
        _prng_key(key)
    for name, value in static.items():
        if not isinstance(value, Hashable):
            raise TypeError(f"{title}: what is static must be hashable, and {name} is {value!r}")
    for name, selector in where.items():
        if selector is not None:
            check_selector(selector, f"{State.__name__.removesuffix('State')}: where")
            if name not in stored and name not in absent:
                raise TypeError(f"where names {name}, which is no hyperparameter: {tuple(stored)}")
    return kind(
        function=function,
        State=State,
        hyper={stored_name: hyper[name] for stored_name, name in stored.items()},
        births={slot: births.get(slot, zeros) for slot in slots},
        shared=dict(shared),
        key=key,
        where={name: selector for name, selector in where.items() if name in stored},
        given=dict(given),
        static=dict(static),
        measures=dict(measures),
        sums=dict(sums),
        metrics=tuple(metrics),
        wants=frozenset(wants),
        stands=place,
        ordered=ordered,
        extra=frozenset(extra),
    )
