"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""

from table.row import Row

ROWS: list[Row] = []
