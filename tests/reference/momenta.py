"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""

import itertools

import numpy as np

from reference.core import Reference, at


def lion(b1, b2) -> Reference:
    """Chen et al. 2023, Algorithm 2, without decay."""
    m, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        out = np.sign(at(b1, t) * m + (1 - at(b1, t)) * g)
        m = at(b2, t) * m + (1 - at(b2, t)) * g


def adan(b1, b2, b3, eps) -> Reference:
    """Xie et al. 2022, Algorithm 1, lines 4 to 6 with β for the paper's 1 − β, and with the means of the authors' code:
    the weights (1 − β) βⁱ over their sum. Line 7 is that of `step`, "proximal"."""
    gs, differences, squares, out = [], [], [], None

    def mean(xs, beta):
        weights = [beta**i for i in reversed(range(len(xs)))]
        return sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights)

    while True:
        g, _ = yield out
        differences.append(g - gs[-1] if gs else 0 * g)
        gs.append(g)
        squares.append((g + b2 * differences[-1]) ** 2)
        out = (mean(gs, b1) + b2 * mean(differences, b2)) / (np.sqrt(mean(squares, b3)) + eps)


def adopt(b1, b2, eps, clip_exponent=None) -> Reference:
    """Taniguchi et al. 2024, Algorithm 2: c_t = t^κ with t from 0; without a clip Algorithm 1."""
    m = v = 0.0
    out = None
    for t in itertools.count():
        g, _ = yield out
        if t == 0:
            v, out = g**2, 0 * g
            continue
        scaled = g / np.maximum(np.sqrt(v), eps)
        if clip_exponent is not None:
            bound = t**clip_exponent
            scaled = np.where(np.abs(scaled) > bound, bound * np.sign(scaled), scaled)
        m = b1 * m + (1 - b1) * scaled
        v = b2 * v + (1 - b2) * g**2
        out = m


def ademamix(b1, b2, b3, alpha, eps, warmup=None) -> Reference:
    """Pagliardini et al. 2024, Algorithm 1, with the schedules of section 3 (f is appendix A.1's)."""

    def f(beta):
        return np.log(0.5) / np.log(beta) - 1

    def inverse(x):
        return 0.5 ** (1 / (x + 1))

    m1 = m2 = v = 0.0
    out = None
    for t in itertools.count(1):
        g, _ = yield out
        slow, mixture = b3, alpha
        if warmup is not None and t < warmup:
            slow = inverse((1 - t / warmup) * f(b1) + t / warmup * f(b3))
            mixture = t * alpha / warmup
        m1 = b1 * m1 + (1 - b1) * g
        m2 = slow * m2 + (1 - slow) * g
        v = b2 * v + (1 - b2) * g**2
        out = (m1 / (1 - b1**t) + mixture * m2) / (np.sqrt(v / (1 - b2**t)) + eps)
