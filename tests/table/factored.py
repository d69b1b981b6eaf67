"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""

from functools import partial

from reference import core as ref
from reference import factored as papers

import jaxopt_rules as jr
from table.row import WARMUP_COSINE, Row, chained, each, warmup_cosine

ANY_SIZE = partial(papers.two_largest, least=1)


def warmup_init(count: int) -> float:
    return 1e-6 * (count + 1)


ROWS = [
    Row(
        "adafactor",
        lambda: jr.adafactor(min_dim_size_to_factor=2),
        chained(
            each(papers.adafactor_direction, partial(papers.two_largest, least=2), 0.8, 0, 1.0, 1e-30),
            each(papers.adafactor_step, 1e-2, 1e-3, True),
        ),
        "decay_rate",
        0.01,
        thorough=True,
    ),
    Row(
        "adafactor_warmup",
        lambda: jr.adafactor(
            WARMUP_COSINE, 1, 0.7, momentum=0.9, clipping_threshold=0.5, min_rms=0.5, weight_decay=0.1, decay="scaled"
        ),
        chained(
            each(papers.adafactor_direction, ANY_SIZE, 0.7, 0, 0.5, 1e-30),
            each(papers.adafactor_step, warmup_cosine, 0.5, False, 0.9, 0.1, "scaled"),
        ),
        "momentum",
        0.01,
    ),
    Row(
        "adafactor_absolute",
        lambda: jr.adafactor(
            0.1,
            factored=False,
            decay_offset=3,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            eps=1e-8,
            weight_decay=0.1,
            decay="fixed",
        ),
        chained(
            each(papers.adafactor_direction, lambda shape: None, 0.8, 3, None, 1e-8),
            each(papers.adafactor_step, 0.1, None, False, None, 0.1, "fixed"),
        ),
        "weight_decay",
        0.1,
        laws=False,
    ),
    Row(
        "adafactor_direction",
        lambda: jr.adafactor_direction(1),
        each(papers.adafactor_direction, ANY_SIZE, 0.8, 0, 1.0, 1e-30),
        "clipping_threshold",
        laws=False,
    ),
    Row(
        "adafactor_pytorch",
        lambda: jr.adafactor_pytorch(WARMUP_COSINE, eps=1e-3, weight_decay=0.1),
        chained(
            each(papers.adafactor_direction, papers.last_two, 0.8, 0, 1.0, 1e-3, floor=True),
            each(papers.adafactor_step, warmup_cosine, 1e-3, True, None, 0.1),
        ),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row(
        "adafactor_transformers",
        lambda: jr.adafactor_transformers(momentum=0.9, warmup_init=True, weight_decay=0.1),
        chained(
            each(papers.adafactor_direction, papers.last_two, 0.8, 0, 1.0, 1e-30),
            each(papers.adafactor_step, warmup_init, 1e-3, True, 0.9, 0.1, "scaled"),
        ),
        "weight_decay",
        1e-6,
        thorough=True,
    ),
    Row(
        "sm3_warmup",
        lambda: jr.sm3(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.sm3_direction, 0.9), each(ref.step, warmup_cosine, 0.1)),
        "momentum",
        0.01,
    ),
    Row(
        "sm3_direction",
        lambda: jr.sm3_direction(None, eps=1e-3),
        each(papers.sm3_direction, None, 1e-3),
        "eps",
        thorough=True,
    ),
]
