"""Line searches: terminals that follow a direction as far as the loss says, which they evaluate on the way.

Tree-level: the slope along a direction is an inner product over all arrays. A search stands at the end of a chain,
`chain(hook, direction, strong_wolfe())`, and is given the loss as a function of the parameters:

    value, grads = value_and_grad(params, state=state)
    updates, state = rule.update(grads, state, params, value=value, grad=grads, value_fn=loss)

φ(η) = f(θ − η d) is the loss along the line, and φ′(η) = −Re ⟨∇f(θ − η d), d⟩ its slope. φ′(0) is made of the gradient
of the loss itself, `grad`, not of what hooks have made of it: what is measured is the loss. Where a hook or a direction
has lost the way down (φ′(0) ≥ 0, or not finite), steepest descent takes its place.

`value_fn` is given the parameters that `update` got, moved where there is a direction; the others are as they were.
Inside `partition`, `masked` and `freeze` a rule gets one group, and `None` for the rest: let a search stand behind a
`partition` of directions, and freeze a parameter by the gradient `None`.

The length η is a constant to differentiation: a gradient that is taken through an update passes through d.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxopt_rules import trees
from jaxopt_rules.families import nodes
from jaxopt_rules.lift import Treewise, lift
from jaxopt_rules.numerics import global_norm, is_inexact, quotient, scale, widened
from jaxopt_rules.rule import Definition, constructor
from jaxopt_rules.schedules import Schedule


def inner(x: Any, y: Any) -> Array:
    """Re ⟨x, y⟩ over all arrays of two trees, in float32 or wider."""

    total = jnp.float32(0)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        wide = jnp.promote_types(widened(a.dtype), widened(b.dtype))
        a, b = a.astype(wide), b.astype(wide)
        # Not `vdot`, whose products accelerators round to fewer digits unless told otherwise.
        total = total + jnp.sum(a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The loss along a line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Objective:
    """The loss as a function of the parameters that take part, as a tree with `None` for the others."""

    value_fn: Callable[[Any], Any]
    has_aux: bool
    treedef: Any
    whole: Sequence[Any]  # the parts of the parameters; those that take no part stay as they are
    start: tuple[Any, Any] | None  # value and gradient at the parameters, where the caller knows them

    def evaluate(self, p: Any, dtype: Any) -> tuple[Array, Callable[[], Any]]:
        """The loss, and what gives its gradient: the direction in which it rises, in float32 or wider."""

        def loss(p: Any) -> Array:
            own = self.treedef.flatten_up_to(p)
            parts = [part if x is None else x for part, x in zip(self.whole, own, strict=True)]
            return _loss(self.value_fn, self.has_aux, jax.tree.unflatten(self.treedef, parts))

        value, pull = jax.vjp(loss, p)
        return value.astype(dtype), lambda: jax.tree.map(_rising, pull(jnp.ones_like(value))[0])

    def at_start(self, p: Any, dtype: Any) -> tuple[Array, Any]:
        if self.start is None:
            value, gradient = self.evaluate(p, dtype)
            return value, gradient()
        value, grads = self.start
        return jnp.asarray(value, dtype), jax.tree.map(lambda g, p: g.astype(widened(p.dtype)), grads, p)


def _rising(g: Array) -> Array:
    """Of a complex x, JAX gives the conjugate of the direction in which a function of x rises."""
    return (jnp.conj(g) if jnp.iscomplexobj(g) else g).astype(widened(g.dtype))


def _loss(value_fn: Callable[..., Any], has_aux: bool, *args: Any, **kwargs: Any) -> Array:
    """What `value_fn` gives, in float32 or wider and without `aux`.

    Raises:
      TypeError: it gives something else than `has_aux` promises, or no real number.
    """
    result = value_fn(*args, **kwargs)
    if has_aux != isinstance(result, tuple):
        promised = "(loss, aux), as has_aux=True says" if has_aux else "the loss alone, or is has_aux=True missing"
        raise TypeError(f"value_fn must return {promised}: it gave {type(result).__name__}")
    value = jnp.asarray(result[0] if has_aux else result)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"value_fn must return a real scalar, not {value.dtype}{list(value.shape)}")
    return value.astype(widened(value.dtype))


class _Point(NamedTuple):
    eta: Array
    value: Array  # φ(η); ∞ where it or the slope is not finite
    slope: Array  # φ′(η)


class _Line(NamedTuple):
    """Where a search begins."""

    d: Any  # what is followed, downhill
    start: _Point
    grad: Any
    go: Array  # whether there is a way down: value and slope are finite, and the slope is below 0

    @property
    def stationary(self) -> Array:
        return jnp.isfinite(self.start.value) & (self.start.slope == 0)


def _line(d: Any, p: Any, objective: _Objective, dtype: Any) -> _Line:
    value, grad = objective.at_start(p, dtype)
    norm = global_norm(grad)
    unit = jnp.minimum(1, quotient(1, norm, otherwise=1))
    slope = -inner(grad, d).astype(dtype)
    downhill = (slope < 0) & jnp.isfinite(slope)
    d = jax.tree.map(lambda d, g: jnp.where(downhill, d.astype(g.dtype), scale(unit, g)), d, grad)
    slope = jnp.where(downhill, slope, -(unit * norm * norm).astype(dtype))
    go = jnp.isfinite(value) & jnp.isfinite(slope) & (slope < 0)
    return _Line(d, _Point(jnp.zeros((), dtype), value, slope), grad, go)


def _moved(p: Any, line: _Line, eta: Array) -> Any:
    return trees.apply_updates(p, _update(line, eta))


def _update(line: _Line, eta: Array) -> Any:
    """−η d, and 0 for η = 0 whatever d is."""
    return jax.tree.map(lambda d: jnp.where(eta > 0, scale(-eta, d), 0), line.d)


# ---------------------------------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------------------------------


_METRICS = ("step_size", "num_linesearch_steps", "linesearch_failed")


class _LineSearch(Treewise):
    """A treewise rule whose function sees `value_fn` as an `_Objective`, with the whole of the parameters in it."""

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        if params is None or "value_fn" not in extra:
            return super().update(grads, state, params, extra)  # which says what is missing
        gs, treedef = trees.flatten(grads)
        parts = trees.align(treedef, params, "the parameters")
        present = [is_inexact(g) and is_inexact(p) for g, p in zip(gs, parts, strict=True)]
        start = None
        if extra.get("value") is not None and extra.get("grad") is not None:
            known = trees.align(treedef, extra["grad"], "the extra argument grad")
            for k, (g, p) in enumerate(zip(known, parts, strict=True)):
                trees.check_gradient(lambda k=k: trees.paths(grads)[k], g if present[k] else None, p)
                if present[k] and not is_inexact(g):
                    raise ValueError(f"{self.name}: the extra argument grad has none at {trees.paths(grads)[k]!r}")
            known = [g if here else None for g, here in zip(known, present, strict=True)]
            start = extra["value"], jax.tree.unflatten(treedef, known)
        has_aux = cast(_Search, self.function).has_aux
        objective = _Objective(extra["value_fn"], has_aux, treedef, parts, start)
        updates, new_state = super().update(grads, state, params, {"value_fn": objective})
        # The gradient of a parameter that took no part is not known: neither is the point as a whole.
        if sum(present) < sum(is_inexact(p) for p in jax.tree.leaves(parts)):
            new_state = new_state._replace(value=jnp.full_like(new_state.value, jnp.inf))
        return updates, new_state


@dataclass(frozen=True)
class _Search:
    max_steps: int
    has_aux: bool


def _recorded(line: _Line, eta: Array, steps: Array, accepted: Array) -> dict[str, Array]:
    failed = ~(accepted | line.stationary)
    return dict(zip(_METRICS, (eta, steps, failed), strict=True))


class BacktrackingState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_learning_rate, slope_rtol, decrease_factor, increase_factor
    value: Array  # ()  the loss where the last update led to; ∞ where it is not known
    last: Array  # ()  the last length that was tried
    grad: Any  # like θ, float32 or wider: the gradient of the loss there
    metrics: dict[str, Array]  # step_size: η; num_linesearch_steps: evaluations; linesearch_failed: 0 or 1


class _Trial(NamedTuple):
    steps: Array
    eta: Array
    accepted: Array
    value: Array
    grad: Any


class _Backtracking(_Search):
    def __call__(
        self,
        d: Any,
        value: Array,
        last: Array,
        grad: Any,
        *,
        p: Any,
        value_fn: _Objective,
        max_learning_rate: Array,
        slope_rtol: Array,
        decrease_factor: Array,
        increase_factor: Array,
    ) -> Any:
        dtype = value.dtype
        line = _line(d, p, value_fn, dtype)
        held, p, first = lax.stop_gradient((line, p, jnp.minimum(increase_factor * last, max_learning_rate)))
        c, shrink = lax.stop_gradient((slope_rtol, decrease_factor))
        phi = held.start

        def body(now: _Trial) -> _Trial:
            eta = jnp.where(now.steps > 0, shrink * now.eta, now.eta)
            new, gradient = value_fn.evaluate(_moved(p, held, eta), dtype)
            accepted = jnp.isfinite(new) & (new <= phi.value + c * eta * phi.slope)
            # The backward pass of a trial that is refused is not made.
            grad = lax.cond(accepted, gradient, lambda: now.grad)
            return _Trial(now.steps + 1, eta, accepted, jnp.where(accepted, new, now.value), grad)

        begin = _Trial(jnp.int32(0), first.astype(dtype), jnp.asarray(False), phi.value, held.grad)
        end = lax.while_loop(lambda now: held.go & ~now.accepted & (now.steps < self.max_steps), body, begin)
        eta = jnp.where(end.accepted, end.eta, 0)
        last = jnp.where(end.eta > 0, end.eta, last)
        return _update(line, eta), (end.value, last, end.grad), _recorded(held, eta, end.steps, end.accepted)


@constructor
def backtracking(
    max_backtracking_steps: int = 30,
    slope_rtol: float | Schedule = 1e-4,
    decrease_factor: float | Schedule = 0.8,
    increase_factor: float | Schedule = 1.5,
    max_learning_rate: float | Schedule = 1.0,
    *,
    has_aux: bool = False,
) -> Definition:
    """Backtracking from a first length until the loss has decreased enough (Nocedal & Wright 2006, Algorithm 3.1).

        η = min(b η_last, η_max)          while φ(η) > φ(0) + c η φ′(0):  η ← a η          θ ← θ − η d

    The last member of a chain: `chain(direction, backtracking())`, and `update(grads, state, params, value=f, grad=g,
    value_fn=loss)` with the loss as a function of the parameters. Value and gradient at θ are evaluated where one of
    `value` and `grad` is not given; those behind the update stay in the state for `value_and_grad_from_state`. A
    trial costs one evaluation of the loss, the last one its gradient too.

    Args:
      max_backtracking_steps: the largest number of trials. Where none of them decreases the loss enough, the
        parameters stay, and the next search goes on from the smallest length.
      slope_rtol: c, the part of the decrease that the slope promises.
      decrease_factor: a.
      increase_factor: b. The book's search begins with η_max every time, b = ∞: right for Newton-like directions.
      max_learning_rate: η_max, also the first length of the first search.
      has_aux: whether the loss is a function to (loss, aux); `aux` is dropped.

    A direction in which the loss rises at first, or which is not finite, is replaced by the gradient of the loss, no
    longer than 1. A loss that is not finite is too high. Recorded are η as `step_size`, the trials as
    `num_linesearch_steps`, and `linesearch_failed`.

    Nothing behind the search may change the parameters, else the value and gradient that it keeps are those of another
    point. The search needs the whole model: it stands behind `partition`, not in it.

    Memory: 1 slot, 4 bytes per float32 parameter.

    Raises:
      ValueError: a hyperparameter is out of range.
      TypeError: in `update`, the parameters or `value_fn` are missing, or that gives no real scalar.

    Differs from Optax's `scale_by_backtracking_linesearch`, which takes its last trial where none is good enough,
    begins its first search with min(b, η_max), and has more tolerances. PyTorch has no such search.
    """
    _check_steps("max_backtracking_steps", max_backtracking_steps)
    return lift(
        _LineSearch,
        _Backtracking(max_backtracking_steps, has_aux),
        BacktrackingState,
        {
            "max_learning_rate": max_learning_rate,
            "slope_rtol": slope_rtol,
            "decrease_factor": decrease_factor,
            "increase_factor": increase_factor,
        },
        shared={"value": jnp.inf, "last": jnp.inf},
        metrics=_METRICS,
        extra=("value_fn",),
        place="end",
    )


class StrongWolfeState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, slope_rtol, curv_rtol, tol
    value: Array  # ()  the loss where the last update led to; ∞ where it is not known
    grad: Any  # like θ, float32 or wider: the gradient of the loss there
    metrics: dict[str, Array]  # step_size: η; num_linesearch_steps: evaluations; linesearch_failed: 0 or 1


class _Bracket(NamedTuple):
    """A strong Wolfe search. Until it zooms, both ends are the last point that was good but too steep."""

    steps: Array  # evaluations
    eta: Array  # what is tried next
    zooms: Array  # whether the ends enclose a good length
    accepted: Array
    narrow: Array  # whether they are too near to each other for a further trial
    near: Array  # whether the last trial was near one of them
    ends: _Point  # two points, stacked
    low: Array  # 0 or 1, the end with the lower value
    grad: Any  # the gradient at that end


def _of(points: _Point, k: Any) -> _Point:
    return jax.tree.map(lambda x: x[k], points)


def _with(points: _Point, k: Any, new: _Point) -> _Point:
    return jax.tree.map(lambda x, y: x.at[k].set(y), points, new)


def _either(condition: Array, x: Any, y: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), x, y)


def _cubic_minimum(x: _Point, y: _Point, lowest: Array, highest: Array) -> Array:
    """The minimum of the cubic with the values and slopes of two points (Nocedal & Wright, equation 3.59).

    Kept between bounds; half way between them where the cubic has none.
    """
    x, y = _either(x.eta <= y.eta, (x, y), (y, x))
    d1 = x.slope + y.slope - 3 * (x.value - y.value) / (x.eta - y.eta)
    square = d1 * d1 - x.slope * y.slope
    d2 = jnp.sqrt(jnp.maximum(square, 0))
    eta = y.eta - (y.eta - x.eta) * ((y.slope + d2 - d1) / (y.slope - x.slope + 2 * d2))
    return jnp.where((square >= 0) & jnp.isfinite(eta), jnp.clip(eta, lowest, highest), (lowest + highest) / 2)


class _StrongWolfe(_Search):
    def __call__(
        self,
        d: Any,
        value: Array,
        grad: Any,
        *,
        p: Any,
        value_fn: _Objective,
        learning_rate: Array,
        slope_rtol: Array,
        curv_rtol: Array,
        tol: Array,
    ) -> Any:
        dtype = value.dtype
        line = _line(d, p, value_fn, dtype)
        held, p, first, c1, c2, tol = lax.stop_gradient((line, p, learning_rate, slope_rtol, curv_rtol, tol))
        phi = held.start
        size = jnp.stack([jnp.zeros((), dtype), *(jnp.max(jnp.abs(d), initial=0) for d in jax.tree.leaves(held.d))])
        size = jnp.max(size.astype(dtype))

        def evaluate(eta: Array) -> tuple[_Point, Any]:
            value, gradient = value_fn.evaluate(_moved(p, held, eta), dtype)
            grad = gradient()
            slope = -inner(grad, held.d).astype(dtype)
            finite = jnp.isfinite(value) & jnp.isfinite(slope)
            return _Point(eta, jnp.where(finite, value, jnp.inf), jnp.where(finite, slope, 0)), grad

        def body(now: _Bracket) -> _Bracket:
            new, grad = evaluate(now.eta)
            decreased = new.value <= phi.value + c1 * new.eta * phi.slope
            flat = jnp.abs(new.slope) <= -c2 * phi.slope
            taken = _either(now.zooms, self.zoomed(now, new, decreased, flat), self.widened(now, new, decreased, flat))
            ends, low, accepted, zooms, replaced = taken
            further = self.further(_of(now.ends, 0), new)
            within, near = self.within(ends, now.near)
            return _Bracket(
                steps=now.steps + 1,
                eta=jnp.where(zooms, within, further),
                zooms=zooms,
                accepted=accepted,
                narrow=zooms & (jnp.abs(ends.eta[1] - ends.eta[0]) * size < tol),
                near=zooms & near,
                ends=ends,
                low=low,
                grad=_either(replaced, grad, now.grad),
            )

        def goes_on(now: _Bracket) -> Array:
            return held.go & ~now.accepted & ~now.narrow & (now.steps < self.max_steps)

        no = jnp.asarray(False)
        both = jax.tree.map(lambda x: jnp.stack([x, x]), phi)
        begin = _Bracket(jnp.int32(0), first.astype(dtype), no, no, no, no, both, jnp.int32(0), held.grad)
        end = lax.while_loop(goes_on, body, begin)
        found = _of(end.ends, end.low)
        memory = found.value, end.grad
        return _update(line, found.eta), memory, _recorded(held, found.eta, end.steps, end.accepted)

    @staticmethod
    def widened(now: _Bracket, new: _Point, decreased: Array, flat: Array) -> tuple[_Point, Array, Array, Array, Array]:
        """Algorithm 3.5: the ends, which of them is lower, whether the new point is it, whether the ends enclose a good
        length, and whether the gradient at the lower end is that of the new point."""
        before = _of(now.ends, 0)
        above = ~decreased | ((now.steps > 1) & (new.value >= before.value))
        accepted = ~above & flat
        zooms = above | (~flat & (new.slope >= 0))
        onward = ~(accepted | zooms)
        ends = _with(_with(now.ends, 1, new), 0, _either(onward, new, before))
        low = jnp.where(accepted | (before.value > new.value), 1, 0).astype(jnp.int32)
        low = jnp.where(onward, 0, low)
        return ends, low, accepted, zooms, onward | (low == 1)

    @staticmethod
    def zoomed(now: _Bracket, new: _Point, decreased: Array, flat: Array) -> tuple[_Point, Array, Array, Array, Array]:
        """Algorithm 3.6: as `widened`, from ends that enclose a good length."""
        low, high = now.low, 1 - now.low
        lower, higher = _of(now.ends, low), _of(now.ends, high)
        above = ~decreased | (new.value >= lower.value)
        accepted = ~above & flat
        turns = ~flat & (new.slope * (higher.eta - lower.eta) >= 0)
        ends = _with(now.ends, high, _either(above, new, _either(turns, lower, higher)))
        ends = _with(ends, low, _either(above, lower, new))
        after = jnp.where(above, jnp.where(ends.value[0] <= ends.value[1], 0, 1), low).astype(jnp.int32)
        return ends, after, accepted, jnp.asarray(True), ~above | (after == high)

    @staticmethod
    def further(before: _Point, new: _Point) -> Array:
        return _cubic_minimum(before, new, new.eta + 0.01 * (new.eta - before.eta), 10 * new.eta)

    @staticmethod
    def within(ends: _Point, was_near: Array) -> tuple[Array, Array]:
        """The next trial between the ends, and whether it is near one: a second such trial is moved away from it."""
        lowest, highest = jnp.min(ends.eta), jnp.max(ends.eta)
        eta = _cubic_minimum(_of(ends, 0), _of(ends, 1), lowest, highest)
        margin = 0.1 * (highest - lowest)
        near = jnp.minimum(highest - eta, eta - lowest) < margin
        moved = near & (was_near | (eta >= highest) | (eta <= lowest))
        inside = jnp.where(highest - eta < eta - lowest, highest - margin, lowest + margin)
        return jnp.where(moved, inside, eta), near & ~moved


@constructor
def strong_wolfe(
    learning_rate: float | Schedule = 1.0,
    max_linesearch_steps: int = 25,
    slope_rtol: float | Schedule = 1e-4,
    curv_rtol: float | Schedule = 0.9,
    *,
    tol: float | Schedule = 1e-9,
    has_aux: bool = False,
) -> Definition:
    """A search for a length with the strong Wolfe conditions (Nocedal & Wright 2006, Algorithms 3.5 and 3.6).

        φ(η) ≤ φ(0) + c₁ η φ′(0)          |φ′(η)| ≤ c₂ |φ′(0)|          θ ← θ − η d

    The last member of a chain: `chain(direction, strong_wolfe())`, and `update(grads, state, params, value=f, grad=g,
    value_fn=loss)` with the loss as a function of the parameters. Value and gradient at θ are evaluated where one of
    `value` and `grad` is not given; those behind the update stay in the state for `value_and_grad_from_state`.

    Trials are minima of cubics (equation 3.59). Outside of a bracket they grow by 1 % to 900 %; inside, one that comes
    near an end for the second time is moved away from it by a tenth of the bracket. A length with the conditions lets
    L-BFGS keep a positive curvature in every step.

    Args:
      learning_rate: the first length that is tried.
      max_linesearch_steps: the largest number of trials, each one evaluation of the loss and its gradient.
      slope_rtol: c₁.
      curv_rtol: c₂: 0.9 for Newton-like directions, 0.1 for conjugate gradients.
      tol: a bracket across which no parameter changes by that much is not searched further.
      has_aux: whether the loss is a function to (loss, aux); `aux` is dropped.

    A search that ends without both conditions takes the lowest point of its bracket, which is never above φ(0) and may
    be η = 0: near the optimum, a decrease may be below the rounding of the loss. A direction in which the loss rises at
    first, or which is not finite, is replaced by the gradient of the loss, no longer than 1. A loss that is not finite
    is too high. Recorded are η as `step_size`, the trials as `num_linesearch_steps`, and `linesearch_failed`.

    Nothing behind the search may change the parameters, else the value and gradient that it keeps are those of another
    point. The search needs the whole model: it stands behind `partition`, not in it.

    Memory: 1 slot, 4 bytes per float32 parameter.

    Raises:
      ValueError: a hyperparameter is out of range, or c₁ ≥ c₂.
      TypeError: in `update`, the parameters or `value_fn` are missing, or that gives no real scalar.

    Differs from PyTorch's, of which this is the algorithm (Schmidt's minFunc), in what is not finite, and in the
    number of trials, which is `max_ls` + 1 there; from Optax's zoom, whose next length is at first the doubled one, and
    which also interpolates by parabolas.
    """
    _check_steps("max_linesearch_steps", max_linesearch_steps)
    if isinstance(slope_rtol, int | float) and isinstance(curv_rtol, int | float) and slope_rtol >= curv_rtol:
        raise ValueError(f"strong_wolfe: slope_rtol must be less than curv_rtol, not {slope_rtol} and {curv_rtol}")
    return lift(
        _LineSearch,
        _StrongWolfe(max_linesearch_steps, has_aux),
        StrongWolfeState,
        {"learning_rate": learning_rate, "slope_rtol": slope_rtol, "curv_rtol": curv_rtol, "tol": tol},
        shared={"value": jnp.inf},
        metrics=_METRICS,
        extra=("value_fn",),
        place="end",
    )


def _check_steps(name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} must be an integer >= 1, not {steps!r}")


def value_and_grad_from_state(value_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Array, Any]]:
    """`jax.value_and_grad(value_fn)` that a line search has evaluated already.

        value_and_grad = value_and_grad_from_state(loss)
        value, grads = value_and_grad(params, state=state)
        params, state = rule.apply(grads, state, params, value=value, grad=grads, value_fn=loss)

    The search keeps value and gradient where its update led to. Before the first update, and where a parameter took no
    part in the last one, they are evaluated: under `jax.jit` by `jax.lax.cond`, so that nothing is evaluated twice.
    What is kept belongs to the loss of the last update: with another batch the loss is another function, and is
    evaluated by `jax.value_and_grad`.

    Args:
      value_fn: the loss, `value_fn(params, *args, **kwargs)`.
      has_aux: whether it gives (loss, aux); `aux` is dropped.

    Returns:
      A function of (params, *args, state=..., **kwargs), to (value, grads): the value in float32 or wider, and the
      gradients in the dtypes of the parameters, `None` for leaves that are no inexact arrays. The gradient of a complex
      parameter is the direction in which the loss rises, the conjugate of what `jax.grad` gives.

    Raises:
      ValueError: when called: the state has no line search, or several.
    """

    def value_and_grad(params: Any, *args: Any, state: Any, **kwargs: Any) -> tuple[Array, Any]:
        found = [node.state for node in nodes(state) if isinstance(node.state, BacktrackingState | StrongWolfeState)]
        if len(found) != 1:
            raise ValueError(f"the state has {len(found)} line searches; value and gradient are taken from one")
        leaves, treedef = trees.flatten(params)
        arrays = [p if is_inexact(p) else None for p in leaves]
        kept = trees.align(treedef, found[0].grad, "the state's grad", "the parameters")
        dtype = found[0].value.dtype

        def loss(arrays: list[Any]) -> Array:
            whole = [p if x is None else x for p, x in zip(leaves, arrays, strict=True)]
            return _loss(value_fn, has_aux, jax.tree.unflatten(treedef, whole), *args, **kwargs)

        def evaluated() -> tuple[Array, list[Any]]:
            value, grads = jax.value_and_grad(loss)(arrays)
            return value.astype(dtype), jax.tree.map(lambda g, p: _rising(g).astype(p.dtype), grads, arrays)

        def remembered() -> tuple[Array, list[Any]]:
            grads = [None if p is None else g.astype(p.dtype) for g, p in zip(kept, arrays, strict=True)]
            return found[0].value, grads

        value, grads = lax.cond(jnp.isfinite(found[0].value), remembered, evaluated)
        return value, jax.tree.unflatten(treedef, grads)

    return value_and_grad
