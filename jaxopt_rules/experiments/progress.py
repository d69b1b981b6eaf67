"""Progress bars that work in terminals and in Jupyter, and Ctrl-C between steps."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

REFRESH = 0.1  # seconds between two pictures of a bar in Jupyter


class Bar:
    """Counts what is done. `advance` says so, and from then on whether Ctrl-C was pressed."""

    def __init__(self, show: Callable[[float, str], object], interrupted: Callable[[], bool]) -> None:
        self._show, self._interrupted, self._done = show, interrupted, 0.0

    def advance(self, amount: float, text: str = "") -> bool:
        """Whether to go on."""
        self._done += amount
        self._show(self._done, text)
        return not self._interrupted()


@contextlib.contextmanager
def progress(title: str, total: float, shown: bool = True) -> Iterator[Bar]:
    """A bar from 0 to `total`: rich's in a terminal, one of HTML in Jupyter, none where neither is there.

    While it lasts, Ctrl-C is noted and not raised (see `interrupts_noted`).
    """
    with (
        interrupts_noted() as interrupted,
        _display(title, total) if shown else contextlib.nullcontext(_nothing) as show,
    ):
        yield Bar(show, interrupted)


def _nothing(done: float, text: str) -> None:
    """Where nothing is shown."""


def _display(title: str, total: float) -> contextlib.AbstractContextManager[Callable[[float, str], object]]:
    if _in_jupyter():
        return _html(title, total)
    return _terminal(title, total) if sys.stderr.isatty() else contextlib.nullcontext(_nothing)


def _in_jupyter() -> bool:
    """Whether a kernel displays what is given to it. IPython in a terminal is a terminal."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


@contextlib.contextmanager
def _terminal(title: str, total: float) -> Iterator[Callable[[float, str], object]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield _nothing
        return
    # Names of rules have brackets.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total, text="")
        yield lambda done, text: bars.update(task, completed=done, text=text)


@contextlib.contextmanager
def _html(title: str, total: float) -> Iterator[Callable[[float, str], object]]:
    # Widgets, which the bars of other libraries are, need a package in the kernel and another in the front end.
    from IPython.display import display

    def bundle(html: str, plain: str) -> dict[str, str]:
        return {"text/html": html, "text/plain": plain}

    began = shown = time.perf_counter()
    handle: Any = display(bundle(escape(title), title), raw=True, display_id=True)

    def show(done: float, text: str) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown < REFRESH and done < total:
            return
        shown = now
        left = f"{(now - began) / done * (total - done):.0f} s left" if done else ""
        bar = f'<progress max="{total}" value="{done}"></progress>'
        html = " ".join([escape(title), bar, left, escape(text)])
        handle.update(bundle(html, f"{title} {100 * done / total:.0f} %"), raw=True)

    try:
        yield show
    finally:
        handle.update(bundle("", ""), raw=True)


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second Ctrl-C is raised as ever.

    A KeyboardInterrupt is lost where it meets a callback of the garbage collector, and jax has one.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, before)
