"""Schedules: a hyperparameter as a function of `count`, the number of finished updates.

Any callable of `count` is a schedule. Those here are frozen dataclasses, so they print, compare, hash and pickle,
and rules that hold them do too. `count` may be an integer or an array of integers; the first update sees 0. All
of them compute in the widest float that is enabled. Where a schedule runs `steps` updates, it starts at `init`
(count 0), reaches `end` at count = `steps` exactly, and stays there.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Schedule = Callable[[Any], ArrayLike]


def _elapsed(count: ArrayLike, steps: int) -> tuple[Array, Array]:
    """The fractions of `steps` done and left, each from integers, so that neither loses digits near 0."""
    done = jnp.clip(jnp.asarray(count), 0, steps)
    as_float = jnp.result_type(float)
    return done.astype(as_float) / steps, (steps - done).astype(as_float) / steps


def _check_steps(owner: object, steps: int, least: int = 1) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < least:
        raise ValueError(f"{type(owner).__name__}: steps must be an integer >= {least}, not {steps!r}")


class _Printed:
    """Prints as it would be written: defaults are left out."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if field.default is MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Constant(_Printed):
    """value(count) = value."""

    value: float

    def __call__(self, count: ArrayLike) -> Array:
        return jnp.full(jnp.shape(count), self.value, jnp.result_type(float))


@dataclass(frozen=True, repr=False)
class Linear(_Printed):
    """value(count) = init + (end − init) · min(count / steps, 1)."""

    init: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, count: ArrayLike) -> Array:
        done, left = _elapsed(count, self.steps)
        return self.init * left + self.end * done


@dataclass(frozen=True, repr=False)
class Cosine(_Printed):
    """value(count) = end + (init − end) · ½(1 + cos(π · min(count / steps, 1))).

    Loshchilov & Hutter, "SGDR" (arXiv:1608.03983), equation 5, without restarts. Computed as sin² of the part
    that is left, so that the last steps before `end` = 0 keep their digits.
    """

    init: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, count: ArrayLike) -> Array:
        done, left = _elapsed(count, self.steps)
        return self.init * jnp.sin(jnp.pi / 2 * left) ** 2 + self.end * jnp.sin(jnp.pi / 2 * done) ** 2


@dataclass(frozen=True, repr=False)
class Warmup(_Printed):
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
        _check_steps(self, self.steps, least=0)

    def __call__(self, count: ArrayLike) -> Array:
        after = self.schedule if callable(self.schedule) else Constant(self.schedule)
        if self.steps == 0:
            return jnp.asarray(after(count))
        count = jnp.asarray(count)
        done, left = _elapsed(count, self.steps)
        ramp = self.init * left + jnp.asarray(after(jnp.zeros_like(count))) * done
        return jnp.where(count < self.steps, ramp, after(jnp.maximum(count - self.steps, 0)))


@dataclass(frozen=True, repr=False)
class Join(_Printed):
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
