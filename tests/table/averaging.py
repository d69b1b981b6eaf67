"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""

import jax
import jax.numpy as jnp
from reference import averaging as papers
from reference import core as ref

import jaxopt_rules as jr
from jaxopt_rules.numerics import abs2, is_inexact
from table.row import ADAM, WARMUP_COSINE, Row, chained, each, warmup_cosine


def ramp(count: int) -> float:
    return min(count + 1, 4) / 4


def warmup_100(count: int) -> float:
    return 100 * warmup_cosine(count)


def rising_b1(count):
    return 0.9 - 0.6 / (count + 1)


def cubes(params):
    """The gradients of Σ |θ|⁴ / 4."""
    return jax.tree.map(lambda p: abs2(p) * p if is_inexact(p) else None, params)


def fourth_powers(params):
    return sum(jnp.sum(abs2(p) ** 2) for p in jax.tree.leaves(params) if is_inexact(p)) / 4


def cubes_of(params: dict) -> dict:
    return {key: p * p.conj() * p for key, p in params.items()}


def around(inner, *args, **kwargs):
    return each(lambda: papers.schedule_free(inner(), *args, **kwargs))


def sharp(*args, **kwargs):
    inner = chained(each(ref.velocity, 0.9), each(ref.step, 0.1))
    return lambda: papers.sam(inner(), cubes_of, *args, **kwargs)


# z is a float32 copy of the parameters, of which an update is a difference: like that of `lookahead`, it is exact to a
# rounding of the parameters, and so the rates are 1, as large as these.
ROWS = [
    Row(
        "schedule_free",
        lambda: jr.schedule_free(jr.adamw(WARMUP_COSINE * 100, weight_decay=0.1), None, 0.95, 1.0, r=0.5),
        around(
            chained(lambda: ref.adam_direction(**ADAM), lambda: ref.step(warmup_100, 0.1)),
            warmup_100, 0.95, 1.0, 0.5,
        ),
        "schedule_free.b1",
        1.0,
    ),
    Row(
        "schedule_free_b1",
        lambda: jr.schedule_free(jr.sgd(0.1), WARMUP_COSINE, rising_b1),
        around(lambda: ref.step(0.1), warmup_cosine, rising_b1),
        None,
        0.1,
        laws=False,
    ),
    Row(
        "schedule_free_sgd",
        lambda: jr.schedule_free_sgd(1.0, 4, weight_decay=0.3),
        around(lambda: ref.step(ramp, 0.3), ramp, 0.9),
        "weight_decay",
        1.0,
        thorough=True,
    ),
    Row(
        "schedule_free_adamw",
        lambda: jr.schedule_free_adamw(0.1, b1=0.95, b2=0.99, weight_decay=0.3),
        around(chained(lambda: papers.over_second_moment(0.99, 1e-8), lambda: ref.step(0.1, 0.3)), 0.1, 0.95),
        "learning_rate",
        0.1,
    ),
    Row(
        "schedule_free_adamw_warmup",
        lambda: jr.schedule_free_adamw(1.0, 4, r=1.0, weight_lr_power=0.0, decay="l2", weight_decay=0.3),
        around(
            chained(
                lambda: ref.weight_decay(0.3), lambda: papers.over_second_moment(0.999, 1e-8), lambda: ref.step(ramp)
            ),
            ramp, 0.9, 0.0, 1.0,
        ),
        None,
        1.0,
        laws=False,
    ),
    Row(
        "sam",
        lambda: jr.sam(jr.sgd(0.1, 0.9), 0.5),
        sharp(0.5),
        "rho",
        0.1,
        leafwise=False,
        extra={"value_fn": fourth_powers},
        aligned=False,
    ),
    Row(
        "asam",
        lambda: jr.sam(jr.sgd(0.1, 0.9), WARMUP_COSINE * 100, adaptive=True),
        sharp(warmup_100, adaptive=True),
        "learning_rate",
        0.1,
        leafwise=False,
        extra={"grad_fn": cubes},
        aligned=False,
thorough=True,),
]  # fmt: skip
