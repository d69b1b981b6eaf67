"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""

from reference import core as ref
from reference import momenta as papers

import jaxopt_rules as jr
from table.row import WARMUP_COSINE, Row, chained, each, warmup_cosine

ROWS = [
    Row("lion_direction", lambda: jr.lion_direction(0.95, 0.8), each(papers.lion, 0.95, 0.8), "b1", laws=False),
    Row(
        "lion",
        lambda: jr.lion(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.lion, 0.9, 0.99), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
    ),
    Row("adan_direction", lambda: jr.adan_direction(), each(papers.adan, 0.98, 0.92, 0.99, 1e-8), "b1", laws=False),
    Row(
        "adan",
        lambda: jr.adan(WARMUP_COSINE, b2=0.8, eps=1e-4, weight_decay=0.1),
        chained(each(papers.adan, 0.98, 0.8, 0.99, 1e-4), each(ref.step, warmup_cosine, 0.1, "proximal")),
        "b2",
        0.01,
    ),
    Row(
        "adopt_direction",
        lambda: jr.adopt_direction(0.9, 0.99, clip_exponent=None),
        each(papers.adopt, 0.9, 0.99, 1e-6),
        "b2",
        thorough=True,
    ),
    Row(
        "adopt",
        lambda: jr.adopt(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.adopt, 0.9, 0.9999, 1e-6, 0.25), each(ref.step, warmup_cosine, 0.1)),
        "b1",
        0.01,
        complex=False,
    ),
    Row(
        "ademamix_direction",
        lambda: jr.ademamix_direction(),
        each(papers.ademamix, 0.9, 0.999, 0.9999, 5, 1e-8),
        "b3",
        laws=False,
    ),
    Row(
        "ademamix",
        lambda: jr.ademamix(WARMUP_COSINE, b3=0.99, alpha=2.0, warmup=20, weight_decay=0.1),
        chained(each(papers.ademamix, 0.9, 0.999, 0.99, 2, 1e-8, 20), each(ref.step, warmup_cosine, 0.1)),
        "b3",
        0.01,
    ),
]
