"""One row per rule: how it is made, what it is held against, and what is particular about it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import reference as ref

import jaxopt_rules as jr


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], jr.Rule]
    reference: Callable[[], ref.Reference]
    live: str  # the hyperparameter that the laws about live values change
    rate: float | None = None  # of a rule that gives updates; None: it gives gradients or directions
    leafwise: bool = True


def each(make: Callable[..., ref.Reference], *args, **kwargs) -> Callable[[], ref.Reference]:
    return partial(ref.each, partial(make, *args, **kwargs))


def chained(*makes: Callable[[], ref.Reference]) -> Callable[[], ref.Reference]:
    return lambda: ref.chain(*(make() for make in makes))


def warmup_cosine(count: int) -> float:
    """Up to 0.01 over 5 updates, then half a cosine down to 0 over 40."""
    return 0.01 * count / 5 if count < 5 else 0.005 * (1 + math.cos(math.pi * min(count - 5, 40) / 40))


WARMUP_COSINE = jr.Warmup(jr.Cosine(0.01, 40), 5)
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

ROWS = [
    Row("weight_decay", lambda: jr.weight_decay(0.1), each(ref.weight_decay, 0.1), "weight_decay"),
    Row("clip", lambda: jr.clip_by_global_norm(2.0), partial(ref.clip, 2.0), "max_norm", leafwise=False),
    Row("step", lambda: jr.step(0.1), each(ref.step, 0.1), "learning_rate", 0.1),
    Row("step_decay", lambda: jr.step(0.1, 0.5), each(ref.step, 0.1, 0.5), "weight_decay", 0.1),
    Row("velocity", lambda: jr.momentum_direction(0.9), each(ref.velocity, 0.9), "momentum"),
    Row("nesterov", lambda: jr.momentum_direction(0.9, True), each(ref.velocity, 0.9, True), "momentum"),
    Row("adam_direction", lambda: jr.adam_direction(), each(ref.adam_direction, **ADAM), "b1"),
    Row(
        "adam_direction_step",
        lambda: jr.adam_direction(b2=0.9999, bias_correction="step"),
        each(ref.adam_direction, 0.9, 0.9999, 1e-8, "step"),
        "b2",
    ),
    Row("sgd", lambda: jr.sgd(0.1), each(ref.step, 0.1), "learning_rate", 0.1),
    Row(
        "sgd_nesterov",
        lambda: jr.sgd(WARMUP_COSINE, momentum=0.9, nesterov=True),
        chained(each(ref.velocity, 0.9, True), each(ref.step, warmup_cosine)),
        "momentum",
        0.01,
    ),
    Row("momentum", lambda: jr.momentum(0.1), each(ref.momentum, 0.1, 0.9), "learning_rate", 0.1),
    Row(
        "momentum_warmup",
        lambda: jr.momentum(WARMUP_COSINE, momentum=0.5),
        each(ref.momentum, warmup_cosine, 0.5),
        "momentum",
        0.01,
    ),
    Row(
        "adam",
        lambda: jr.adam(0.1),
        chained(each(ref.adam_direction, **ADAM), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
    ),
    Row(
        "adam_step",
        lambda: jr.adam(0.1, bias_correction="step"),
        chained(each(ref.adam_direction, **ADAM, bias_correction="step"), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
    ),
    Row(
        "adamw_warmup",
        lambda: jr.adamw(WARMUP_COSINE, b1=0.95, weight_decay=0.1),
        chained(each(ref.adam_direction, 0.95, 0.999, 1e-8), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
    ),
    Row(
        "adamw_step",
        lambda: jr.adamw(0.1, weight_decay=0.3, bias_correction="step"),
        each(ref.adamw_step, 0.1, 0.9, 0.999, 1e-8, 0.3),
        "learning_rate",
        0.1,
    ),
    Row(
        "clip_decay_adamw",
        lambda: jr.chain(jr.clip_by_global_norm(2.0), jr.weight_decay(0.01), jr.adamw(0.1, weight_decay=0.1)),
        chained(
            partial(ref.clip, 2.0),
            each(ref.weight_decay, 0.01),
            each(ref.adam_direction, **ADAM),
            each(ref.step, 0.1, 0.1),
        ),
        "learning_rate",
        0.1,
        leafwise=False,
    ),
    Row(
        "named_chain",
        lambda: jr.chain(decay=jr.weight_decay(0.1), velocity=jr.momentum_direction(0.9), step=jr.step(0.1)),
        chained(each(ref.weight_decay, 0.1), each(ref.velocity, 0.9), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
    ),
]
