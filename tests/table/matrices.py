"""Rules on matrices: Muon."""

from table.row import Row

ROWS: list[Row] = []
