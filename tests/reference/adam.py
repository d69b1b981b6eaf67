"""Adam's family."""

import itertools
from fractions import Fraction

import numpy as np

from reference.core import Reference, at


def _mean(xs, decay) -> np.ndarray:
    """Σ (1 − β) βⁱ x of the values, the newest with i = 0: a running mean that began at 0."""
    return sum((1 - decay) * decay**i * x for i, x in enumerate(reversed(xs)))


def adam_epsilon(b1, b2, eps, place, corrected=True) -> Reference:
    """Kingma & Ba 2015, Algorithm 1, lines 7 to 12, with ε elsewhere; not `corrected`: the form at the end of section
    2, in which the corrections are a factor of the rate."""
    gs, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        m, v = _mean(gs, b1), _mean([np.abs(g) ** 2 for g in gs], b2)
        c1, c2 = 1 - b1**t, 1 - b2**t
        if not corrected:
            denominator = {"inside": np.sqrt(v + eps), "max": np.maximum(np.sqrt(v), eps)}[place] / np.sqrt(c2)
        elif place == "hat":
            denominator = np.sqrt(v / c2) + eps / np.sqrt(c2)
        elif place == "inside":
            denominator = np.sqrt(v / c2 + eps)
        else:
            denominator = np.maximum(np.sqrt(v / c2), eps)
        out = m / c1 / denominator


def amsgrad(b1, b2, eps, maximum_of) -> Reference:
    """Reddi et al. 2018, Algorithm 2, its v̂ as the largest of all v so far; with the corrections of Kingma & Ba 2015
    for the bias of v ("corrected") or of that largest ("uncorrected")."""
    gs, vs, out = [], [], None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        vs.append(_mean([g**2 for g in gs], b2))
        if maximum_of == "corrected":
            v_hat = np.max([v / (1 - b2**i) for i, v in enumerate(vs, 1)], axis=0)
        else:
            v_hat = np.max(vs, axis=0) / (1 - b2**t)
        out = _mean(gs, b1) / (1 - b1**t) / (np.sqrt(v_hat) + eps)


def nadam(b1, b2, eps, momentum_decay) -> Reference:
    """Dozat 2016, Algorithm 2, with its schedule of μ (the text under it) stretched by ψ; PyTorch's m, with β₁ in place
    of μ, and v̂, without the factor ν."""
    gs, m, out = [], 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        m = at(b1, t) * m + (1 - at(b1, t)) * g
        mu = [at(b1, i) * (1 - 0.5 * 0.96 ** (i * at(momentum_decay, i))) for i in range(1, t + 1)]
        following = at(b1, t) * (1 - 0.5 * 0.96 ** ((t + 1) * at(momentum_decay, t)))
        m_hat = following * m / (1 - np.prod([*mu, following])) + (1 - mu[-1]) * g / (1 - np.prod(mu))
        out = m_hat / (np.sqrt(_mean([g**2 for g in gs], b2) / (1 - b2**t)) + eps)


def nadamw(b1, b2, eps, form) -> Reference:
    """Dozat 2016, Algorithm 2, with μ = β₁ at all times ("optax"); AlgoPerf's, whose m̂ is a mean of the mean, corrected
    once ("timm")."""
    gs, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        if form == "optax":
            m_hat = b1 * _mean(gs, b1) / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        else:
            m_hat = (b1 * _mean(gs, b1) + (1 - b1) * g) / (1 - b1**t)
        out = m_hat / (np.sqrt(_mean([g**2 for g in gs], b2) / (1 - b2**t)) + eps)


def adamax(b1, b2, eps) -> Reference:
    """Kingma & Ba 2015, Algorithm 2, by equation 12: u is the largest β₂ⁱ |g|; of |g| + ε in PyTorch."""
    gs, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        u = np.max([b2**i * (np.abs(g) + eps) for i, g in enumerate(reversed(gs))], axis=0)
        out = _mean(gs, b1) / (1 - b1**t) / u


def sma_length(b2, t) -> Fraction:
    """ρ_t of Liu et al. 2020, Algorithm 2, lines 1 and 8, in fractions: in floats its digits cancel."""
    beta = Fraction(b2)
    return 2 / (1 - beta) - 1 - 2 * t * beta**t / (1 - beta**t)


def _rectified(m_hat, root, eps, place, t, b2, silent="sgd", threshold=5):
    """Liu et al. 2020, Algorithm 2, lines 9 to 14. `root` is √v, not corrected."""
    rho, limit = sma_length(b2, t), 2 / (1 - Fraction(b2)) - 1
    if rho <= threshold:
        return m_hat if silent == "sgd" else 0 * m_hat
    r = np.sqrt(float((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)))
    c = np.sqrt(1 - b2**t)
    return r * m_hat * (c / (root + eps) if place == "hat" else 1 / (root / c + eps))


def radam(b1, b2, eps, place="outside", silent="sgd", threshold=5) -> Reference:
    """Liu et al. 2020, Algorithm 2, with the threshold of the authors' code; ε outside, or as in that code ("hat")."""
    gs, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        gs.append(g)
        root = np.sqrt(_mean([g**2 for g in gs], b2))
        out = _rectified(_mean(gs, b1) / (1 - b1**t), root, eps, place, t, b2, silent, threshold)


def adabelief(b1, b2, eps, eps_root, rectify=False) -> Reference:
    """Zhuang et al. 2020, Algorithm 2; with `rectify` the default of the authors' code."""
    m = s = 0.0
    out = None
    for t in itertools.count(1):
        g, _ = yield out
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps_root
        m_hat = m / (1 - b1**t)
        if rectify:
            out = _rectified(m_hat, np.sqrt(s), eps, "hat", t, b2)
        else:
            out = m_hat / (np.sqrt(s / (1 - b2**t)) + eps)


def yogi(b1, b2, eps, initial_accumulator_value=1e-6, debias=True) -> Reference:
    """Zaheer et al. 2018, Algorithm 2; Optax's m and v begin at a value of their own and are corrected like Adam's."""
    m = v = initial_accumulator_value
    out = None
    for t in itertools.count(1):
        g, _ = yield out
        m = b1 * m + (1 - b1) * g
        v = np.where(v > g**2, v - (1 - b2) * g**2, v + (1 - b2) * g**2)
        c1, c2 = (1 - b1**t, 1 - b2**t) if debias else (1, 1)
        out = m / c1 / (np.sqrt(v / c2) + eps)
