"""Rules without a direction of their own, and those that scale by sums and means of squares."""

from table.row import Row

ROWS: list[Row] = []
