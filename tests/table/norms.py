"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""

from reference import core as ref
from reference import norms as papers

import jaxopt_rules as jr
from table.row import WARMUP_COSINE, Row, chained, each, warmup_cosine

ROWS = [
    Row("lamb_direction", lambda: jr.lamb_direction(), each(papers.lamb, 0.9, 0.999, 1e-6), "b2", laws=False),
    Row(
        "lamb_warmup",
        lambda: jr.lamb(WARMUP_COSINE, weight_decay=0.1, max_ratio=0.8),
        chained(each(papers.lamb, 0.9, 0.999, 1e-6, 0.1, 0.8), each(ref.step, warmup_cosine)),
        "b1",
        0.01,
    ),
    Row(
        "lamb_decoupled",
        lambda: jr.lamb(0.1, weight_decay=0.3, decay="decoupled"),
        chained(each(papers.lamb, 0.9, 0.999, 1e-6), each(ref.step, 0.1, 0.3)),
        "weight_decay",
        0.1,
        laws=False,
    ),
    Row(
        "lars_direction",
        lambda: jr.lars_direction(0.1, eps=0.1, nesterov=True, denominator="joint"),
        each(papers.lars, None, 0.1, 0.001, 0.1, 0.9, True, "joint"),
        "momentum",
        laws=False,
    ),
    Row(
        "lars",
        lambda: jr.lars(WARMUP_COSINE, 0.1, trust_coefficient=0.02),
        each(papers.lars, warmup_cosine, 0.1, 0.02, 0, 0.9),
        "trust_coefficient",
        0.01,
    ),
    Row(
        "lars_outside",
        lambda: jr.lars(WARMUP_COSINE, 0.1, nesterov=True, rate="outside"),
        each(papers.lars, warmup_cosine, 0.1, 0.001, 0, 0.9, True, "sum", "outside"),
        "momentum",
        0.01,
        laws=False,
    ),
    Row(
        "lars_trust_clip",
        lambda: jr.lars(WARMUP_COSINE, 0.1, eps=1e-3, denominator="joint", trust_clip=True),
        each(papers.lars, warmup_cosine, 0.1, 0.001, 1e-3, 0.9, False, "joint", "inside", True),
        "weight_decay",
        0.01,
        laws=False,
    ),
    Row(
        "novograd_direction",
        lambda: jr.novograd_direction(0.95, 0.98, 1e-8, grad_averaging=True),
        each(papers.novograd, 0.95, 0.98, 1e-8, 0.0, True),
        "b2",
        laws=False,
    ),
    Row(
        "novograd",
        lambda: jr.novograd(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.novograd, 0.9, 0.25, 1e-6, 0.1), each(ref.step, warmup_cosine)),
        "b2",
        0.01,
    ),
    Row(
        "stable_adamw_direction",
        lambda: jr.stable_adamw_direction(),
        each(papers.stable_adamw, 0.9, 0.99, 1e-6),
        "b2",
        laws=False,
    ),
    Row(
        "stable_adamw",
        lambda: jr.stable_adamw(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.stable_adamw, 0.9, 0.99, 1e-6, 0.1), each(ref.step, warmup_cosine)),
        "b2",
        0.01,
    ),
]
