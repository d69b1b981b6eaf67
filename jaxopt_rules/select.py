"""Selection: which leaves of a tree something applies to.

A selector is a glob pattern on paths (`*` stands for one segment or a part of one, `**` for any number of
segments, and a pattern matches the whole path), a list of patterns, or a predicate `(path, array) -> bool`, which is
asked about arrays of floating-point numbers alone. `None` selects everything.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.trees import quoted

Selector = str | Sequence[str] | Callable[[str, Any], bool]


def matches(pattern: str, path: str) -> bool:
    """Whether a glob pattern matches the whole of a path.

    >>> matches("blocks/*/attn/w", "blocks/0/attn/w"), matches("**/bias", "bias"), matches("*/bias", "bias")
    (True, True, False)
    """
    regex = ""
    segments = pattern.split("/")
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            regex += ".*" if last else "(?:.*/)?"
        else:
            regex += "".join("[^/]*" if c == "*" else re.escape(c) for c in segment)
            regex += "" if last else "/"
    return re.fullmatch(regex, path, re.DOTALL) is not None


def check_selector(selector: object, owner: str) -> None:
    """Refuses what is no selector.

    Raises:
      TypeError: `selector` is neither a pattern, a sequence of patterns, a predicate nor `None`.
    """
    patterns = isinstance(selector, str) or (
        isinstance(selector, Sequence) and all(isinstance(pattern, str) for pattern in selector)
    )
    if not (selector is None or patterns or callable(selector)):
        raise TypeError(
            f"{owner} takes a pattern like '**/w', a list of patterns, or a function (path, array) -> bool, "
            f"not {selector!r}"
        )


def select(selector: Selector | None, paths: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """For each leaf, whether it is selected.

    Raises:
      ValueError: a pattern matches none of the paths.
    """
    if selector is None:
        return [True] * len(leaves)
    if callable(selector):
        return [is_inexact(leaf) and bool(selector(path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]
    patterns = [selector] if isinstance(selector, str) else list(selector)
    hits = {pattern: [matches(pattern, path) for path in paths] for pattern in patterns}
    for pattern, hit in hits.items():
        if paths and not any(hit):
            raise ValueError(f"the pattern {pattern!r} matches none of {', '.join(map(quoted, paths))}")
    return [any(column) for column in zip(*hits.values(), strict=True)] if hits else [False] * len(leaves)
