"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""

from table.row import Row

ROWS: list[Row] = []
