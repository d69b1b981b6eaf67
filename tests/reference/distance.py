"""Rules that find their learning rate: Prodigy, DoG."""

import itertools
import math

import numpy as np

from reference.core import Reference, at


def prodigy(
    learning_rate,
    b1=0.9,
    b2=0.999,
    b3=None,
    eps=1e-8,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=math.inf,
    use_bias_correction=False,
    safeguard_warmup=False,
    slice_p=1,
    weight_decay=0.0,
    decays=lambda key: True,
    l2=False,
) -> Reference:
    """Mishchenko & Defazio 2023, Algorithm 4, with running means as sums over all that was met. On trees.

    From `prodigyopt` 1.1.2 come what the paper has not (`growth_rate`, `d_coef`, `safeguard_warmup`, bias correction,
    slices, skipped updates), the new d in d ε, and d₀ as a unit of r and s, which their ratio does not show."""
    b3 = math.sqrt(b2) if b3 is None else b3
    d = d_max = d0
    start, met, products, out = None, [], [], None
    for t in itertools.count(1):
        gs, ps = yield out
        alpha, rate = at(learning_rate, t), at(weight_decay, t)
        start = ps if start is None else start
        out = {key: np.zeros_like(g) for key, g in gs.items()}
        if l2:
            gs = {key: g + rate * ps[key] if decays(key) else g for key, g in gs.items()}
        if alpha == 0 or not any(g.any() for g in [*gs.values(), *(g for _, _, seen in met for g in seen.values())]):
            continue
        k = len(met) + 1
        gamma = alpha * (math.sqrt(1 - b2**k) / (1 - b1**k) if use_bias_correction else 1)  # γ_k
        before = d
        met.append((d, (1 if safeguard_warmup else gamma) * d * d, gs))
        sampled = {key: (start[key] - ps[key]).reshape(-1)[::slice_p] for key in gs}
        products.append(gamma * d * d * sum(gs[key].reshape(-1)[::slice_p] @ x for key, x in sampled.items()))
        ages = [k - i for i in range(1, k + 1)]
        r = sum(b3**age * (1 - b3) * product for age, product in zip(ages, products, strict=True))
        s = {
            key: sum(b3**age * (1 - b3) * w * seen[key] for age, (_, w, seen) in zip(ages, met, strict=True))
            for key in gs
        }
        d_hat = d_coef * r / sum(np.abs(x.reshape(-1)[::slice_p]).sum() for x in s.values())
        if d == d0:
            d = max(d, d_hat)
        d_max = max(d_max, d_hat)
        d = min(d_max, d * growth_rate)
        for key in gs:
            m = sum(b1**age * (1 - b1) * dk * seen[key] for age, (dk, _, seen) in zip(ages, met, strict=True))
            v = sum(b2**age * (1 - b2) * (dk * seen[key]) ** 2 for age, (dk, _, seen) in zip(ages, met, strict=True))
            u = -gamma * before * m / (np.sqrt(v) + d * eps)
            out[key] = u if l2 or not decays(key) else u - gamma * before * rate * ps[key]


def dog_direction(reps_rel=1e-6, eps=1e-8, init_eta=None) -> Reference:
    """Ivgi et al. 2023, equation 1 and section 2.4: the norms are those of everything that was met. On trees."""
    xs, gs_met, out = [], [], None
    while True:
        gs, ps = yield out
        xs.append(flat(ps))
        gs_met.append(flat(gs))
        distance = max(np.linalg.norm(x - xs[0]) for x in xs)
        if init_eta is None:
            distance = max(distance, reps_rel * (1 + np.linalg.norm(xs[0])))
        eta = distance / np.sqrt(np.linalg.norm(np.concatenate(gs_met)) ** 2 + eps) if distance else init_eta
        out = {key: eta * g for key, g in gs.items()}


def ldog_direction(**numbers) -> Reference:
    """Ivgi et al. 2023, section 4.1: `dog_direction` for each array. On one array."""
    inner, out = dog_direction(**numbers), None
    next(inner)
    while True:
        g, p = yield out
        out = inner.send(({"": g}, {"": p}))[""]


def flat(tree) -> np.ndarray:
    return np.concatenate([tree[key].reshape(-1) for key in sorted(tree)])
