"""To look at optimizers, compare them, and sweep over their hyperparameters.

    from jaxopt_rules import experiments

    problem = experiments.digits_mlp()
    rates = {"learning_rate": np.geomspace(1e-4, 1e-1, 8)}
    result = experiments.sweep(adamw, rates, problem.loss_fn, problem.init, problem.batches, evaluate=problem.evaluate)
    result.plot()

Plots, progress bars and data need more than jax: `pip install "jaxopt_rules[experiments]"`.
"""

from jaxopt_rules.experiments.comparison import Comparison as Comparison
from jaxopt_rules.experiments.comparison import compare as compare
from jaxopt_rules.experiments.histories import History as History
from jaxopt_rules.experiments.histories import history as history
from jaxopt_rules.experiments.histories import observe as observe
from jaxopt_rules.experiments.problems import Problem as Problem
from jaxopt_rules.experiments.problems import digits_mlp as digits_mlp
from jaxopt_rules.experiments.problems import source_transformer as source_transformer
from jaxopt_rules.experiments.problems import table_mlp as table_mlp
from jaxopt_rules.experiments.range_test import RangeTest as RangeTest
from jaxopt_rules.experiments.range_test import learning_rate_range_test as learning_rate_range_test
from jaxopt_rules.experiments.sweeps import Sweep as Sweep
from jaxopt_rules.experiments.sweeps import sweep as sweep
from jaxopt_rules.experiments.trajectories import Surface as Surface
from jaxopt_rules.experiments.trajectories import Trajectory as Trajectory
from jaxopt_rules.experiments.trajectories import beale as beale
from jaxopt_rules.experiments.trajectories import himmelblau as himmelblau
from jaxopt_rules.experiments.trajectories import ravine as ravine
from jaxopt_rules.experiments.trajectories import rosenbrock as rosenbrock
from jaxopt_rules.experiments.trajectories import saddle as saddle
from jaxopt_rules.experiments.trajectories import trajectory as trajectory
