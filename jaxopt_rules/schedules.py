"""Schedules: a hyperparameter as a function of `count`, the number of finished updates.

Any callable of `count` is a schedule. Those here are frozen dataclasses, so they print, compare, hash and pickle,
and rules that hold them do too; `*`, `/`, `+`, `-` and `clip` make new ones of them. `count` may be an integer or an
array of integers; the first update sees 0. All of them compute in the widest float that is enabled. Where a schedule
runs `steps` updates, it starts at `init` (count 0), reaches `end` at count = `steps` exactly, and stays there: the
last of `steps` updates, which sees count = `steps` − 1, still has a rate above `end`.

Optax's schedules see the same `count`; so do PyTorch's and transformers', where `scheduler.step()` follows every
`optimizer.step()`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxopt_rules import markup

Schedule = Callable[[Any], ArrayLike]

_LARGEST_COUNT = 2**31 - 1

# ---------------------------------------------------------------------------------------------------------------------
# Fractions of a run, exact in float32
# ---------------------------------------------------------------------------------------------------------------------


def _elapsed(count: ArrayLike, stop: float, start: float = 0) -> tuple[Array, Array]:
    """The fractions of the way from `start` to `stop` done and left, each from its own difference of integers, so that
    neither loses digits near 0."""
    before, behind = math.floor(start), math.ceil(stop)
    count = jnp.clip(jnp.asarray(count), before, behind)
    as_float = jnp.result_type(float)
    done = (count - before).astype(as_float) - (start - before)
    left = (behind - count).astype(as_float) - (behind - stop)
    return jnp.clip(done / (stop - start), 0, 1), jnp.clip(left / (stop - start), 0, 1)


def _sin2(fraction: Array) -> Array:
    return jnp.sin(jnp.pi / 2 * fraction) ** 2


# The weights of the first and of the last value, from the fractions p done and 1 − p left. Both are written without
# differences, so that the smaller one keeps its digits.
_SHAPES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "linear": lambda done, left: (left, done),
    "cosine": lambda done, left: (_sin2(left), _sin2(done)),
    "1-sqrt": lambda done, left: (left / (1 + jnp.sqrt(done)), jnp.sqrt(done)),
    "square": lambda done, left: (left * (1 + done), done**2),
    "rex": lambda done, left: (2 * left / (1 + left), done / (1 + left)),
}


def _between(shape: str, first: Array | float, last: Array | float, elapsed: tuple[Array, Array]) -> Array:
    of_first, of_last = _SHAPES[shape](*elapsed)
    return first * of_first + last * of_last


def _power(base: float, count: Array, steps: int = 1) -> Array:
    """base^(count / steps), a product of one entry for each byte of `count`, from tables made in double.

    In float32, 0.9999 is off by 2e-8 and its 100,000th power by 2e-3; this product is off by at most 7 roundings.
    """
    value = jnp.ones(jnp.shape(count), jnp.result_type(float))
    for shift in range(0, 32, 8):
        with np.errstate(over="ignore"):
            table = np.power(float(base), (np.arange(256) << shift) / steps).astype(value.dtype)
        value = value * jnp.asarray(table)[(count >> shift) & 255]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What all schedules here have
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_unless(condition: Any, owner: object, name: str, text: str) -> None:
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {name} must be {text}, not {getattr(owner, name)!r}")


def _check_integer(owner: object, name: str, least: int = 1) -> None:
    value = getattr(owner, name)
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _refuse_unless(integer and value >= least, owner, name, f"an integer >= {least}")


def _check_shape(owner: object, name: str, *more: str) -> None:
    known = (*_SHAPES, *more)
    _refuse_unless(getattr(owner, name) in known, owner, name, f"one of {', '.join(map(repr, known))}")


class Formula:
    """A schedule that prints as it would be written, without defaults, and of which arithmetic makes schedules.

    `+`, `-`, `*` and `/` take a number or a schedule, which may be any function of `count`; `clip` bounds the value.
    `Cosine(1e-3, 100) * 0.1` is a schedule that prints like this, compares, hashes and pickles.
    """

    __array_ufunc__ = None  # a NumPy number in front of an operator leaves it to the methods below

    def __call__(self, count: ArrayLike) -> Array:
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = []
        for entry in fields(cast(Any, self)):
            value = getattr(self, entry.name)
            text = repr(entry.metadata.get("written", lambda x: x)(value))
            if entry.default is MISSING:
                shown.append(text)
            elif isinstance(value, Tracer) or value != entry.default:
                shown.append(f"{entry.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def _knots(self) -> tuple[int, ...]:
        """For pictures: the counts at which it bends or jumps, up to the one from which on it tells nothing new."""
        return ()

    def _repr_html_(self) -> str:
        return markup.code(repr(self)) + _picture(self)

    def __add__(self, other: "Schedule | float") -> "Combined":
        return _combined(self, "+", other)

    def __radd__(self, other: "Schedule | float") -> "Combined":
        return _combined(other, "+", self)

    def __sub__(self, other: "Schedule | float") -> "Combined":
        return _combined(self, "-", other)

    def __rsub__(self, other: "Schedule | float") -> "Combined":
        return _combined(other, "-", self)

    def __mul__(self, other: "Schedule | float") -> "Combined":
        return _combined(self, "*", other)

    def __rmul__(self, other: "Schedule | float") -> "Combined":
        return _combined(other, "*", self)

    def __truediv__(self, other: "Schedule | float") -> "Combined":
        return _combined(self, "/", other)

    def __rtruediv__(self, other: "Schedule | float") -> "Combined":
        return _combined(other, "/", self)

    def clip(self, low: float | None = None, high: float | None = None) -> "Clipped":
        """min(max(value, low), high)."""
        return Clipped(self, low, high)


_POINTS = 160  # of a picture


def _picture(schedule: Formula) -> str:
    """Its course, and in words its first value, its peak (or its lowest), and its last; nothing where it is unknown."""
    knots = [min(max(knot, 0), _LARGEST_COUNT) for knot in schedule._knots]
    if not any(knots) or _is_traced(schedule):
        return ""
    regular = np.linspace(0, max(knots), max(_POINTS - len(knots), 2)).round()
    counts = np.sort(np.concatenate([regular, knots])).astype(np.int32)
    try:
        with jax.ensure_compile_time_eval():
            # One program is compiled sooner than each of its operations.
            values = np.asarray(jax.jit(lambda count: jnp.broadcast_to(schedule(count), count.shape))(counts), float)
    except Exception:  # whatever a function that someone joined to it does: to show it raises nothing
        return ""
    if not np.isfinite(values).all():
        return ""
    # To the digits that float32 has: what is left of rounding is no course.
    points = [(count, float(f"{value:.6g}")) for count, value in zip(counts.tolist(), values.tolist(), strict=True)]
    first, last = points[0], points[-1]
    highest, lowest = (extreme(points, key=lambda point: point[1]) for extreme in (max, min))
    between = highest if highest[1] > first[1] else lowest
    told = [f"{first[1]:.4g}"]
    told += [f"{b[1]:.4g} at {b[0]}" for a, b in pairwise((first, between, last)) if b[1] != a[1]]
    return markup.line_plot(*zip(*points, strict=True)) + markup.faint(" → ".join(told))


def _is_traced(x: Any) -> bool:
    parts = [getattr(x, entry.name) for entry in fields(cast(Any, x))] if isinstance(x, Formula) else x
    return isinstance(x, Tracer) or (isinstance(parts, list | tuple) and any(map(_is_traced, parts)))


def _knots_of(x: Schedule | float) -> tuple[int, ...]:
    return x._knots if isinstance(x, Formula) else ()


_OPERATORS = {"+": jnp.add, "-": jnp.subtract, "*": jnp.multiply, "/": jnp.divide}


def _binding(x: object) -> int:
    """How closely the parts of x's text hold together: sums loosely, products closely, all else like one word."""
    return {"+": 1, "-": 1, "*": 2, "/": 2}[x.operator] if isinstance(x, Combined) else 3


def _in_parentheses_unless(closely: bool, x: object) -> str:
    return repr(x) if closely else f"({x!r})"


@dataclass(frozen=True, repr=False)
class Combined(Formula):
    """Two schedules, or a schedule and a number, with an operator between them: `a * b`."""

    left: Schedule | float
    operator: str
    right: Schedule | float

    def __call__(self, count: ArrayLike) -> Array:
        as_float = jnp.result_type(float)
        values = [jnp.asarray(_schedule(x)(count), as_float) for x in (self.left, self.right)]
        return _OPERATORS[self.operator](*values)

    def __repr__(self) -> str:
        left = _in_parentheses_unless(_binding(self.left) >= _binding(self), self.left)
        right = _in_parentheses_unless(_binding(self.right) > _binding(self), self.right)
        return f"{left} {self.operator} {right}"

    @property
    def _knots(self) -> tuple[int, ...]:
        return _knots_of(self.left) + _knots_of(self.right)


def _combined(left: Any, operator: str, right: Any) -> Combined:
    left, right = (x.item() if _is_scalar(x) and not isinstance(x, Tracer) else x for x in (left, right))
    if all(callable(x) or _is_scalar(x) or (isinstance(x, Real) and not isinstance(x, bool)) for x in (left, right)):
        return Combined(left, operator, right)
    return NotImplemented


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Array) and jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.floating)


@dataclass(frozen=True, repr=False)
class Clipped(Formula):
    """min(max(schedule(count), low), high), written `schedule.clip(low, high)`; `None` is no bound."""

    schedule: Schedule
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"clip: low must not exceed high, as {self.low!r} does {self.high!r}")

    def __call__(self, count: ArrayLike) -> Array:
        return jnp.clip(jnp.asarray(self.schedule(count), jnp.result_type(float)), self.low, self.high)

    def __repr__(self) -> str:
        bounds = [f"{name}={bound!r}" for name in ("low", "high") if (bound := getattr(self, name)) is not None]
        return f"{_in_parentheses_unless(_binding(self.schedule) > 2, self.schedule)}.clip({', '.join(bounds)})"

    @property
    def _knots(self) -> tuple[int, ...]:
        return _knots_of(self.schedule)


@dataclass(frozen=True, repr=False)
class Constant(Formula):
    """value(count) = value."""

    value: float

    def __call__(self, count: ArrayLike) -> Array:
        return jnp.full(jnp.shape(count), self.value, jnp.result_type(float))


def _schedule(x: Schedule | float) -> Schedule:
    return x if callable(x) else Constant(x)


# ---------------------------------------------------------------------------------------------------------------------
# From `init` to `end`
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _Run(Formula):
    """From `init` (count 0) to `end` (count = `steps`, and from there on) along the curve `_shape`."""

    init: float
    steps: int
    end: float = 0.0

    _shape: ClassVar[str]

    def __post_init__(self) -> None:
        _check_integer(self, "steps")

    def __call__(self, count: ArrayLike) -> Array:
        return _between(self._shape, self.init, self.end, _elapsed(count, self.steps))

    @property
    def _knots(self) -> tuple[int, ...]:
        return (self.steps,)


class Linear(_Run):
    """value(count) = init + (end − init) · p, with p = min(count / steps, 1).

    PyTorch's `LinearLR` is Linear(rate · start_factor, total_iters, rate · end_factor), and starts at ⅓ by default.
    """

    _shape = "linear"


class Cosine(_Run):
    """value(count) = end + (init − end) · ½(1 + cos πp), with p = min(count / steps, 1).

    Loshchilov & Hutter, "SGDR" (arXiv:1608.03983), equation 5, without restarts. Computed as sin² of the part
    that is left, so that the last steps before `end` = 0 keep their digits.

    Differs from PyTorch's `CosineAnnealingLR`, which rises again after `T_max`, as transformers' cosine does after its
    last step; here `end` is held. (transformers: Warmup(Cosine(rate, steps − warmup), warmup).)
    """

    _shape = "cosine"


class Rex(_Run):
    """value(count) = end + (init − end) · (1 − p) / (1 − p/2), with p = min(count / steps, 1).

    Chen, Wolfe & Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule" (arXiv:2107.04197).
    It stays above `Linear` all the way, and falls the steeper the nearer the end is.
    """

    _shape = "rex"


@dataclass(frozen=True, repr=False)
class Polynomial(Formula):
    """value(count) = end + (init − end) · (1 − p)^power, with p = min(count / steps, 1).

    PyTorch's `PolynomialLR` has end = 0. transformers' polynomial decay is Warmup(Polynomial(rate, steps − warmup,
    1e-7, power), warmup), Optax's `polynomial_schedule` has the order (init, end, power, steps).
    """

    init: float
    steps: int
    end: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_integer(self, "steps")
        _refuse_unless(self.power > 0, self, "power", "above 0")

    def __call__(self, count: ArrayLike) -> Array:
        done, left = _elapsed(count, self.steps)
        # 1 − (1 − p)^power without cancellation at small p. log of the fraction that is exact: the smaller one.
        log_left = jnp.where(done < left, jnp.log1p(-done), jnp.log(left))
        return self.init * left**self.power - self.end * jnp.expm1(self.power * log_left)

    @property
    def _knots(self) -> tuple[int, ...]:
        return (self.steps,)


# ---------------------------------------------------------------------------------------------------------------------
# Without an end
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Exponential(Formula):
    """value(count) = max(init · factor^(count / steps), floor): times `factor` in every `steps` updates.

    It begins with `init` at count 0 and has no end. `staircase` takes the whole part of count / steps, so that the
    value changes at multiples of `steps` only.

    PyTorch's `ExponentialLR` is Exponential(rate, 1, gamma), its `StepLR` Exponential(rate, step_size, gamma,
    staircase=True). Optax's `end_value` bounds a growing value from above; here `clip` does.
    """

    init: float
    steps: int
    factor: float
    staircase: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_integer(self, "steps")
        _refuse_unless(self.factor > 0, self, "factor", "above 0")

    def __call__(self, count: ArrayLike) -> Array:
        count = jnp.maximum(jnp.asarray(count), 0)
        power = _power(self.factor, count // self.steps) if self.staircase else _power(self.factor, count, self.steps)
        return jnp.maximum(self.init * power, self.floor)

    @property
    def _knots(self) -> tuple[int, ...]:
        if self.factor == 1:
            return ()
        # To a hundredth, or a hundredfold; of a staircase at least five steps.
        return (int(self.steps * max(5, math.log(100) / abs(math.log(self.factor)))),)


@dataclass(frozen=True, repr=False)
class Piecewise(Formula):
    """value(count) = init · Π fᵢ over all boundaries bᵢ ≤ count: `Piecewise(0.1, {30: 0.1, 60: 0.1})`.

    The update that sees count = bᵢ is the first with the factor fᵢ. Factors multiply; the values are rounded once.
    Same as Optax's `piecewise_constant_schedule`, and as PyTorch's `MultiStepLR` with its gamma for each factor.
    """

    init: float
    factors: Mapping[int, float] | tuple[tuple[int, float], ...] = field(metadata={"written": dict})

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(sorted(dict(self.factors).items())))
        integers = all(isinstance(b, int | np.integer) and b >= 1 for b in self._boundaries)
        _refuse_unless(integers, self, "factors", "a factor for each boundary, an integer >= 1")

    @property
    def _boundaries(self) -> list[int]:
        return list(dict(self.factors))

    def __call__(self, count: ArrayLike) -> Array:
        values = self.init * np.cumprod([1.0, *dict(self.factors).values()])
        passed = jnp.searchsorted(jnp.asarray(self._boundaries, int), jnp.asarray(count), side="right")
        return jnp.asarray(values, jnp.result_type(float))[passed]

    @property
    def _knots(self) -> tuple[int, ...]:
        *_, before, last = (0, 0, *self._boundaries)
        jumps = [count for boundary in self._boundaries for count in (boundary - 1, boundary)]
        return (*jumps, 2 * last - before)


@dataclass(frozen=True, repr=False)
class InverseSqrt(Formula):
    """Linear from 0 to `peak` over `warmup` updates, then peak · √(τ / (count − warmup + τ)).

    τ is `timescale`; without one, `warmup`, or 10,000 where that is 0. The peak is at count = `warmup`, and the first
    update has rate 0 unless `warmup` is 0. There is no end. Same as transformers' `get_inverse_sqrt_schedule`.

    With τ = warmup = W the second part is peak · √(W / count). So that of "Attention Is All You Need"
    (arXiv:1706.03762, section 5.3), d^−½ min(t^−½, t W^−1.5), is InverseSqrt((d W)^−½, W) at t = count + 1, and has no
    first update of rate 0. T5's (arXiv:1910.10683, section 3.1.2), 1 / √max(count, W), is
    Join((Constant(W^−½), InverseSqrt(W^−½, 0, W)), (W,)).
    """

    peak: float
    warmup: int
    timescale: int | None = None

    def __post_init__(self) -> None:
        _check_integer(self, "warmup", least=0)
        if self.timescale is not None:
            _check_integer(self, "timescale")

    def __call__(self, count: ArrayLike) -> Array:
        timescale = self.timescale or self.warmup or 10_000

        def decay(since: Array) -> Array:
            return self.peak * jnp.sqrt(timescale / (jnp.maximum(since, 0) + timescale).astype(jnp.result_type(float)))

        return Warmup(decay, self.warmup)(jnp.asarray(count))

    @property
    def _knots(self) -> tuple[int, ...]:
        # At the last, a third of the peak is left.
        return self.warmup, self.warmup + 8 * (self.timescale or self.warmup or 10_000)


# ---------------------------------------------------------------------------------------------------------------------
# Cycles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CosineRestarts(Formula):
    """`Cosine` again and again; cycle i = 0, 1, … takes steps · multⁱ updates and begins at init · decayⁱ.

    Loshchilov & Hutter, "SGDR" (arXiv:1608.03983), equation 5: T₀ is `steps` and T_mult is `mult`. The peaks are at
    the first update of each cycle, at count = steps · (multⁱ − 1) / (mult − 1), which are integers and found as such.
    `end` is where a cycle would arrive if the next one did not begin there: no update has it.

    Same as PyTorch's `CosineAnnealingWarmRestarts`, stepped once per update. transformers' hard restarts are
    Warmup(Join((CosineRestarts(rate, n // cycles), Constant(0.0)), (n,)), warmup) with n = steps − warmup, for a number
    of cycles that divides n.
    """

    init: float
    steps: int
    mult: int = 1
    end: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        _check_integer(self, "steps")
        _check_integer(self, "mult")
        _refuse_unless(self.decay > 0, self, "decay", "above 0")

    def __call__(self, count: ArrayLike) -> Array:
        count = jnp.maximum(jnp.asarray(count), 0)
        if self.mult == 1:
            cycle, done = count // self.steps, count % self.steps
            length = self.steps
        else:
            lengths, starts = [int(self.steps)], [0]
            while starts[-1] + lengths[-1] <= _LARGEST_COUNT:
                starts.append(starts[-1] + lengths[-1])
                lengths.append(lengths[-1] * self.mult)
            cycle = jnp.searchsorted(jnp.asarray(starts), count, side="right") - 1
            done = count - jnp.asarray(starts)[cycle]
            # As floats: the last cycle may be longer than any count.
            length = jnp.asarray(lengths, jnp.result_type(float))[cycle]
        done = done.astype(jnp.result_type(float))
        return _between(
            "cosine", self.init * _power(self.decay, cycle), self.end, (done / length, (length - done) / length)
        )

    @property
    def _knots(self) -> tuple[int, ...]:
        starts = [self.steps * sum(self.mult**i for i in range(cycles)) for cycles in (1, 2, 3)]
        jumps = [count for start in starts[:2] for count in (start - 1, start)]
        return (*jumps, starts[2] - 1)


@dataclass(frozen=True, repr=False)
class Cyclic(Formula):
    """From `low` to `high` in `steps_up` updates, back in `steps_down` (the same number by default), and so on.

        value(count) = low + (high − low) · h · s,   h = the triangle's height, 0 at count 0, 1 at count = steps_up

    s = 1 for "triangular", 2^−i in cycle i = 0, 1, … for "triangular2", gamma^count for "exp_range". Smith, "Cyclical
    Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3. The first peak is at count = `steps_up`.

    Same as PyTorch's `CyclicLR`. Its inverse cycle of the momentum is a `Cyclic` whose `low` is the larger value:
    Cyclic(max_momentum, base_momentum, …).
    """

    low: float
    high: float
    steps_up: int
    steps_down: int | None = None
    mode: str = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_integer(self, "steps_up")
        if self.steps_down is not None:
            _check_integer(self, "steps_down")
        modes = ("triangular", "triangular2", "exp_range")
        _refuse_unless(self.mode in modes, self, "mode", f"one of {', '.join(map(repr, modes))}")
        _refuse_unless(self.gamma > 0, self, "gamma", "above 0")
        if self.gamma != 1 and self.mode != "exp_range":
            raise ValueError(f"Cyclic: mode {self.mode!r} does not use gamma")

    def __call__(self, count: ArrayLike) -> Array:
        count = jnp.maximum(jnp.asarray(count), 0)
        length = self.steps_up + (self.steps_down or self.steps_up)
        cycle, within = count // length, count % length
        rising, _ = _elapsed(within, self.steps_up)
        _, falling = _elapsed(within, length, self.steps_up)
        height = jnp.where(within < self.steps_up, rising, falling)
        if self.mode == "triangular2":
            height = height * _power(0.5, cycle)
        elif self.mode == "exp_range":
            height = height * _power(self.gamma, count)
        return self.low * (1 - height) + self.high * height

    @property
    def _knots(self) -> tuple[int, ...]:
        length = self.steps_up + (self.steps_down or self.steps_up)
        return tuple(cycle * length + knot for cycle in range(3) for knot in (self.steps_up, length))


@dataclass(frozen=True, repr=False)
class OneCycle(Formula):
    """Up from peak / div to `peak` in the first warmup · steps updates, then down to peak / div / final_div.

    Smith & Topin, "Super-Convergence" (arXiv:1708.07120). `warmup` is a fraction of `steps`, and steps · warmup need
    not be whole; the peak is at count = warmup · steps, the end at count = `steps`. With `three_phase` the way down
    passes peak / div at count = 2 · warmup · steps. `shape` is that of every phase: "cosine", "linear", or another of
    those that `WarmupStableDecay` has, "exponential" excepted. The first update has the rate peak / div.

    `momentum` makes the inverse cycle for the momentum, or for Adam's b1:

        cycle = OneCycle(0.1, 1000)
        sgd(cycle, momentum=cycle.momentum())

    Differs from PyTorch's `OneCycleLR` by one: that is at its peak at count = pct_start · T − 1 and at its end at
    count = T − 1, the last update. It is OneCycle(max_lr, T − 1, warmup=(pct_start · T − 1) / (T − 1)) exactly. What
    PyTorch calls `anneal_strategy="cos"` is "cosine" here.
    """

    peak: float
    steps: int
    warmup: float = 0.3
    div: float = 25.0
    final_div: float = 1e4
    shape: str = "cosine"
    three_phase: bool = False

    def __post_init__(self) -> None:
        _check_integer(self, "steps")
        _check_shape(self, "shape")
        if self.three_phase:
            _refuse_unless(0 <= self.warmup < 0.5, self, "warmup", "in [0, 1/2) with three phases")
        _refuse_unless(0 <= self.warmup < 1, self, "warmup", "in [0, 1)")
        _refuse_unless(self.div > 0, self, "div", "above 0")
        _refuse_unless(self.final_div > 0, self, "final_div", "above 0")

    def momentum(self, low: float = 0.85, high: float = 0.95) -> "OneCycle":
        """From `high` to `low`, where the rate has its peak, and back; the values are PyTorch's."""
        return replace(self, peak=low, div=low / high, final_div=1.0)

    def __call__(self, count: ArrayLike) -> Array:
        count = jnp.asarray(count)
        rise, init = self.warmup * self.steps, self.peak / self.div
        knots = [(0, init), (rise, self.peak), (2 * rise, init), (self.steps, init / self.final_div)]
        if not self.three_phase:
            del knots[2]
        value = jnp.full(count.shape, knots[-1][1], jnp.result_type(float))
        for (start, first), (stop, last) in reversed([*pairwise(knots)]):
            if start < stop:
                phase = _between(self.shape, first, last, _elapsed(count, stop, start))
                value = jnp.where(count < stop, phase, value)
        return value

    @property
    def _knots(self) -> tuple[int, ...]:
        peak = int(self.warmup * self.steps)
        return peak, peak + 1, 2 * peak, self.steps


# ---------------------------------------------------------------------------------------------------------------------
# Composition
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class WarmupStableDecay(Formula):
    """Linear from `init` to `peak` over `warmup` updates, then `peak`, then down to `end` in the last `decay` updates.

    Hu et al., "MiniCPM" (arXiv:2404.06395), section 4; Hägele et al. (arXiv:2405.18392), who find "1-sqrt" best, with
    10 to 20 % of the updates for the decay. `steps` includes all three phases. With p the fraction of the decay that
    is done, the value there is end + (peak − end) · f, where f is

        "linear"       1 − p                "square"        1 − p²
        "cosine"       ½(1 + cos πp)        "rex"           (1 − p) / (1 − p/2)
        "1-sqrt"       1 − √p

    and for "exponential", which needs an `end` above 0, it is peak · (end / peak)^p. The peak lasts from
    count = `warmup` to count = `steps` − `decay`, `end` is reached at count = `steps` exactly, and with `init` = 0 the
    first update has rate 0.

    transformers' `get_wsd_schedule` starts at `end`, which here is init=end, and decays along a cosine by default.
    """

    peak: float
    steps: int
    warmup: int
    decay: int
    init: float = 0.0
    end: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        _check_integer(self, "steps")
        _check_integer(self, "warmup", least=0)
        _check_integer(self, "decay")
        _check_shape(self, "shape", "exponential")
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"WarmupStableDecay: warmup and decay must not take more than all {self.steps} steps, "
                f"as {self.warmup} + {self.decay} do"
            )
        if self.shape == "exponential":
            _refuse_unless(self.end > 0, self, "end", "above 0 for an exponential decay")

    def __call__(self, count: ArrayLike) -> Array:
        start = self.steps - self.decay
        if self.shape == "exponential":
            since = jnp.maximum(jnp.asarray(count) - start, 0)
            fall = self.peak * _power(self.end / self.peak, jnp.minimum(since, self.decay), self.decay)
            fall = jnp.where(since < self.decay, fall, self.end)
        else:
            fall = _between(self.shape, self.peak, self.end, _elapsed(count, self.steps, start))
        if self.warmup == 0:
            return fall
        rise = _between("linear", self.init, self.peak, _elapsed(count, self.warmup))
        return jnp.where(jnp.asarray(count) < self.warmup, rise, fall)

    @property
    def _knots(self) -> tuple[int, ...]:
        return self.warmup, self.steps - self.decay, self.steps


@dataclass(frozen=True, repr=False)
class Warmup(Formula):
    """Linear from `init` to schedule(0) over `steps` updates, then schedule(count − steps).

    The peak is reached at count = `steps`; with `init` = 0 the first update (count 0) has rate 0. The steps of
    `schedule` are counted from the end of the warm-up: `Warmup(Cosine(1e-3, 900), 100)` ends at count 1000. A
    number in place of `schedule` is held after the warm-up.
    """

    schedule: Schedule | float
    steps: int
    init: float = 0.0

    def __post_init__(self) -> None:
        if callable(self.steps):
            raise TypeError(f"Warmup takes the schedule first: Warmup({self.steps!r}, {self.schedule!r})")
        _check_integer(self, "steps", least=0)

    def __call__(self, count: ArrayLike) -> Array:
        after = _schedule(self.schedule)
        if self.steps == 0:
            return jnp.asarray(after(count))
        count = jnp.asarray(count)
        peak = jnp.asarray(after(jnp.zeros_like(count)))
        ramp = _between("linear", self.init, peak, _elapsed(count, self.steps))
        return jnp.where(count < self.steps, ramp, after(jnp.maximum(count - self.steps, 0)))

    @property
    def _knots(self) -> tuple[int, ...]:
        behind = _knots_of(self.schedule) or (self.steps,)
        return self.steps, *(self.steps + knot for knot in behind)


@dataclass(frozen=True, repr=False)
class Join(Formula):
    """One schedule after another: `schedules[i]` runs from `boundaries[i-1]` on and counts from there.

    `Join((a, b), (100,))` is a(count) for count < 100 and b(count − 100) from 100 on.
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"Join: {len(self.schedules)} schedules have {len(self.schedules) - 1} boundaries between them, "
                f"not {len(self.boundaries)}"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"Join: boundaries must increase, not {self.boundaries}")

    def __call__(self, count: ArrayLike) -> Array:
        count = jnp.asarray(count)
        value = jnp.asarray(self.schedules[0](count))
        for start, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            value = jnp.where(count < start, value, schedule(jnp.maximum(count - start, 0)))
        return value

    @property
    def _knots(self) -> tuple[int, ...]:
        starts = (0, *self.boundaries)
        knots = [count for start in self.boundaries for count in (start - 1, start)]
        for start, stop, schedule in zip(starts, (*self.boundaries, math.inf), self.schedules, strict=True):
            knots += [start + knot for knot in _knots_of(schedule) if start + knot < stop]
        # What stays as it is takes a quarter of what was before.
        return (*knots, starts[-1] + starts[-1] // 4) if not _knots_of(self.schedules[-1]) else tuple(knots)
