"""Adam's family."""

from table.row import Row

ROWS: list[Row] = []
