"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""

import itertools
import math

import numpy as np

from reference.core import Reference, at


def lamb(b1, b2, eps, weight_decay=0.0, max_ratio=math.inf) -> Reference:
    """You et al. 2020, Algorithm 2, lines 5 to 11, with φ(z) = min(z, …) where the ratio is bounded; r x + r λ x as
    there, without the rate."""
    m = v = 0.0
    out = None
    for t in itertools.count(1):
        g, p = yield out
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        size, length = np.linalg.norm(p), np.linalg.norm(r + weight_decay * p)
        ratio = min(size / length, max_ratio) if size > 0 and length > 0 else 1
        out = ratio * r + ratio * weight_decay * p


def lars(
    learning_rate,
    weight_decay,
    trust_coefficient,
    eps,
    momentum,
    nesterov=False,
    denominator="sum",
    rate="inside",
    trust_clip=False,
) -> Reference:
    """You et al. 2017, Algorithm 1: λˡ, then v, then w. `learning_rate=None` gives the velocity."""
    v, out = 0.0, None
    for t in itertools.count(1):
        g, w = yield out
        gamma = 1.0 if learning_rate is None else at(learning_rate, t)
        beta = weight_decay
        below = np.linalg.norm(g + beta * w) if denominator == "joint" else np.linalg.norm(g) + beta * np.linalg.norm(w)
        local = trust_coefficient * np.linalg.norm(w) / (below + eps) if np.linalg.norm(w) > 0 and below > 0 else 1
        if trust_clip:
            local = min(local, gamma) / gamma if gamma > 0 else 1
        added = (gamma if rate == "inside" else 1) * local * (g + beta * w)
        v = momentum * v + added
        moved = momentum * v + added if nesterov else v
        sign = 1 if learning_rate is None else -1
        out = sign * moved if rate == "inside" else sign * gamma * moved


def novograd(b1, b2, eps, weight_decay=0.0, grad_averaging=False) -> Reference:
    """Ginsburg et al. 2019, Algorithm 1, with the ε of its line 9 from the first step on."""
    m, v, out = 0.0, None, None
    while True:
        g, w = yield out
        squared = np.sum(g**2)
        v = squared if v is None else b2 * v + (1 - b2) * squared
        share = 1 - b1 if grad_averaging else 1
        m = b1 * m + share * (g / (np.sqrt(v) + eps) + weight_decay * w)
        out = m


def stable_adamw(b1, b2, eps, weight_decay=0.0) -> Reference:
    """Wortsman et al. 2023, Algorithm 2, without α."""
    v = u = 0.0
    out = None
    for t in itertools.count(1):
        g, p = yield out
        first = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t)
        second = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        v = first * v + (1 - first) * g
        u = second * u + (1 - second) * g**2
        size = np.sqrt(np.mean(g**2 / np.maximum(u, eps**2))) if g.size else 0
        eta = 1 / max(1, size)
        out = eta * weight_decay * p + eta * v / (np.sqrt(u) + eps)
