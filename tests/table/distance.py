"""Rules that find their learning rate: Prodigy, DoG."""

from functools import partial

from reference import core as ref
from reference import distance as papers

import jaxopt_rules as jr
from table.row import WARMUP_COSINE, Row, chained, each, warmup_cosine


def by_axes(path, p) -> bool:
    return p.ndim > 1


def matrices(key: str) -> bool:
    """What `by_axes` selects among the arrays of the reference tests."""
    return key in ("matrix", "cube4", "empty")


ROWS: list[Row] = [
    Row(
        "prodigy",
        lambda: jr.prodigy(d0=0.01),
        partial(papers.prodigy, 1.0, d0=0.01),
        "d0",
        0.01,
        leafwise=False,
        laws=False,
        single=5e-6,  # gradients of changing sign leave a small part of the terms of N, and all of their roundings
    ),
    Row(
        "prodigy_warmup",
        lambda: jr.prodigy(WARMUP_COSINE, 0.8, 0.99, d0=1.0, use_bias_correction=True, weight_decay=0.3, where=by_axes),
        partial(
            papers.prodigy,
            warmup_cosine,
            0.8,
            0.99,
            d0=1.0,
            use_bias_correction=True,
            weight_decay=0.3,
            decays=matrices,
        ),
        "d0",
        0.01,
        leafwise=False,
    ),
    Row(
        "prodigy_l2",
        lambda: jr.prodigy(
            0.5,
            b3=0.9,
            eps=1e-4,
            d0=0.01,
            d_coef=0.5,
            safeguard_warmup=True,
            weight_decay=0.1,
            where=by_axes,
            decay="l2",
        ),
        partial(
            papers.prodigy,
            0.5,
            b3=0.9,
            eps=1e-4,
            d0=0.01,
            d_coef=0.5,
            safeguard_warmup=True,
            weight_decay=0.1,
            decays=matrices,
            l2=True,
        ),
        "learning_rate",
        0.01,
        leafwise=False,
        laws=False,
    ),
    Row(
        "prodigy_slice",
        lambda: jr.prodigy(d0=0.01, growth_rate=1.25, slice_p=3),
        partial(papers.prodigy, 1.0, d0=0.01, growth_rate=1.25, slice_p=3),
        "learning_rate",
        0.01,
        leafwise=False,
        laws=False,
    ),
    # The rate keeps ‖θ − θ₀‖ below the first distance, so that the rounding of narrow parameters is not in the slope.
    Row(
        "dog",
        lambda: jr.dog(0.1, reps_rel=0.01),
        chained(partial(papers.dog_direction, reps_rel=0.01), each(ref.step, 0.1)),
        "reps_rel",
        0.1,
        leafwise=False,
    ),
    Row(
        "dog_warmup",
        lambda: jr.dog(WARMUP_COSINE, reps_rel=1.0, eps=0.1, weight_decay=0.3),
        chained(partial(papers.dog_direction, reps_rel=1.0, eps=0.1), each(ref.step, warmup_cosine, 0.3)),
        "weight_decay",
        0.01,
        leafwise=False,
        laws=False,
    ),
    Row(
        "dog_direction",
        lambda: jr.chain(jr.weight_decay(0.1), jr.dog_direction(init_eta=0.001), jr.step(0.5)),
        chained(each(ref.weight_decay, 0.1), partial(papers.dog_direction, init_eta=0.001), each(ref.step, 0.5)),
        "init_eta",
        0.1,
        leafwise=False,
        laws=False,
    ),
    Row(
        "ldog_direction",
        lambda: jr.chain(jr.ldog_direction(reps_rel=0.1), jr.step(1.0)),
        chained(each(papers.ldog_direction, reps_rel=0.1), each(ref.step, 1.0)),
        "reps_rel",
        0.1,
        thorough=True,
    ),
    Row(
        "ldog_warmup",
        lambda: jr.ldog(WARMUP_COSINE, init_eta=0.1, weight_decay=0.3),
        chained(each(papers.ldog_direction, init_eta=0.1), each(ref.step, warmup_cosine, 0.3)),
        "init_eta",
        0.01,
        laws=False,
    ),
]
