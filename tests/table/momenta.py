"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""

from table.row import Row

ROWS: list[Row] = []
