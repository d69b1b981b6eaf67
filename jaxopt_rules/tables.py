"""Tables: aligned text in a terminal, HTML in Jupyter, and rows of plain values for pandas."""

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Number
from typing import Any


@dataclass(frozen=True, repr=False)
class Table:
    """What prints as aligned text and shows as HTML in Jupyter; `pandas.DataFrame(table.rows)` has the values."""

    columns: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]  # row by row
    total: tuple[Any, ...] | None = None  # one more row, below the others

    @property
    def rows(self) -> list[Any]:
        """The rows without the total, as named tuples of numbers and text."""
        return list(map(namedtuple("Row", self.columns)._make, self.cells))

    def __repr__(self) -> str:
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head, *body = [self._aligned(line, widths) for line in lines]
        ruler = "  ".join("-" * width for width in widths)
        if self.total is not None:
            body.insert(-1, ruler)
        return "\n".join([head, ruler, *body])

    def _repr_html_(self) -> str:
        head, *lines = self._lines()
        body = [self._html(line, "td") for line in lines]
        foot = "" if self.total is None else f"<tfoot>{body.pop()}</tfoot>"
        return f"<table><thead>{self._html(head, 'th')}</thead><tbody>{''.join(body)}</tbody>{foot}</table>"

    def _lines(self) -> list[list[str]]:
        rows = self.cells if self.total is None else (*self.cells, self.total)
        return [list(self.columns)] + [list(map(_text, self.columns, row)) for row in rows]

    def _right(self) -> list[bool]:
        """Which columns hold numbers."""
        columns = zip(*self.cells, strict=True) if self.cells else [()] * len(self.columns)
        return [all(isinstance(x, Number) or x in ("", None) for x in column) for column in columns]

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        cells = zip(line, widths, self._right(), strict=True)
        return "  ".join(x.rjust(width) if right else x.ljust(width) for x, width, right in cells).rstrip()

    def _html(self, line: Sequence[str], tag: str) -> str:
        sides = ["right" if right else "left" for right in self._right()]
        cells = [f'<{tag} style="text-align: {side}">{escape(x)}</{tag}>' for x, side in zip(line, sides, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"


def _text(column: str, value: Any) -> str:
    if column == "bytes" and isinstance(value, Integral):
        return _size(int(value))
    if isinstance(value, Number) and not isinstance(value, Integral):
        return f"{value:g}"
    return "" if value is None else str(value)


def _size(number: int) -> str:
    """Bytes as one reads them: `512 B`, `1.5 KiB`, `3.0 GiB`."""
    power = min(max(number.bit_length() - 1, 0) // 10, 4)
    return f"{number / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{number} B"
