"""Tables: aligned text in a terminal, HTML in Jupyter, and rows of plain values for pandas."""

import keyword
import re
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from numbers import Integral, Number
from typing import Any

from jaxopt_rules import markup

_MOST_ROWS = 1000  # that are shown in HTML


@dataclass(frozen=True, repr=False)
class Table:
    """What prints as aligned text and shows as HTML in Jupyter; `pandas.DataFrame(table.rows)` has the values."""

    columns: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]  # row by row
    total: tuple[Any, ...] | None = None  # one more row, below the others

    @property
    def rows(self) -> list[Any]:
        """The rows without the total, as named tuples of numbers and text.

        `top-1` is called `top_1` in them, and where several columns have one name, the second is called `top_1_2`.
        """
        return list(map(namedtuple("Row", _fields(self.columns))._make, self.cells))

    def __repr__(self) -> str:
        lines, right = self._lines(self.cells), self._right()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def aligned(line: Sequence[str]) -> str:
            cells = zip(line, widths, right, strict=True)
            return "  ".join(x.rjust(width) if side else x.ljust(width) for x, width, side in cells).rstrip()

        head, *body = map(aligned, lines)
        ruler = "  ".join("-" * width for width in widths)
        if self.total is not None:
            body.insert(-1, ruler)
        return "\n".join([head, ruler, *body])

    def _repr_html_(self) -> str:
        """The first thousand rows, in a box of its own that scrolls where there are many."""
        right = self._right()
        # A number stays on one line with its unit.
        head, *body = [
            [escape(x).replace(" ", "&nbsp;") if side else escape(x) for x, side in zip(line, right, strict=True)]
            for line in self._lines(self.cells[:_MOST_ROWS])
        ]
        foot = () if self.total is None else body.pop()
        if more := len(self.cells[_MOST_ROWS:]):
            body.append([markup.faint(f"and {more:,} more rows: .rows has all")])
        return f'<div style="max-height: 40em; overflow: auto">{markup.table(head, body, foot, right)}</div>'

    def _lines(self, cells: tuple[tuple[Any, ...], ...]) -> list[list[str]]:
        rows = cells if self.total is None else (*cells, self.total)
        return [list(map(str, self.columns))] + [list(map(_text, self.columns, row)) for row in rows]

    def _right(self) -> list[bool]:
        """Which columns hold numbers."""
        columns = zip(*self.cells, strict=True) if self.cells else [()] * len(self.columns)
        return [bool(column) and all(isinstance(x, Number) or x in ("", None) for x in column) for column in columns]


def _fields(columns: Sequence[Any]) -> list[str]:
    """The names of columns as those that Python takes, each once."""
    plain = list(map(_field, columns))
    names: list[str] = []
    for name in plain:
        others = (f"{name}_{k}" for k in count(2))
        free = next(other for other in others if other not in plain and other not in names) if name in names else name
        names.append(free)
    return names


def _field(column: Any) -> str:
    name = re.sub(r"\W", "_", str(column))
    return name if name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_") else f"x{name}"


def _text(column: str, value: Any) -> str:
    if column == "bytes" and isinstance(value, Integral):
        return size_text(int(value))
    if isinstance(value, Number) and not isinstance(value, Integral):
        return f"{value:g}"
    return "" if value is None else str(value)


def size_text(number: int) -> str:
    """Bytes as one reads them: `512 B`, `1.5 KiB`, `3.0 GiB`."""
    power = min(max(number.bit_length() - 1, 0) // 10, 4)
    return f"{number / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{number} B"
