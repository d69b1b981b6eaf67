"""Hooks, directions, terminals, and the rules that are documented."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from reference import core as ref

import jaxopt_rules as jr
from table.row import ADAM, WARMUP_COSINE, Row, chained, each, pointwise, warmup_cosine


def tanh(grads):
    return jax.tree.map(jnp.tanh, grads)


def by_axes(path, p) -> int:
    return p.ndim


ROWS = [
    Row("weight_decay", lambda: jr.weight_decay(0.1), each(ref.weight_decay, 0.1), "weight_decay"),
    Row("clip", lambda: jr.clip_by_global_norm(2.0), partial(ref.clip, 2.0), "max_norm", leafwise=False),
    Row("clip_by_leaf_norm", lambda: jr.clip_by_leaf_norm(0.5), pointwise(ref.clip_by_leaf_norm, 0.5), "max_norm"),
    Row(
        "clip_by_block_rms",
        lambda: jr.clip_by_block_rms(0.5),
        pointwise(ref.clip_by_block_rms, 0.5),
        "threshold",
        thorough=True,
    ),
    Row(
        "clip_by_value",
        lambda: jr.clip_by_value(0.5),
        pointwise(ref.clip_by_value, 0.5),
        "max_value",
        complex=False,
    ),
    Row(
        "adaptive_grad_clip",
        lambda: jr.adaptive_grad_clip(0.1, eps=0.5),
        pointwise(ref.adaptive_grad_clip, 0.1, 0.5),
        "clipping",
    ),
    Row("ema", lambda: jr.ema(0.9), each(ref.ema, 0.9, True), "decay"),
    Row(
        "ema_biased",
        lambda: jr.ema(0.9, debias=False),
        each(ref.ema, 0.9, False),
        "decay",
        thorough=True,
    ),
    Row("grokfast", lambda: jr.grokfast(0.9, 3.0), each(ref.grokfast, 0.9, 3.0), "factor", thorough=True),
    Row("scale", lambda: jr.scale(0.3), pointwise(lambda g, p, factor: factor * g, 0.3), "factor", thorough=True),
    Row("trust_ratio", lambda: jr.trust_ratio(0.1), pointwise(ref.trust_ratio, 0.1, 0, 0, math.inf), "coefficient"),
    Row(
        "trust_ratio_bounded",
        lambda: jr.trust_ratio(eps=0.1, min_norm=0.5, max_ratio=1.5),
        pointwise(ref.trust_ratio, 1, 0.1, 0.5, 1.5),
        "eps",
        thorough=True,
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
        thorough=True,
    ),
    Row(
        "step_corrected",
        lambda: jr.step(0.1, 0.5, decay="corrected", peak=0.2),
        each(ref.step, 0.1, 0.5, "corrected", 0.2),
        "learning_rate",
        0.1,
        thorough=True,
    ),
    Row(
        "step_cautious",
        lambda: jr.step(0.1, 0.5, decay="cautious"),
        each(ref.step, 0.1, 0.5, "cautious"),
        "weight_decay",
        0.1,
    ),
    Row(
        "step_proximal",
        lambda: jr.step(0.1, 0.5, decay="proximal"),
        each(ref.step, 0.1, 0.5, "proximal"),
        "weight_decay",
        0.1,
        thorough=True,
    ),
    Row(
        "descend_l2",
        lambda: jr.descend(jr.momentum_direction(0.9), 0.1, 0.5, decay="l2"),
        chained(each(ref.weight_decay, 0.5), each(ref.velocity, 0.9), each(ref.step, 0.1)),
        "weight_decay",
        0.1,
    ),
    Row(
        "velocity",
        lambda: jr.momentum_direction(0.9),
        each(ref.velocity, 0.9),
        "momentum",
        thorough=True,
    ),
    Row("nesterov", lambda: jr.momentum_direction(0.9, True), each(ref.velocity, 0.9, True), "momentum", thorough=True),
    Row("adam_direction", lambda: jr.adam_direction(), each(ref.adam_direction, **ADAM), "b1"),
    Row(
        "adam_direction_step",
        lambda: jr.adam_direction(b2=0.9999, bias_correction="step"),
        each(ref.adam_direction, 0.9, 0.9999, 1e-8, "step"),
        "b2",
        thorough=True,
    ),
    Row(
        "sgd",
        lambda: jr.sgd(0.1),
        each(ref.step, 0.1),
        "learning_rate",
        0.1,
        thorough=True,
    ),
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
        thorough=True,
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
        thorough=True,
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
        thorough=True,
    ),
    Row(
        "adamw_cautious",
        lambda: jr.adamw(WARMUP_COSINE, weight_decay=0.3, decay="cautious"),
        chained(each(ref.adam_direction, **ADAM), each(ref.step, warmup_cosine, 0.3, "cautious")),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row(
        "adamw_l2",
        lambda: jr.adamw(0.1, weight_decay=0.3, decay="l2"),
        chained(each(ref.weight_decay, 0.3), each(ref.adam_direction, **ADAM), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
        thorough=True,
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
        thorough=True,
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
        thorough=True,
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
    Row(
        "add_noise",
        lambda: jr.add_noise(0.0),
        pointwise(lambda g, p: g),
        "gamma",
        thorough=True,
    ),
    Row(
        "step_initial",
        lambda: jr.step(0.1, 0.5, decay="initial"),
        each(ref.step, 0.1, 0.5, "initial"),
        "weight_decay",
        0.1,
    ),
]
