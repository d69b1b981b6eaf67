"""The references of rules on matrices."""

import itertools

import numpy as np

from reference.core import Reference, at

KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def newton_schulz(x, triples=KELLER_JORDAN, eps=1e-7, placement="outside", safety=1):
    """Jordan et al. 2024, `newtonschulz5`: odd polynomials of a matrix, which act on its singular values."""
    if not x.size:
        return x
    u, sigma, vh = np.linalg.svd(x, full_matrices=False)
    norm = safety * np.sqrt((sigma**2).sum())
    sigma = sigma / (norm + eps if placement == "outside" else max(norm, eps))
    for a, b, c in triples:
        sigma = sigma * (a + sigma**2 * (b + c * sigma**2))
    return (u * sigma) @ vh


def muon_direction(beta, momentum="ema", nesterov=True, scale="original", **solver) -> Reference:
    """Jordan et al. 2024, Algorithm 2 and `muon.py` ("ema"); Liu et al. 2025, Algorithm 1 and `toy_train.py` ("sum");
    Dozat 2016, Algorithm 2 with a constant μ ("debiased")."""
    m, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        b = at(beta, t)
        m = b * m + (g if momentum == "sum" else (1 - b) * g)
        if momentum == "sum":
            u = b * m + g if nesterov else m
        elif momentum == "ema":
            u = b * m + (1 - b) * g if nesterov else m
        else:
            u = b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t) if nesterov else m / (1 - b**t)
        inputs, outputs = g.shape
        if scale == "original":
            size = max(1, outputs / max(inputs, 1)) ** 0.5
        elif scale == "match_rms_adamw":
            size = 0.2 * max(inputs, outputs) ** 0.5
        else:
            size = (outputs / max(inputs, 1)) ** 0.5
        out = size * newton_schulz(u, **solver)
