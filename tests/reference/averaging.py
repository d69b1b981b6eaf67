"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""

import itertools

import numpy as np

from reference.core import Reference, at


def schedule_free(inner, learning_rate, beta, power=2.0, r=0.0) -> Reference:
    """Defazio et al. 2024, equations 7 to 9, from the gradient at y, which is p; weights as in the authors' classes,
    whose k is t − 1. On one array."""
    next(inner)
    z = out = before = None
    largest, total = 0.0, 0.0
    for t in itertools.count(1):
        g, y = yield out
        u = inner.send((g, y))
        # Before the first update z and x are y; then equation 7 tells x, by the β that made y.
        z, x = (y, y) if z is None else (z, (y - (1 - before) * z) / before)
        largest = max(largest, at(learning_rate, t))
        weight = t**r * largest**power
        total += weight
        c = weight / total if total > 0 else 0.0
        before = at(beta, t)
        z = z + u
        x = (1 - c) * x + c * z
        out = (1 - before) * z + before * x - y


def over_second_moment(b2, eps) -> Reference:
    """Defazio et al. 2024, Algorithm 1: g over its root mean square, with the bias correction of the
    authors' AdamWScheduleFree."""
    v, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        out = g / (np.sqrt(v / (1 - b2**t)) + eps)


def sam(inner, grad_fn, rho, adaptive=False) -> Reference:
    """Foret et al. 2021, Algorithm 1 with equation 2 for p = 2; adaptive: Kwon et al. 2021, with T = |w|.
    On trees."""
    next(inner)
    out = None
    for t in itertools.count(1):
        gs, ps = yield out
        sizes = {key: np.abs(p) if adaptive else 1.0 for key, p in ps.items()}
        norm = np.sqrt(sum((np.abs(sizes[key] * g) ** 2).sum() for key, g in gs.items()))
        worst = {key: ps[key] + at(rho, t) * sizes[key] ** 2 * g / (norm + 1e-12) for key, g in gs.items()}
        out = inner.send((grad_fn(worst), ps))
