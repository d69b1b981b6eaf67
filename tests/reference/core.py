"""The references of hooks, directions, terminals and wrappers, and what lifts a reference to trees."""

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


def step(learning_rate, weight_decay=0.0, decay="decoupled", peak=None) -> Reference:
    """Loshchilov & Hutter 2019, Algorithm 2, line 12, with decay multiplied by the rate ("decoupled") or as it is
    written, with η = α / peak ("independent"); arXiv:2506.02285 ("corrected"); arXiv:2510.12402 ("cautious");
    arXiv:2208.06677, Algorithm 1, line 7 ("proximal"); arXiv:1802.01483, without its factor for what is new
    ("initial")."""
    start = out = None
    for t in itertools.count(1):
        d, p = yield out
        alpha, rate = at(learning_rate, t), at(weight_decay, t)
        start = p if start is None else start
        if decay == "decoupled":
            out = -alpha * (d + rate * p)
        elif decay == "independent":
            out = -alpha * d - alpha / peak * rate * p
        elif decay == "corrected":
            out = -alpha * d - alpha**2 / peak * rate * p
        elif decay == "cautious":
            out = -alpha * d - alpha * rate * p * (np.real(d * np.conj(p)) >= 0)
        elif decay == "proximal":
            out = (p - alpha * d) / (1 + alpha * rate) - p
        else:
            out = -alpha * d - alpha * rate * (p - start)


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


def pointwise(formula: Callable[..., Any], *values: Any) -> Reference:
    """What remembers nothing: formula(g, p, *values)."""
    out = None
    for t in itertools.count(1):
        g, p = yield out
        out = formula(g, p, *(at(value, t) for value in values))


def clip_by_leaf_norm(g, p, max_norm):
    """Pascanu et al. 2013, Algorithm 1, with the 1e-6 of the documented global form. On one array."""
    rate = max_norm / (np.linalg.norm(g) + 1e-6)
    return rate * g if rate < 1 else g


def clip_by_block_rms(g, p, threshold):
    """Shazeer & Stern 2018, Algorithm 4: Û."""
    return g / max(1, rms(g) / threshold)


def clip_by_value(g, p, max_value):
    return np.where(np.abs(g) > max_value, max_value * np.sign(g), g)


def adaptive_grad_clip(g, p, clipping, eps):
    """Brock et al. 2021, section 4. Units are what the last axis counts."""
    out = np.array(g)
    for unit in range(g.shape[-1]) if g.ndim > 1 else [slice(None)]:
        here = (..., unit) if g.ndim > 1 else ...
        norm, bound = np.sqrt((g[here] ** 2).sum()), clipping * max(np.sqrt((p[here] ** 2).sum()), eps)
        if norm > bound:
            out[here] = bound * g[here] / norm
    return out


def centralize(g, p):
    """Yong et al. 2020, equation 1. Units are what the last axis counts."""
    out = np.array(g)
    if g.ndim > 1 and g.size:
        for unit in range(g.shape[-1]):
            out[..., unit] -= g[..., unit].mean()
    return out


def trust_ratio(d, p, coefficient, eps, min_norm, max_ratio):
    """You et al. 2019, Algorithm 2, with φ(z) = z."""
    p_norm, d_norm = max(np.linalg.norm(p), min_norm), max(np.linalg.norm(d), min_norm)
    ratio = coefficient * p_norm / (d_norm + eps) if p_norm > 0 and d_norm > 0 else 1
    return min(ratio, max_ratio) * d


def scale_by_leaf_rms(d, p, min_rms):
    """Shazeer & Stern 2018, Algorithm 4: α, without ρ."""
    return max(rms(p), min_rms) * d


def rms(x) -> float:
    return np.sqrt(np.mean(np.abs(x) ** 2)) if x.size else 0.0


def normalize(eps) -> Reference:
    """The direction over its norm. On trees."""
    out = None
    for t in itertools.count(1):
        ds, _ = yield out
        norm = np.sqrt(sum((np.abs(d) ** 2).sum() for d in ds.values()))
        out = {key: d / (norm + at(eps, t)) if norm > 0 else d for key, d in ds.items()}


def layerwise_decay(decay, layer: Callable[[str, Any], int], depth: int) -> Reference:
    """Clark et al. 2020: the rate of a layer is that of the one above it times `decay`. On trees."""
    out = None
    for t in itertools.count(1):
        us, ps = yield out
        out = {key: u * at(decay, t) ** (depth - 1 - layer(key, ps[key])) for key, u in us.items()}


def ema(decay, debias) -> Reference:
    """Kingma & Ba 2015, section 3: the mean with weights (1 − β) βⁱ, over their sum if it is debiased."""
    seen, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        seen.append(g)
        beta = at(decay, t)
        weights = [(1 - beta) * beta**i for i in reversed(range(t))]
        out = sum(w * x for w, x in zip(weights, seen, strict=True)) / (sum(weights) if debias else 1)


def grokfast(decay, factor) -> Reference:
    """Lee et al. 2024, as in the authors' `gradfilter_ema`, whose mean begins with the first gradient."""
    mean = out = None
    for t in itertools.count(1):
        g, _ = yield out
        mean = g if mean is None else mean * at(decay, t) + g * (1 - at(decay, t))
        out = g + mean * at(factor, t)


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


def when(inner, condition, idle=lambda g: np.zeros_like(g)) -> Reference:
    """`inner` sees the calls for whose number, from 0, the condition holds; in the others the result is idle(g). On
    trees."""
    next(inner)
    out = None
    for count in itertools.count():
        gs, ps = yield out
        out = inner.send((gs, ps)) if condition(count) else {key: idle(g) for key, g in gs.items()}


def accumulate(inner, every, reduce=np.mean) -> Reference:
    """Every k-th call `inner` sees the mean or the sum of the last k gradients; a micro-batch with a number that is
    not finite is left out. On trees."""
    next(inner)
    cycle, calls, updates, out = [], 0, 0, None
    while True:
        gs, ps = yield out
        calls += 1
        out = {key: np.zeros_like(g) for key, g in gs.items()}
        if all(np.isfinite(g).all() for g in gs.values()):
            cycle.append(gs)
        if calls == at(every, updates + 1):
            if cycle:
                joined = {key: reduce([each_of[key] for each_of in cycle], axis=0) for key in gs}
                out, updates = inner.send((joined, ps)), updates + 1
            cycle, calls = [], 0


def skip_spikes(inner, window, sigmas, values=None) -> Reference:
    """OLMo's `SkipStepOptimizer`: no step where x > mean + σ · std of the last ones. x is the norm, or what `values`
    gives. On trees."""
    next(inner)
    last, out = [], None
    while True:
        gs, ps = yield out
        norm = np.sqrt(sum((np.abs(g) ** 2).sum() for g in gs.values()))
        x = norm if values is None else next(values)
        full = len(last) >= max(2, window // 2)
        spike = full and x > np.mean(last) + sigmas * np.std(last, ddof=1)
        go = np.isfinite(x) and np.isfinite(norm) and not spike
        out = inner.send((gs, ps)) if go else {key: np.zeros_like(g) for key, g in gs.items()}
        last = [*last, x][-window:] if np.isfinite(x) else last


def lookahead(inner, every, alpha) -> Reference:
    """Zhang et al. 2019, Algorithm 1. On trees."""
    next(inner)
    slow = out = None
    for t in itertools.count(1):
        gs, ps = yield out
        slow = dict(ps) if slow is None else slow
        out = dict(inner.send((gs, ps)))
        if t % at(every, t) == 0:
            for key, u in out.items():
                slow[key] = slow[key] + at(alpha, t) * (ps[key] + u - slow[key])
                out[key] = slow[key] - ps[key]


def partition(members, label) -> Reference:
    """To each member its part of the tree; what belongs to the label `None` has no update, to "passes" its gradient.
    On trees."""
    for member in members.values():
        next(member)
    out = None
    while True:
        gs, ps = yield out
        labels = {key: label(key, p) for key, p in ps.items()}
        out = {key: g if labels[key] == "passes" else None for key, g in gs.items()}
        for name, member in members.items():
            out |= member.send(({key: g for key, g in gs.items() if labels[key] == name}, ps))


def cautious(inner) -> Reference:
    """Liang et al. 2024, Algorithm 1, with the divisor of the authors' code. On one array."""
    next(inner)
    out = None
    while True:
        g, p = yield out
        d = inner.send((g, p))
        agreed = (d * g > 0).astype(float)
        out = d * agreed / max(agreed.mean(), 1e-3) if g.size else d


def plateau(factor, patience, min_scale) -> Reference:
    """PyTorch's `ReduceLROnPlateau` on a value that never changes, so that it is better once."""
    scale, bad, out = 1.0, -1, None
    while True:
        us, _ = yield out
        bad += 1
        if bad > patience:
            scale, bad = max(scale * factor, min_scale), 0
        out = {key: scale * u for key, u in us.items()}
