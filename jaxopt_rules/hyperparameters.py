"""Hyperparameters: which values are legal, how a state stores them, and how a schedule marks its own.

A state holds every numeric hyperparameter as a strong-typed scalar in the widest float that was enabled when
`init` ran. Of a decay rate β it holds 1 − β alone, under the name `one_minus_β`, since float32 cannot hold β near 1:
there 1 − 0.9999 is off by 2e-4.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

COMPLEMENT = "one_minus_"

# Of a hyperparameter in a state: the names or positions that lead to its rule's part of it, and its name there.
Address = tuple[tuple[str | int, ...], str]


class Scheduled(NamedTuple):
    """Stands in a state for a hyperparameter that a schedule owns."""

    value: Array  # ()  the value last used; at birth, the schedule's value for count 0


class _Domain(NamedTuple):
    contains: Callable[[np.ndarray], np.ndarray]  # elementwise
    text: str


_NOT_NEGATIVE = _Domain(lambda x: x >= 0, "must be at least 0")
_POSITIVE = _Domain(lambda x: x > 0, "must be greater than 0")
_DECAY_RATE = _Domain(lambda x: (x >= 0) & (x < 1), "must lie in [0, 1)")
_FRACTION = _Domain(lambda x: (x > 0) & (x < 1), "must lie between 0 and 1")
_AT_LEAST_ONE = _Domain(lambda x: x >= 1, "must be at least 1")
_COUNT = _Domain(lambda x: (x >= 1) & (x == np.floor(x)), "must be a whole number, at least 1")
_ANY = _Domain(lambda x: ~np.isnan(x), "must be a number")

_DOMAINS = {
    "learning_rate": _NOT_NEGATIVE,
    "max_norm": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "eps_root": _NOT_NEGATIVE,
    "momentum_decay": _NOT_NEGATIVE,
    "every": _COUNT,
    "sigmas": _NOT_NEGATIVE,
    "layer_decay": _NOT_NEGATIVE,
    "max_value": _NOT_NEGATIVE,
    "max_ratio": _NOT_NEGATIVE,
    "min_norm": _NOT_NEGATIVE,
    "min_rms": _NOT_NEGATIVE,
    "threshold": _NOT_NEGATIVE,
    "clipping": _NOT_NEGATIVE,
    "clipping_threshold": _NOT_NEGATIVE,
    "decay_rate": _NOT_NEGATIVE,
    "eta": _NOT_NEGATIVE,
    "peak": _POSITIVE,
    "warmup": _COUNT,
    "max_learning_rate": _NOT_NEGATIVE,
    "scaling": _NOT_NEGATIVE,
    "tol": _NOT_NEGATIVE,
    "min_curvature": _NOT_NEGATIVE,
    "slope_rtol": _FRACTION,
    "curv_rtol": _FRACTION,
    "decrease_factor": _FRACTION,
    "increase_factor": _AT_LEAST_ONE,
    "trust_coefficient": _NOT_NEGATIVE,
    "eta_minus": _NOT_NEGATIVE,
    "eta_plus": _NOT_NEGATIVE,
    "initial_accumulator_value": _NOT_NEGATIVE,
    "initial_scale": _NOT_NEGATIVE,
    "lr_decay": _NOT_NEGATIVE,
    "max_step_size": _NOT_NEGATIVE,
    "min_step_size": _NOT_NEGATIVE,
    "d0": _POSITIVE,
    "d_coef": _POSITIVE,
    "growth_rate": _POSITIVE,
    "reps_rel": _POSITIVE,
    "init_eta": _POSITIVE,
    "rho": _NOT_NEGATIVE,
    "weight_lr_power": _NOT_NEGATIVE,
}


def check(stored_name: str, value: Any, shape: tuple[int, ...] = ()) -> None:
    """Refuses a value that this hyperparameter cannot take. Schedules and traced values pass unseen.

    What a state keeps as `one_minus_...` is a decay rate, in [0, 1), whatever its name.

    Raises:
      TypeError: the value is not a real number.
      ValueError: it is not of this shape, is NaN, or lies outside its domain.
    """
    if callable(value):
        return
    name = public_name(stored_name)
    real_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    real_array = isinstance(value, jax.Array | np.ndarray) and (
        jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    )
    if not (real_number or real_array):
        raise TypeError(f"{name} must be a number or a schedule (a function of count), not {value!r}")
    if jnp.shape(value) != shape:
        wanted = f"has shape {shape} in this state, not" if shape else "must be a scalar, not an array of shape"
        raise ValueError(f"{name} {wanted} {jnp.shape(value)}")
    if isinstance(value, Tracer):
        return
    domain = _DECAY_RATE if stored_name.startswith(COMPLEMENT) else _DOMAINS.get(name, _ANY)
    if not np.all(domain.contains(np.asarray(value, np.float64))):
        raise ValueError(f"{name} {domain.text}, not {value}")


def complement(value: Any) -> Any:
    """1 − value; in double where the value is a Python number or of NumPy."""
    if isinstance(value, int | float | np.generic | np.ndarray):
        return 1.0 - np.asarray(value, np.float64)
    return 1 - jnp.asarray(value, jnp.result_type(float))


def encode(stored_name: str, value: Any) -> Any:
    """The number that the state keeps under `stored_name` for a hyperparameter of this value."""
    return complement(value) if stored_name.startswith(COMPLEMENT) else value


def scheduled(stored_name: str, schedule: Callable[[Any], Any], count: Array) -> Array:
    """What a schedule makes of the hyperparameter that is stored under this name.

    Raises:
      ValueError: it gives no scalar; or, where nothing is traced, one outside the hyperparameter's domain.
    """
    value = schedule(count)
    check(stored_name, value)
    # A copy: the state shares no buffer with what the schedule may hold.
    return jnp.array(encode(stored_name, value), jnp.result_type(float))


def decimal(stored_name: str, stored: Any) -> float:
    """The public value of a scalar, with the fewest digits that its precision tells apart: 0.9 where 0.1 is stored.

    In float32, 1 − 0.1 is 0.89999998.
    """
    text = str(np.asarray(stored))
    return float(1 - Decimal(text) if stored_name.startswith(COMPLEMENT) else text)


def public_name(stored_name: str) -> str:
    """`b1` for `one_minus_b1`; any other name itself."""
    return stored_name.removeprefix(COMPLEMENT)
