"""Rules that find their learning rate: Prodigy, DoG."""

from table.row import Row

ROWS: list[Row] = []
