"""HTML and SVG for notebooks, in the font and the colours of the page: light, dark, or any other."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

# The drawing: the area of the line, and what is left of it and below it for the ends of the axes.
_WIDTH, _HEIGHT, _LEFT, _BELOW = 180, 56, 54, 14


def code(text: str) -> str:
    """Text in the font of code, broken anywhere where it is longer than a line."""
    return f'<code style="background: none; white-space: pre-wrap; overflow-wrap: anywhere">{escape(text)}</code>'


def faint(text: str) -> str:
    """A remark."""
    return f'<span style="opacity: 0.65">{escape(text)}</span>'


def indented(content: str, depth: int) -> str:
    return f'<div style="padding-left: {1.5 * depth}em">{content}</div>'


def table(
    head: Sequence[str], body: Iterable[Sequence[str]], foot: Sequence[str] = (), right: Sequence[bool] = ()
) -> str:
    """A table of cells that are HTML. A row of one cell is a heading within it.

    Args:
      right: by column, whether it holds numbers, which end where the column ends.
    """
    sides = right or [False] * len(head)

    def row(cells: Sequence[str], tag: str) -> str:
        if len(cells) == 1 < len(head):
            return f'<tr><{tag} colspan="{len(head)}" style="text-align: left">{cells[0]}</{tag}></tr>'
        shown = [
            f'<{tag} style="text-align: {"right" if side else "left"}; vertical-align: top">{x}</{tag}>'
            for x, side in zip(cells, sides, strict=True)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    rows = "".join(row(cells, "td") for cells in body)
    below = f"<tfoot>{row(foot, 'td')}</tfoot>" if foot else ""
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{rows}</tbody>{below}</table>"


def line_plot(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A small drawing of the line through points. Its axes are labelled with their ends."""
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def at(x: float, y: float) -> tuple[str, str]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{_LEFT + 3 + along * (_WIDTH - 3):.1f}", f"{3 + (1 - up) * (_HEIGHT - 6):.1f}"

    points = " ".join(",".join(point) for point, _ in groupby(map(at, xs, ys)))
    bottom, edge = _HEIGHT + _BELOW - 3, _LEFT + _WIDTH
    ends = [(_LEFT, bottom, "start", f"{left:.10g}"), (edge, bottom, "end", f"{right:.10g}")]
    ends += [(_LEFT - 4, 10, "end", f"{high:.4g}")]
    ends += [(_LEFT - 4, _HEIGHT, "end", f"{low:.4g}")] if low < high else []
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" stroke="none" fill="currentColor" font-size="10">{number}</text>'
        for x, y, anchor, number in ends
    )
    size = f'width="{edge + 2}" height="{_HEIGHT + _BELOW}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {edge + 2} {_HEIGHT + _BELOW}" '
        'fill="none" stroke="currentColor" style="display: block; margin: 0.2em 0">'
        f'<path d="M{_LEFT},0V{_HEIGHT}H{edge}" stroke-opacity="0.35"/>'
        f'<polyline points="{points}" stroke-width="1.5" stroke-linejoin="round"/>{labels}</svg>'
    )
