"""To look at optimizers, compare them, and sweep over their hyperparameters.

    from jaxopt_rules import experiments

    result = experiments.sweep(adamw, {"learning_rate": np.geomspace(1e-4, 1e-1, 8)}, loss_fn, params, batches)

Plots, progress bars and data need more than jax: `pip install "jaxopt_rules[experiments]"`.
"""

from jaxopt_rules.experiments.sweeps import Sweep, sweep

__all__ = ["Sweep", "sweep"]
