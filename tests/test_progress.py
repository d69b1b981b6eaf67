"""Progress bars: in a terminal, in Jupyter, and nowhere else."""

import io
import signal
import sys

import IPython.core.getipython
import IPython.display
import pytest

from jaxopt_rules.experiments import progress as module
from jaxopt_rules.experiments.progress import interrupts_noted, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Handle:
    """As `IPython.display.display(..., display_id=True)` gives it."""

    def __init__(self):
        self.shown = []

    def update(self, shown, *, raw):
        assert raw
        self.shown.append(shown)


@pytest.fixture
def jupyter(monkeypatch):
    """The pictures that a kernel is given."""
    handle = Handle()

    def display(shown, *, raw, display_id):
        handle.update(shown, raw=raw)
        return handle

    kernel = type("Shell", (), {"kernel": None})()
    monkeypatch.setattr(IPython.core.getipython, "get_ipython", lambda: kernel)
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(module, "REFRESH", 0)
    return handle.shown


def test_in_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("chain[0]", 4) as bar:
        assert bar.advance(1, "one [of] four")
        assert bar.advance(3)
    shown = terminal.getvalue()
    assert "chain[0]" in shown
    assert "100%" in shown
    assert shown.endswith("\x1b[2K")  # it leaves no line behind


def test_in_jupyter(jupyter):
    with progress("a < b", 4) as bar:
        assert bar.advance(1, "<one>")
        assert bar.advance(3)
    first, quarter, whole, last = (shown["text/html"] for shown in jupyter)
    assert first == "a &lt; b"
    assert quarter.startswith('a &lt; b <progress max="4" value="1.0"></progress>')
    assert quarter.endswith("s left &lt;one&gt;")
    assert 'value="4.0"' in whole
    assert last == ""
    assert [shown["text/plain"] for shown in jupyter] == ["a < b", "a < b 25 %", "a < b 100 %", ""]


def test_the_bar_goes_when_something_is_raised(jupyter):
    with pytest.raises(ZeroDivisionError), progress("title", 4):
        raise ZeroDivisionError
    assert [shown["text/html"] for shown in jupyter] == ["title", ""]


def test_nothing_in_a_file_and_nothing_unasked_for(capsys, jupyter):
    with progress("title", 4, shown=False) as bar:
        assert bar.advance(1)
    assert jupyter == []
    assert capsys.readouterr() == ("", "")


def test_nothing_in_a_pipe(capsys):
    with progress("title", 4) as bar:
        assert bar.advance(1)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_is_noted_and_a_second_one_raised():
    with progress("title", 4, shown=False) as bar:
        assert bar.advance(1)
        signal.raise_signal(signal.SIGINT)
        assert not bar.advance(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_of_ctrl_c_is_left_alone(monkeypatch):
    caught = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with interrupts_noted() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]
