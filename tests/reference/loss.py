"""References of the rules that need the loss: Polyak, L-BFGS, line searches. On trees."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from reference.core import Reference, at

ValueAndGrad = Callable[[dict[str, np.ndarray]], tuple[float, dict[str, np.ndarray]]]
Phi = Callable[[float], tuple[float, float]]  # the value and the slope of the loss along a line


def polyak(value, max_learning_rate, scaling, f_min, eps, plus=False) -> Reference:
    """Loizou et al. 2021, equation 4 (SPS_max with c = 1), with Optax's ε and scaling; "+": Garrigos et al. 2023."""
    out = None
    for t in itertools.count(1):
        gs, _ = yield out
        gap = value - at(f_min, t)
        gap = 0.0 if plus and gap < 0 else gap
        squared = np.linalg.norm(np.concatenate([g.ravel() for g in gs.values()])) ** 2 + at(eps, t)
        step = min(gap / squared, at(max_learning_rate, t))
        out = {key: at(scaling, t) * step * g for key, g in gs.items()}


def uphill(us: Reference) -> Reference:
    """What is added to parameters, from a direction that points uphill."""
    next(us)
    out = None
    while True:
        gs, ps = yield out
        out = {key: -u for key, u in us.send((gs, ps)).items()}


def lbfgs_direction(memory_size, first="l2", min_curvature=1e-8, skip="relative") -> Reference:
    """Nocedal & Wright 2006, equation 7.19: the matrix H itself, from the last pairs, and its product with g."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    x_before = g_before = out = None
    while True:
        gs, ps = yield out
        g, x = (np.concatenate([tree[key].ravel() for key in gs]) for tree in (gs, ps))
        if x_before is not None:
            s, y = x - x_before, g - g_before
            least = min_curvature * (np.linalg.norm(s) * np.linalg.norm(y) if skip == "relative" else 1)
            if s @ y > least:
                pairs = [*pairs, (s, y)][-memory_size:]
        x_before, g_before = x, g
        identity = np.eye(len(g))
        if pairs:
            s, y = pairs[-1]
            H = (s @ y) / (y @ y) * identity  # equation 7.20
        else:
            H = min(1, 1 / np.linalg.norm(g, {"l2": 2, "l1": 1}[first])) * identity
        for s, y in pairs:
            V = identity - np.outer(y, s) / (y @ s)
            H = V.T @ H @ V + np.outer(s, s) / (y @ s)
        d, out, start = H @ g, {}, 0
        for key, value in gs.items():
            out[key] = d[start : start + value.size].reshape(value.shape)
            start += value.size


def searched(direction: Reference, search: Callable[[Phi], float], value_and_grad: ValueAndGrad) -> Reference:
    """The update −η d with η from a search along d; steepest descent, no longer than 1, where d leads uphill."""
    next(direction)
    out = None
    while True:
        gs, ps = yield out
        ds = direction.send((gs, ps))
        _, rising = value_and_grad(ps)
        if sum((rising[key] * d).sum() for key, d in ds.items()) <= 0:
            norm = np.sqrt(sum((g * g).sum() for g in rising.values()))
            ds = {key: g / max(1, norm) for key, g in rising.items()}

        def phi(eta: float, ps=ps, ds=ds) -> tuple[float, float]:
            value, grads = value_and_grad({key: p - eta * ds[key] for key, p in ps.items()})
            return value, -sum((g * ds[key]).sum() for key, g in grads.items())

        eta = search(phi)
        out = {key: -eta * d for key, d in ds.items()}


def backtracking(c=1e-4, shrink=0.8, grow=1.5, longest=1.0, trials=30) -> Callable[[Phi], float]:
    """Nocedal & Wright 2006, Algorithm 3.1, from a first length that is `grow` times the last one."""
    last = np.inf

    def search(phi: Phi) -> float:
        nonlocal last
        value, slope = phi(0)
        lengths = min(grow * last, longest) * shrink ** np.arange(trials)
        for last in lengths:
            if phi(last)[0] <= value + c * last * slope:
                return last
        return 0.0

    return search


def strong_wolfe(first=1.0, c1=1e-4, c2=0.9, tol=0.0, trials=25) -> Callable[[Phi], float]:
    """Nocedal & Wright 2006, Algorithm 3.5 (line search) and 3.6 (zoom), with the trials of Schmidt's minFunc.

    `tol` is the least width of a bracket.
    """

    def search(phi: Phi) -> float:
        value0, slope0 = phi(0)

        def enough(a: float, value: float) -> bool:  # equation 3.7a
            return value <= value0 + c1 * a * slope0

        def flat(slope: float) -> bool:  # equation 3.7b
            return abs(slope) <= c2 * abs(slope0)

        def zoom(ends: list[tuple[float, float, float]], left: int) -> float:
            close = False
            low, high = sorted(ends, key=lambda point: point[1])
            while left and abs(low[0] - high[0]) >= tol:
                a, b = sorted((low[0], high[0]))
                trial = cubic_minimum(low, high, a, b)
                edge = min(b - trial, trial - a) < (b - a) / 10
                if edge and (close or trial in (a, b)):
                    trial = b - (b - a) / 10 if b - trial < trial - a else a + (b - a) / 10
                    edge = False
                close, left = edge, left - 1
                value, slope = phi(trial)
                new = trial, value, slope
                if not enough(trial, value) or value >= low[1]:
                    low, high = sorted((low, new), key=lambda point: point[1])
                    continue
                if flat(slope):
                    return trial
                if slope * (high[0] - low[0]) >= 0:
                    high = low
                low = new
            return low[0]

        before, a = (0.0, value0, slope0), first
        for i in range(trials):
            value, slope = phi(a)
            new = a, value, slope
            if not enough(a, value) or (i > 1 and value >= before[1]):
                return zoom([before, new], trials - i - 1)
            if flat(slope):
                return a
            if slope >= 0:
                return zoom([before, new], trials - i - 1)
            a, before = cubic_minimum(before, new, a + (a - before[0]) / 100, 10 * a), new
        return before[0]

    return search


def cubic_minimum(x, y, lowest, highest) -> float:
    """Nocedal & Wright 2006, equation 3.59, between bounds."""
    d1 = x[2] + y[2] - 3 * (x[1] - y[1]) / (x[0] - y[0])
    if d1**2 < x[2] * y[2]:
        return (lowest + highest) / 2
    d2 = np.sign(y[0] - x[0]) * np.sqrt(d1**2 - x[2] * y[2])
    return float(np.clip(y[0] - (y[0] - x[0]) * (y[2] + d2 - d1) / (y[2] - x[2] + 2 * d2), lowest, highest))


def bowl(ps: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Σ √(1 + x²) − 1, a smooth convex loss, and its gradient."""
    value = sum((p * p / (1 + np.sqrt(1 + p * p))).sum() for p in ps.values())
    return value, {key: p / np.sqrt(1 + p * p) for key, p in ps.items()}
