"""Rules that need the loss: Polyak, L-BFGS."""

from functools import partial

import jax
import jax.numpy as jnp
from reference import core as ref
from reference import loss as papers

import jaxopt_rules as jr
from jaxopt_rules.numerics import abs2, is_inexact, widened
from table.row import WARMUP_COSINE, Row, chained, each, warmup_cosine


def bowl(params):
    """Σ √(1 + |x|²) − 1 over all arrays, in float32 or wider."""
    squares = [abs2(x.astype(widened(x.dtype))) for x in jax.tree.leaves(params) if is_inexact(x)]
    return sum(jnp.sum(x / (1 + jnp.sqrt(1 + x))) for x in squares)


def searched(direction, search, *args, **kwargs):
    return lambda: papers.searched(direction(), search(*args, **kwargs), papers.bowl)


SEARCH = {"extra": {"value_fn": bowl}, "leafwise": False, "aligned": False}

ROWS = [
    Row(
        "polyak_direction",
        lambda: jr.polyak_direction(0.3, f_min=0.5, eps=0.1),
        partial(papers.polyak, 2.0, 0.3, 1.0, 0.5, 0.1),
        "f_min",
        leafwise=False,
        extra={"value": 2.0},
        thorough=True,
    ),
    Row(
        "polyak_sgd",
        lambda: jr.polyak_sgd(0.05, WARMUP_COSINE, f_min=1e5, variant="sps+"),
        lambda: papers.uphill(papers.polyak(3e7, 0.05, warmup_cosine, 1e5, 0.0, True)),
        "max_learning_rate",
        0.0005,
        leafwise=False,
        extra={"value": 3e7},
    ),
    Row(
        "lbfgs_direction",
        lambda: jr.chain(jr.lbfgs_direction(3, min_curvature=0.1), jr.step(WARMUP_COSINE)),
        chained(partial(papers.lbfgs_direction, 3, min_curvature=0.1), each(ref.step, warmup_cosine)),
        None,
        0.01,
        leafwise=False,
        laws=False,
    ),
    Row(
        "lbfgs_fixed",
        lambda: jr.lbfgs(0.1, 3, linesearch=None, first="l1", min_curvature=0.01, skip="absolute"),
        chained(partial(papers.lbfgs_direction, 3, "l1", 0.01, "absolute"), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
        leafwise=False,
    ),
    Row(
        "lbfgs",
        lambda: jr.lbfgs(memory_size=3, min_curvature=0.1),
        searched(partial(papers.lbfgs_direction, 3, min_curvature=0.1), papers.strong_wolfe),
        None,
        1.0,
        **SEARCH,
        thorough=True,
    ),
    Row(
        "strong_wolfe",
        lambda: jr.chain(jr.normalize(), jr.strong_wolfe(0.1, curv_rtol=0.1)),
        searched(partial(ref.normalize, 0.0), papers.strong_wolfe, 0.1, c2=0.1),
        None,
        1.0,
        thorough=True,
        # The minimum of a cubic divides by the spacing of its points a difference of values, which are rounded.
        single=1e-5,
        **SEARCH,
    ),
    Row(
        "backtracking",
        lambda: jr.chain(jr.normalize(), jr.backtracking(slope_rtol=0.3, max_learning_rate=10.0)),
        searched(partial(ref.normalize, 0.0), papers.backtracking, 0.3, longest=10.0),
        None,
        1.0,
        **SEARCH,
    ),
]
