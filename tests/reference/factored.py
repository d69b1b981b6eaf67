"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""

import itertools

import numpy as np

from reference.core import Reference, at, rms


def two_largest(shape, least) -> tuple[int, int] | None:
    """Shazeer & Stern 2018, section 3, as T5X reads it: the two largest axes, of equal ones the later."""
    if len(shape) < 2 or 0 in shape:
        return None
    second, first = sorted((size, axis) for axis, size in enumerate(shape))[-2:]
    return (second[1], first[1]) if second[0] >= least else None


def last_two(shape) -> tuple[int, int] | None:
    return (len(shape) - 2, len(shape) - 1) if len(shape) > 1 and 0 not in shape else None


def _outer(r, c, axes):
    """Of each matrix that the axes (row, column) span, the outer product of r and c."""
    row, column = axes
    spread = np.zeros(np.broadcast_shapes(np.expand_dims(r, column).shape, np.expand_dims(c, row).shape))
    return spread + np.expand_dims(r, column) * np.expand_dims(c, row)


def adafactor_direction(axes_of, decay_rate, decay_offset, threshold, eps, floor=False) -> Reference:
    """Shazeer & Stern 2018, Algorithm 4 (Algorithm 5 where `axes_of` gives no axes) up to Û, with β̂₂ of section 7.2.

    With `floor`, ε is where PyTorch has it: a least value of the mean of R, and of √V̂.
    """
    v = r = c = out = None
    for t in itertools.count(1):
        g, _ = yield out
        e = at(eps, t)
        beta2 = 1 - float(max(t - at(decay_offset, t), 1)) ** -at(decay_rate, t)
        square = np.abs(g) ** 2 + (0 if floor else e)
        axes = axes_of(g.shape)
        if axes is None:
            v = square if v is None else beta2 * v + (1 - beta2) * square  # Algorithm 5, line 4
            v_hat = v
        else:
            row, column = axes
            # Algorithm 4, lines 4 to 6, in sums. Sums over rows and columns of one matrix have one total.
            mean_r, mean_c = square.sum(column) / g.shape[column], square.sum(row) / g.shape[row]
            r = mean_r if r is None else beta2 * r + (1 - beta2) * mean_r
            c = mean_c if c is None else beta2 * c + (1 - beta2) * mean_c
            total = np.expand_dims(c.mean(column - (row < column), keepdims=True), row)
            v_hat = _outer(r, c, axes) / (np.maximum(total, e) if floor else total)
        root = np.maximum(np.sqrt(v_hat), e) if floor else np.sqrt(v_hat)
        u = np.divide(g, root, where=root > 0, out=np.zeros_like(g))
        d = np.inf if threshold is None else at(threshold, t)
        out = u / max(1, rms(u) / d)  # line 8


def adafactor_step(learning_rate, min_rms, relative, momentum=None, weight_decay=0.0, decay="decoupled") -> Reference:
    """Algorithm 4, lines 2 and 9, with a running mean of what is taken off, and decay beside it."""
    seen, out = [], None
    for t in itertools.count(1):
        u, p = yield out
        alpha = at(learning_rate, t)
        rho = min(alpha, 1 / np.sqrt(t)) if relative else alpha
        size = rho if min_rms is None else rho * max(at(min_rms, t), rms(p))
        seen.append(size * u)
        beta = 0 if momentum is None else at(momentum, t)
        mean = sum((1 - beta) * beta ** (t - i) * x for i, x in enumerate(seen, 1))
        out = -mean - at(weight_decay, t) * p * {"decoupled": alpha, "scaled": size, "fixed": 1}[decay]


def sm3_direction(momentum, eps=0.0) -> Reference:
    """Anil et al. 2019, Algorithm SM3-II, element by element; the momentum is that of the authors' code."""
    mu, m, out = {}, 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        scaled, nu = np.zeros_like(g), {}
        for i in np.ndindex(*g.shape):
            # The sets that hold element i: its slice by each axis. Of a vector or a scalar, the element itself.
            sets = [(axis, i[axis]) for axis in range(g.ndim)] or [()]
            value = min(mu.get(r, 0.0) for r in sets) + np.abs(g[i]) ** 2  # line 6
            if value > 0:
                scaled[i] = g[i] / np.sqrt(value + at(eps, t))  # line 7, 0/0 = 0
            for r in sets:
                nu[r] = max(nu.get(r, 0.0), value)  # line 8
        mu = nu
        beta = 0 if momentum is None else at(momentum, t)
        m = beta * m + (1 - beta) * scaled
        out = m
