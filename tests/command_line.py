"""What the tests of commands share."""

import matplotlib.image
import numpy as np

from jaxopt_rules.__main__ import main


def check_refused(argv, message, capsys):
    """Exit code 2, and one line on stderr that has the message."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("python -m jaxopt_rules: ")
    assert message in captured.err


def check_png(path):
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 800
    assert len(np.unique(image[::7, ::7].reshape(-1, 4), axis=0)) > 5
    assert not [other for other in path.parent.iterdir() if other.name.startswith(".")]


def cells_of(printed, first):
    """The rows of a table of text by column, from the line that begins with the name of the first column."""
    lines = printed.splitlines()
    begin = next(k for k, line in enumerate(lines) if line.split()[:1] == [first])
    head, ruler, *body = lines[begin : [*lines, ""].index("", begin)]
    ends = [k for k in range(len(ruler) + 1) if k == len(ruler) or (ruler[k] == " " and ruler[k - 1] == "-")]
    starts = [0, *(ruler.index("-", end) for end in ends[:-1])]

    def parts(line):
        return [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]

    return [dict(zip(parts(head), parts(line), strict=True)) for line in body if len(line) > starts[1]]
