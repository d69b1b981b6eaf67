"""Selection: which leaves of a tree something applies to, and which group each of them belongs to.

A selector is a glob pattern on paths (`*` stands for one segment or a part of one, `**` for any number of
segments, and a pattern matches the whole path), a compiled regular expression, which matches the whole path as well, a
predicate `(path, array) -> bool`, which is asked about arrays of floating-point numbers alone, or a list of these.
`None` selects everything.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.trees import quoted


@dataclass(frozen=True, repr=False)
class ByNdim:
    """A predicate: arrays with as many axes as that. Made by `by_ndim`."""

    ndims: tuple[int, ...]
    least: int | None

    def __call__(self, path: str, array: Any) -> bool:
        return array.ndim in self.ndims or (self.least is not None and array.ndim >= self.least)

    def __repr__(self) -> str:
        shown = [*map(str, self.ndims)] + ([] if self.least is None else [f"least={self.least}"])
        return f"by_ndim({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Excluding:
    """A selector: everything but what these select. Made by `excluding`."""

    selectors: tuple["Part", ...]

    def __repr__(self) -> str:
        return f"excluding({', '.join(map(repr, self.selectors))})"


Part = str | re.Pattern[str] | Excluding | Callable[[str, Any], bool]
Selector = Part | Sequence[Part]
By = Mapping[str, Selector] | Callable[[str, Any], str]


def by_ndim(*ndims: int, least: int | None = None) -> ByNdim:
    """A selector: the arrays with as many axes as one of `ndims`, or with `least` axes and more.

        adamw(3e-4, weight_decay=0.1, where=by_ndim(least=2))

    Raises:
      TypeError: no number is given, or one that is no integer.
    """
    numbers = ndims if least is None else (*ndims, least)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"by_ndim takes numbers of axes, by_ndim(2, 3) or by_ndim(least=2), not {numbers}")
    return ByNdim(ndims, least)


matrices = by_ndim(2)
"""A selector: the arrays with two axes."""


def excluding(*selectors: Part) -> Excluding:
    """A selector: everything but what one of these patterns, regular expressions and predicates selects.

        adamw(3e-4, weight_decay=0.1, where=excluding("**/bias", "**/scale"))

    Raises:
      TypeError: something else is given, or nothing.
      ValueError: when it is used on a tree: a pattern matches nothing.
    """
    if not selectors:
        raise TypeError("excluding takes what to leave out, excluding('**/bias', '**/scale'); None selects everything")
    check_selector(selectors, "excluding")
    return Excluding(selectors)


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    regex = ""
    segments = pattern.split("/")
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            regex += ".*" if last else "(?:.*/)?"
        else:
            regex += "".join("[^/]*" if c == "*" else re.escape(c) for c in segment)
            regex += "" if last else "/"
    return re.compile(regex, re.DOTALL)


def matches(pattern: str | re.Pattern[str], path: str) -> bool:
    """Whether a glob pattern or a regular expression matches the whole of a path.

    >>> matches("blocks/*/attn/w", "blocks/0/attn/w"), matches("**/bias", "bias"), matches("*/bias", "bias")
    (True, True, False)
    """
    regex = _compiled(pattern) if isinstance(pattern, str) else pattern
    return regex.fullmatch(path) is not None


def _is_part(x: object) -> bool:
    return isinstance(x, str | re.Pattern | Excluding) or callable(x)


def check_selector(selector: object, owner: str) -> None:
    """Refuses what is no selector.

    Raises:
      TypeError: `selector` is neither a pattern, a regular expression, a predicate, a sequence of these, nor `None`.
    """
    listed = isinstance(selector, Sequence) and all(map(_is_part, selector))
    if not (selector is None or listed or _is_part(selector)):
        raise TypeError(
            f"{owner} takes a pattern like '**/w', a regular expression (re.compile), a function (path, array) -> "
            f"bool, or a list of these, not {selector!r}; what a tree of booleans would mark is written as one of them"
        )


def check_by(by: object, owner: str, labels: Sequence[str]) -> None:
    """Refuses what does not tell which leaf belongs to which of these groups.

    Raises:
      TypeError: `by` is neither a mapping nor a function, or something in it is no selector.
      ValueError: it has a label that is none of `labels`, or lacks more than one of them.
    """
    known = ", ".join(map(repr, labels))
    if not isinstance(by, Mapping):
        if isinstance(by, Excluding) or not callable(by):
            raise TypeError(
                f"{owner}: by is a dict with a selector for each label, by={{{labels[0]!r}: '**/w'}}, or a function "
                f"(path, array) -> label, not {by!r}"
            )
        return
    for name, selector in by.items():
        if name not in labels:
            raise ValueError(f"{owner}: by has the label {name!r}, which is none of {known}")
        check_selector(selector, f"{owner}: by[{name!r}]")
    if len(missing := [name for name in labels if name not in by]) > 1:
        raise ValueError(
            f"{owner}: by has no selector for {', '.join(map(repr, missing))}; one label may be left out and has the "
            "rest"
        )


def select(selector: Selector | None, paths: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """For each leaf, whether it is selected.

    Raises:
      ValueError: a pattern matches none of the paths.
    """
    match selector:
        case None:
            return [True] * len(paths)
        case str() | re.Pattern():
            hits = [matches(selector, path) for path in paths]
            if paths and not any(hits):
                raise ValueError(f"the pattern {_text(selector)} matches none of {_listed(paths)}")
            return hits
        case Excluding(selectors=excluded):
            return [not hit for hit in select(excluded, paths, leaves)]
        case Sequence():
            columns = [select(part, paths, leaves) for part in selector]
            return [any(hits) for hits in zip([False] * len(paths), *columns, strict=True)]
        case predicate:
            return [is_inexact(leaf) and bool(predicate(path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]


def label(by: By, paths: Sequence[str], leaves: Sequence[Any], labels: Sequence[str]) -> list[str | None]:
    """For each leaf, the label of its group; `None` for what is no array of floating-point numbers.

    Raises:
      ValueError: a leaf belongs to two groups, to none, or to one that does not exist; or a pattern or a selector in
        `by` matches nothing. Where there are absent leaves (`None`), a predicate may have been meant for them.
    """
    if not isinstance(by, Mapping):
        return [_answer(by, path, x, labels) if is_inexact(x) else None for path, x in zip(paths, leaves, strict=True)]
    columns = {name: select(selector, paths, leaves) for name, selector in by.items()}
    rest = next((name for name in labels if name not in by), None)
    owners: list[str | None] = []
    for k, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        mine = [name for name, hits in columns.items() if hits[k]] or [rest]
        if not is_inexact(leaf):
            mine = [None]
        elif len(mine) > 1:
            raise ValueError(
                f"{quoted(path)} belongs to two groups, {mine[0]!r} and {mine[1]!r}; make their selectors disjoint"
            )
        elif mine == [None]:
            raise ValueError(
                f"{quoted(path)} belongs to none of the groups {', '.join(map(repr, labels))}; one label that is left "
                "out of `by` has the rest"
            )
        owners += mine
    for name, hits in columns.items():
        if paths and not any(hits) and not any(leaf is None for leaf in leaves):
            raise ValueError(f"the group {name!r}, {_text(by[name])}, has none of {_listed(paths)}")
    return owners


def _answer(by: Callable[[str, Any], str], path: str, leaf: Any, labels: Sequence[str]) -> str:
    answer = by(path, leaf)
    if isinstance(answer, bool | np.bool_):
        raise ValueError(
            f"by gave {answer} for {quoted(path)}; a predicate stands for one label: by={{{labels[0]!r}: predicate}}"
        )
    if answer not in labels:
        raise ValueError(
            f"by gave the label {answer!r} for {quoted(path)}; the groups are {', '.join(map(repr, labels))}"
        )
    return answer


def _text(selector: Any) -> str:
    return repr(selector.pattern) if isinstance(selector, re.Pattern) else repr(selector)


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
    return ", ".join(map(quoted, paths[:10])) + more
