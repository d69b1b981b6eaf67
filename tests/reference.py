"""Every rule once more, in NumPy float64, transcribed from its paper: what `test_reference.py` holds the rules against.

A reference is a generator. It is sent `(g, p)`, the gradient and the parameter, and yields its result; its local
variables are its memory. Those of one array are lifted to trees by `each`, which knows nothing of the package.
A hyperparameter is a number, or a function of the number of finished updates.
"""

import itertools
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

Reference = Generator[Any, tuple[Any, Any], None]


def at(value: Any, t: int) -> float:
    """A hyperparameter in update t, which has t − 1 finished updates before it."""
    return float(value(t - 1)) if callable(value) else value


def each(make: Callable[[], Reference]) -> Reference:
    """One reference per array of a flat dict."""
    members: dict[str, Reference] = {}
    out = None
    while True:
        gs, ps = yield out
        for key in gs.keys() - members.keys():
            members[key] = make()
            next(members[key])
        out = {key: members[key].send((g, ps[key])) for key, g in gs.items()}


def chain(*members: Reference) -> Reference:
    for member in members:
        next(member)
    out = None
    while True:
        g, p = yield out
        for member in members:
            g = member.send((g, p))
        out = g


def step(learning_rate, weight_decay=0.0) -> Reference:
    """Loshchilov & Hutter 2019, Algorithm 2, line 12, with decay multiplied by the rate."""
    out = None
    for t in itertools.count(1):
        d, p = yield out
        out = -at(learning_rate, t) * (d + at(weight_decay, t) * p)


def weight_decay(rate) -> Reference:
    """Loshchilov & Hutter 2019, Algorithm 1, line 6."""
    out = None
    for t in itertools.count(1):
        g, p = yield out
        out = g + at(rate, t) * p


def clip(max_norm) -> Reference:
    """Pascanu et al. 2013, Algorithm 1, with the documented 1e-6. On trees."""
    out = None
    for t in itertools.count(1):
        gs, _ = yield out
        norm = np.sqrt(sum((np.abs(g) ** 2).sum() for g in gs.values()))
        rate = at(max_norm, t) / (norm + 1e-6)
        out = {key: rate * g if rate < 1 else g for key, g in gs.items()}


def velocity(momentum, nesterov=False) -> Reference:
    """Sutskever et al. 2013, section 2, in the form of Polyak 1964 without the rate (PyTorch's SGD)."""
    v, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        mu = at(momentum, t)
        v = mu * v + g
        out = g + mu * v if nesterov else v


def momentum(learning_rate, momentum) -> Reference:
    """Sutskever et al. 2013, equations 1 and 2."""
    v, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        v = at(momentum, t) * v - at(learning_rate, t) * g
        out = v


def adam_direction(b1, b2, eps, bias_correction="moments") -> Reference:
    """Kingma & Ba 2015, Algorithm 1; "step" is the last paragraph of section 2."""
    m = v = 0.0
    out = None
    for t in itertools.count(1):
        g, _ = yield out
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * np.abs(g) ** 2
        if bias_correction == "moments":
            m_hat = m / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            out = m_hat / (np.sqrt(v_hat) + eps)
        else:
            out = np.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (np.sqrt(v) + eps)


def adamw_step(learning_rate, b1, b2, eps, weight_decay) -> Reference:
    """The documented AdamW: p − α_t m / (√v + ε) − α_t λ p with α_t = α √(1 − β₂ᵗ) / (1 − β₁ᵗ)."""
    m = v = 0.0
    out = None
    for t in itertools.count(1):
        g, p = yield out
        m = m + (1 - b1) * (g - m)
        v = v + (1 - b2) * (g * g - v)
        corrected = at(learning_rate, t) * np.sqrt(1 - b2**t) / (1 - b1**t)
        out = -(corrected * m / (np.sqrt(v) + eps) + corrected * at(weight_decay, t) * p)
