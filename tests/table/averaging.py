"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""

from table.row import Row

ROWS: list[Row] = []
