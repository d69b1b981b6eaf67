"""Rules around rules, gates, averages, groups."""

from functools import partial

import numpy as np
from reference import core as ref

import jaxopt_rules as jr
from table.row import ADAM, Row, chained, each, pointwise


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


ROWS = [
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
        thorough=True,
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
        thorough=True,
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
    Row(
        "average_swa",
        lambda: jr.average(adamw(), None, start=2),
        ADAMW_REFERENCE,
        "learning_rate",
        0.1,
        thorough=True,
    ),
    Row(
        "average_lawa",
        lambda: jr.average(adamw(), window=3, every=2),
        ADAMW_REFERENCE,
        "learning_rate",
        0.1,
        thorough=True,
    ),
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
        complex=False,
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
