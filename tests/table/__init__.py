"""One row per rule: how it is made, what it is held against, and what is particular about it."""

from table import adam, averaging, core, distance, factored, gradient, loss, matrices, momenta, norms, wrappers
from table.row import Row as Row

MODULES = [core, wrappers, gradient, adam, momenta, norms, factored, matrices, averaging, distance, loss]
ROWS = [row for module in MODULES for row in module.ROWS]
