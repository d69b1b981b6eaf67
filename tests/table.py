"""One row per rule: how it is made, what it is held against, and what is particular about it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference as ref

import jaxopt_rules as jr


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], jr.Rule]
    reference: Callable[[], ref.Reference]
    live: str | None  # the hyperparameter that the laws about live values change
    rate: float | None = None  # of a rule that gives updates; None: it gives gradients or directions
    leafwise: bool = True
    every: int = 1  # the rule inside acts in every k-th call
    extra: Mapping[str, Any] = field(default_factory=dict)  # passed to all calls
    aligned: bool = True  # whether updates follow the gradient so closely that law 1 holds


def each(make: Callable[..., ref.Reference], *args, **kwargs) -> Callable[[], ref.Reference]:
    return partial(ref.each, partial(make, *args, **kwargs))


def pointwise(formula: Callable, *values) -> Callable[[], ref.Reference]:
    return each(ref.pointwise, formula, *values)


def tanh(grads):
    return jax.tree.map(jnp.tanh, grads)


def by_axes(path, p) -> int:
    return p.ndim


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
    Row("clip_by_leaf_norm", lambda: jr.clip_by_leaf_norm(0.5), pointwise(ref.clip_by_leaf_norm, 0.5), "max_norm"),
    Row("clip_by_block_rms", lambda: jr.clip_by_block_rms(0.5), pointwise(ref.clip_by_block_rms, 0.5), "threshold"),
    Row("clip_by_value", lambda: jr.clip_by_value(0.5), pointwise(ref.clip_by_value, 0.5), "max_value"),
    Row(
        "adaptive_grad_clip",
        lambda: jr.adaptive_grad_clip(0.1, eps=0.5),
        pointwise(ref.adaptive_grad_clip, 0.1, 0.5),
        "clipping",
    ),
    Row("ema", lambda: jr.ema(0.9), each(ref.ema, 0.9, True), "decay"),
    Row("ema_biased", lambda: jr.ema(0.9, debias=False), each(ref.ema, 0.9, False), "decay"),
    Row("grokfast", lambda: jr.grokfast(0.9, 3.0), each(ref.grokfast, 0.9, 3.0), "factor"),
    Row("scale", lambda: jr.scale(0.3), pointwise(lambda g, p, factor: factor * g, 0.3), "factor"),
    Row("trust_ratio", lambda: jr.trust_ratio(0.1), pointwise(ref.trust_ratio, 0.1, 0, 0, math.inf), "coefficient"),
    Row(
        "trust_ratio_bounded",
        lambda: jr.trust_ratio(eps=0.1, min_norm=0.5, max_ratio=1.5),
        pointwise(ref.trust_ratio, 1, 0.1, 0.5, 1.5),
        "eps",
    ),
    Row("scale_by_leaf_rms", lambda: jr.scale_by_leaf_rms(0.9), pointwise(ref.scale_by_leaf_rms, 0.9), "min_rms"),
    Row("normalize", lambda: jr.normalize(0.1), partial(ref.normalize, 0.1), "eps", leafwise=False),
    Row(
        "scale_by_path",
        lambda: jr.scale_by_path({"*": 0.3}),
        pointwise(lambda g, p, factor: factor * g, 0.3),
        "factor[*]",
    ),
    Row(
        "layerwise_decay",
        lambda: jr.layerwise_decay(0.7, by_axes, 5),
        partial(ref.layerwise_decay, 0.7, by_axes, 5),
        "layer_decay",
    ),
    Row("step", lambda: jr.step(0.1), each(ref.step, 0.1), "learning_rate", 0.1),
    Row("step_decay", lambda: jr.step(0.1, 0.5), each(ref.step, 0.1, 0.5), "weight_decay", 0.1),
    Row(
        "step_independent",
        lambda: jr.step(WARMUP_COSINE, 0.05, decay="independent", peak=0.01),
        each(ref.step, warmup_cosine, 0.05, "independent", 0.01),
        "weight_decay",
        0.01,
    ),
    Row(
        "step_corrected",
        lambda: jr.step(0.1, 0.5, decay="corrected", peak=0.2),
        each(ref.step, 0.1, 0.5, "corrected", 0.2),
        "learning_rate",
        0.1,
    ),
    Row(
        "step_cautious",
        lambda: jr.step(0.1, 0.5, decay="cautious"),
        each(ref.step, 0.1, 0.5, "cautious"),
        "weight_decay",
        0.1,
    ),
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
        "adamw_corrected",
        lambda: jr.adamw(0.1, weight_decay=0.3, decay="corrected"),
        chained(each(ref.adam_direction, **ADAM), each(ref.step, 0.1, 0.3, "corrected", 0.1)),
        "peak",
        0.1,
    ),
    Row(
        "adamw_cautious",
        lambda: jr.adamw(WARMUP_COSINE, weight_decay=0.3, decay="cautious"),
        chained(each(ref.adam_direction, **ADAM), each(ref.step, warmup_cosine, 0.3, "cautious")),
        "weight_decay",
        0.01,
    ),
    Row(
        "adamw_l2",
        lambda: jr.adamw(0.1, weight_decay=0.3, decay="l2"),
        chained(each(ref.weight_decay, 0.3), each(ref.adam_direction, **ADAM), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
    ),
    Row(
        "lamb",
        lambda: jr.chain(jr.adam_direction(eps=1e-6), jr.weight_decay(0.1), jr.trust_ratio(), jr.step(0.1)),
        chained(
            each(ref.adam_direction, 0.9, 0.999, 1e-6),
            each(ref.weight_decay, 0.1),
            pointwise(ref.trust_ratio, 1, 0, 0, math.inf),
            each(ref.step, 0.1),
        ),
        "learning_rate",
        0.1,
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
    Row("centralize", lambda: jr.centralize(), pointwise(ref.centralize), None),
    Row("zero_nonfinite", lambda: jr.zero_nonfinite(), pointwise(lambda g, p: g), None),
    Row("set_to_zero", lambda: jr.set_to_zero(), pointwise(lambda g, p: 0 * g), None, aligned=False),
    Row("sign", lambda: jr.sign(), pointwise(lambda g, p: np.sign(g)), None),
    Row(
        "stateless",
        lambda: jr.stateless(tanh),
        pointwise(lambda g, p: np.tanh(g)),
        None,
        leafwise=False,
    ),
    Row("add_noise", lambda: jr.add_noise(0.0), pointwise(lambda g, p: g), "gamma"),
    Row(
        "step_initial",
        lambda: jr.step(0.1, 0.5, decay="initial"),
        each(ref.step, 0.1, 0.5, "initial"),
        "weight_decay",
        0.1,
    ),
]


def by_matrix(path, p) -> str:
    return "matrix" if p.ndim == 2 else "rest"


def is_matrix(path, p) -> bool:
    return p.ndim == 2


def is_vector(path, p) -> bool:
    return p.ndim == 1


def third(count):
    return count % 3 == 2


def odd(count):
    return count % 2 == 1


def in_unit_box(x):
    return x.clip(-1, 1)


ADAMW_REFERENCE = chained(each(ref.adam_direction, **ADAM), each(ref.step, 0.1, 0.1))
VELOCITY_REFERENCE = chained(each(ref.velocity, 0.9), each(ref.step, 0.1))
GROUPS = {"matrix": VELOCITY_REFERENCE, "rest": ADAMW_REFERENCE}


def adamw() -> jr.Rule:
    return jr.adamw(0.1, weight_decay=0.1)


def groups() -> ref.Reference:
    return ref.partition({name: make() for name, make in GROUPS.items()}, by_matrix)


# Rules around rules.
WRAPPERS = [
    Row(
        "accumulate",
        lambda: jr.accumulate(adamw(), 3),
        lambda: ref.accumulate(ADAMW_REFERENCE(), 3),
        "learning_rate",
        0.1,
        leafwise=False,
        every=3,
    ),
    Row(
        "accumulate_sum",
        lambda: jr.accumulate(jr.sgd(0.1, 0.9), 3, reduce="sum", nonfinite="keep"),
        lambda: ref.accumulate(VELOCITY_REFERENCE(), 3, np.sum),
        "learning_rate",
        0.1,
        every=3,
    ),
    Row("skip_nonfinite", lambda: jr.skip_nonfinite(adamw()), ADAMW_REFERENCE, "weight_decay", 0.1, leafwise=False),
    Row(
        "skip_spikes",
        lambda: jr.skip_spikes(adamw(), 8, 2.0),
        lambda: ref.skip_spikes(ADAMW_REFERENCE(), 8, 2.0),
        "learning_rate",
        0.1,
        leafwise=False,
    ),
    Row(
        "when",
        lambda: jr.when(adamw(), third),
        lambda: ref.when(ADAMW_REFERENCE(), third),
        "learning_rate",
        0.1,
        every=3,
    ),
    Row(
        "when_clip",
        lambda: jr.when(jr.clip_by_global_norm(2.0), odd),
        lambda: ref.when(ref.clip(2.0), odd, lambda g: g),
        "max_norm",
        leafwise=False,
        every=2,
    ),
    Row(
        "lookahead",
        lambda: jr.lookahead(jr.sgd(1.0), 3, 0.8),
        lambda: ref.lookahead(each(ref.step, 1.0)(), 3, 0.8),
        "alpha",
        1.0,
        aligned=False,
    ),
    Row("average_ema", lambda: jr.average(adamw(), 0.9), ADAMW_REFERENCE, "learning_rate", 0.1),
    Row("average_swa", lambda: jr.average(adamw(), None, start=2), ADAMW_REFERENCE, "learning_rate", 0.1),
    Row("average_lawa", lambda: jr.average(adamw(), window=3, every=2), ADAMW_REFERENCE, "learning_rate", 0.1),
    Row(
        "plateau",
        lambda: jr.chain(jr.sgd(0.1), jr.reduce_on_plateau(0.5, 1, min_scale=0.1)),
        chained(each(ref.step, 0.1), partial(ref.plateau, 0.5, 1, 0.1)),
        "learning_rate",
        0.1,
        extra={"value": 1.0},
    ),
    Row(
        "record",
        lambda: jr.chain(jr.record("norm", jr.global_norm), jr.sgd(0.1)),
        each(ref.step, 0.1),
        "learning_rate",
        0.1,
        leafwise=False,
    ),
    Row(
        "project",
        lambda: jr.chain(jr.sgd(0.1), jr.project(in_unit_box)),
        chained(each(ref.step, 0.1), pointwise(lambda u, p: in_unit_box(p + u) - p)),
        "learning_rate",
        0.1,
        aligned=False,
    ),
    Row(
        "cautious",
        lambda: jr.cautious(jr.adam_direction()),
        partial(ref.each, lambda: ref.cautious(ref.adam_direction(**ADAM))),
        "b1",
    ),
    Row("partition", lambda: jr.partition({"matrix": jr.sgd(0.1, 0.9), "rest": adamw()}, by_matrix), groups, None, 0.1),
    Row(
        "masked",
        lambda: jr.masked(jr.weight_decay(0.1), is_matrix),
        lambda: ref.partition(
            {"matrix": each(ref.weight_decay, 0.1)()}, lambda path, p: "matrix" if p.ndim == 2 else "passes"
        ),
        "weight_decay",
    ),
    Row(
        "freeze",
        lambda: jr.freeze(adamw(), is_vector),
        lambda: ref.partition({"rest": ADAMW_REFERENCE()}, lambda path, p: None if p.ndim == 1 else "rest"),
        "learning_rate",
        0.1,
    ),
    Row(
        "nested",
        lambda: jr.skip_nonfinite(
            jr.accumulate(
                jr.average(
                    jr.lookahead(jr.partition({"matrix": jr.sgd(1.0), "rest": jr.sgd(1.0, 0.9)}, by_matrix), 1, 0.8)
                ),
                2,
            )
        ),
        lambda: ref.accumulate(
            ref.lookahead(
                ref.partition(
                    {
                        "matrix": each(ref.step, 1.0)(),
                        "rest": chained(each(ref.velocity, 0.9), each(ref.step, 1.0))(),
                    },
                    by_matrix,
                ),
                1,
                0.8,
            ),
            2,
        ),
        "alpha",
        1.0,
        leafwise=False,
        aligned=False,
        every=2,
    ),
]

ROWS += WRAPPERS
