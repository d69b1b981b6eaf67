"""Rules without a direction of their own, and those that scale by sums and means of squares."""

import itertools

import numpy as np

from reference.core import Reference, at


def dampened_velocity(momentum, dampening) -> Reference:
    """PyTorch's SGD, as its documentation states the algorithm: b₁ = g₁, and bₜ = μ bₜ₋₁ + (1 − τ) gₜ for t > 1."""
    b = out = None
    for t in itertools.count(1):
        g, _ = yield out
        b = g if b is None else at(momentum, t) * b + g - at(dampening, t) * g
        out = b


def mean_velocity(momentum, nesterov=False) -> Reference:
    """The weighted sum that the running mean is: v = Σ (1 − μ) μ^(t − i) gᵢ. With `nesterov` that of one update more,
    in which the same gradient comes again. For a constant μ."""
    seen, out = [], None
    while True:
        g, _ = yield out
        seen.append(g)
        last = [*seen, g] if nesterov else seen
        out = (1 - momentum) * sum(momentum**age * x for age, x in enumerate(reversed(last)))


def momentum_inside(learning_rate, momentum, nesterov=False, weight_decay=0.0) -> Reference:
    """Sutskever et al. 2013, equations 1 to 4. With Nesterov's gradient, taken at φ = θ + μ v, the parameters of the
    program are φ. Decay is that of Keras, θ ← θ − α λ θ. For a constant μ."""
    v, out = 0.0, None
    for t in itertools.count(1):
        g, p = yield out
        before, alpha = v, at(learning_rate, t)
        v = momentum * before - alpha * g  # equations 1, 3
        moved = v + momentum * (v - before) if nesterov else v  # equations 2, 4: θ moves by v, φ by v + μ (v − before)
        out = moved - alpha * at(weight_decay, t) * p


def signum_direction(beta) -> Reference:
    """Bernstein et al. 2018, Algorithm 2."""
    m, out = 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        m = at(beta, t) * m + (1 - at(beta, t)) * g
        out = np.where(m > 0, 1.0, np.where(m < 0, -1.0, 0.0))


def adagrad_direction(initial, eps, inside, lr_decay=0.0) -> Reference:
    """Duchi et al. 2011, Figure 1, with diagonal matrices: over the norm of all gradients so far, to which δ is added
    (Optax: to its square). The factor of the rate is PyTorch's."""
    history, out = [], None
    for t in itertools.count(1):
        g, _ = yield out
        history.append(g)
        square = initial + np.sum(np.abs(history) ** 2, axis=0)
        out = g / (np.sqrt(square + eps) if inside else np.sqrt(square) + eps) / (1 + (t - 1) * lr_decay)


def adadelta_direction(rho, eps) -> Reference:
    """Zeiler 2012, Algorithm 1; its Δx is −out."""
    g2 = x2 = 0.0
    out = None
    for t in itertools.count(1):
        g, _ = yield out
        decay = at(rho, t)
        g2 = decay * g2 + (1 - decay) * g**2  # line 4
        out = np.sqrt(x2 + eps) / np.sqrt(g2 + eps) * g  # line 5
        x2 = decay * x2 + (1 - decay) * out**2  # line 6


def rmsprop_direction(rho, eps, initial=0.0, inside=True, centered=False) -> Reference:
    """Graves 2013, equations 38 to 40: n, g and n − g². What n begins with, and ε outside, are TensorFlow's and
    PyTorch's."""
    n, mean, out = initial, 0.0, None
    for t in itertools.count(1):
        g, _ = yield out
        decay = at(rho, t)
        n = decay * n + (1 - decay) * g**2
        mean = decay * mean + (1 - decay) * g
        square = n - mean**2 if centered else n
        out = g / (np.sqrt(square + eps) if inside else np.sqrt(square) + eps)


def rprop(learning_rate, eta_minus, eta_plus, smallest, largest) -> Reference:
    """Igel & Hüsken 2003, Algorithm 4 (iRprop⁻), element by element. A step size moves with the rate, which is its
    first value, and the bounds hold what signs do to it."""
    ratio = last = out = None
    for t in itertools.count(1):
        g, _ = yield out
        alpha = at(learning_rate, t)
        g = np.array(g)
        ratio = np.ones_like(g) if ratio is None else ratio
        last = np.zeros_like(g) if last is None else last
        for i in np.ndindex(g.shape):
            size = alpha * ratio[i]
            if last[i] * g[i] > 0 and 0 < size < largest:
                ratio[i] = ratio[i] * eta_plus if size * eta_plus <= largest else largest / alpha
            elif last[i] * g[i] < 0:
                if size > smallest:
                    ratio[i] = ratio[i] * eta_minus if size * eta_minus >= smallest else smallest / alpha
                g[i] = 0.0
        last = g
        out = -np.sign(g) * alpha * ratio
