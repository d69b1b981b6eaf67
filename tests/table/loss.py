"""Rules that need the loss: Polyak, L-BFGS."""

from table.row import Row

ROWS: list[Row] = []
