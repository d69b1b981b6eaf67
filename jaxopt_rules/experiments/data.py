"""What to train on: tables of scikit-learn's or from a CSV file, standardized, and Python's own source as text.

Each comes in two parts, to train on and to test on.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_rules.interop import needed

if TYPE_CHECKING:
    import pandas as pd

MIN_ROWS = 10
MAX_NUMERIC_CLASSES = 20
MAX_CATEGORIES = 100


class UserError(Exception):
    """What was asked for cannot be done. The message says why, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to test on; a fifth of all rows, chosen by the seed, is for testing."""

    name: str
    x_train: np.ndarray  # (rows, features)  float32
    t_train: np.ndarray  # (rows,) int32 class numbers; for regression (rows, 1) float32
    x_test: np.ndarray
    t_test: np.ndarray
    classes: int | None  # how many; None: regression
    notes: tuple[str, ...] = ()  # what was left out, a sentence each


def digits(seed: int) -> Dataset:
    """1797 images of 8 x 8 pixels, each of one of ten digits, from scikit-learn."""
    return _shipped("digits", 10, seed)


def wine(seed: int) -> Dataset:
    """178 wines of three growers, 13 chemical measurements of each, from scikit-learn."""
    return _shipped("wine", 3, seed)


def breast_cancer(seed: int) -> Dataset:
    """569 tumours, malignant or benign, 30 measurements of the cells of each, from scikit-learn."""
    return _shipped("breast_cancer", 2, seed)


def diabetes(seed: int) -> Dataset:
    """442 patients, 10 measurements of each, and how far the disease went in a year (regression), from scikit-learn."""
    return _shipped("diabetes", None, seed)


DATASETS: Mapping[str, Callable[[int], Dataset]] = {
    "digits": digits,
    "wine": wine,
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
}
"""The tables that come with scikit-learn, by name: `DATASETS["wine"](seed)`."""


def _shipped(name: str, classes: int | None, seed: int) -> Dataset:
    needed("sklearn", "experiments", "scikit-learn")
    from sklearn import datasets

    load: Callable[..., Any] = getattr(datasets, f"load_{name}")
    features, target = map(np.asarray, load(return_X_y=True))
    train, test = _split(len(features), seed)
    x = _standardized(features, train)
    t = _standardized(target[:, None], train) if classes is None else target.astype(np.int32)
    return Dataset(name, x[train], t[train], x[test], t[test], classes)


def read_csv(path: str, target: str, seed: int) -> Dataset:
    """The rows of a CSV file with a header; `target` names the column to predict.

    The target is a class where it is text (or true and false), or consists of whole numbers, at most 20 different
    ones. Any other numeric target is a quantity, which is standardized: that is regression.

    Numeric columns are standardized, those of one value become 0. Text columns become one column of 0 and 1 for each
    text. Left out are empty columns, and columns of identifiers: a text of its own in every row, or more than 100
    texts. Rows in which anything is then missing are dropped; a number that float32 cannot hold counts as missing.

    Raises:
      UserError: the file cannot be read or has no such column; there are fewer than 10 whole rows, or no other column;
        the target has one value only, more than 100 texts, or a class that occurs in no training row.
    """
    import pandas as pd

    frame = _read(path)
    if target not in frame:
        raise UserError(f"{path} has no column {target!r}; choose --target from {_listed(frame.columns)}")
    frame, numeric = _finite(frame)
    frame, notes = _useful(frame, numeric, target)
    whole = frame.dropna()
    if dropped := len(frame) - len(whole):
        notes.append(f"dropped {dropped} of {len(frame)} rows, in which something is missing")
    if len(whole) < MIN_ROWS:
        worst = frame.isna().sum().idxmax()
        hint = f"; most often {worst!r} is missing: fill or remove that column" if dropped else ""
        raise UserError(f"{path} has {len(whole)} whole rows, and at least {MIN_ROWS} are needed{hint}")
    t = whole.pop(target)
    if whole.empty:
        raise UserError("; ".join([f"{path} has no column besides {target!r} to learn from", *notes]))

    train, test = _split(len(whole), seed)
    numbers = _standardized(whole[[name for name in whole if name in numeric]].to_numpy(float), train)
    texts = [pd.get_dummies(whole[name].astype(str), dtype=np.float32) for name in whole if name not in numeric]
    x = np.hstack([numbers, *texts])
    t, classes = _target(t, target in numeric, train)
    return Dataset(Path(path).name, x[train], t[train], x[test], t[test], classes, tuple(notes))


@dataclass(frozen=True)
class Text:
    """A text as numbers of symbols, to train on and to test on."""

    name: str
    alphabet: str  # symbol i is alphabet[i]; the last one stands for all others
    train: np.ndarray  # (characters,) uint8
    test: np.ndarray

    def decode(self, symbols: Any) -> str:
        """The text that these numbers, a sequence of them, stand for."""
        return "".join(self.alphabet[i] for i in np.asarray(symbols).ravel())


ALPHABET = "".join(map(chr, range(32, 127))) + "\n\N{REPLACEMENT CHARACTER}"
"""Printable ASCII, the end of a line, and one symbol for everything else: 97 symbols."""

# Modules of Python 3.11 to 3.14 that are files of prose and code, and no tables.
_MODULES = """
    argparse ast asyncio/base_events asyncio/tasks bdb calendar cmd codecs collections/__init__ configparser contextlib
    csv dataclasses difflib doctest email/message enum fractions functools heapq inspect ipaddress json/encoder
    logging/__init__ mailbox multiprocessing/pool optparse os pickle plistlib pprint random shutil smtplib socket
    statistics subprocess tarfile tempfile textwrap threading tokenize traceback typing unittest/case unittest/mock
    urllib/parse urllib/request uuid weakref
"""


def source_text(characters: int = 1_000_000, seed: int = 0) -> Text:
    """Source of Python's own standard library, as symbols of `ALPHABET`. Each version of Python has its own.

    The last tenth of each module is for testing.

    Args:
      characters: how many there are in all: at most those of the modules, which are over two million.
      seed: of the order in which the modules follow each other.

    Raises:
      UserError: the modules have fewer characters, or this Python has no sources.
    """
    folder = Path(os.__file__).parent
    train, test, missing = [], [], characters
    for name in np.random.default_rng(seed).permutation(_MODULES.split()):
        try:
            module = (folder / f"{name}.py").read_text(encoding="utf-8")[:missing]
        except OSError as error:
            raise UserError(f"cannot read the source of Python's standard library: {error}") from error
        missing -= len(module)
        end = len(module) - len(module) // 10
        train.append(module[:end])
        test.append(module[end:])
    if missing:
        raise UserError(f"there are {characters - missing} characters of source, and {characters} are asked for")
    return Text("source", ALPHABET, _symbols("".join(train)), _symbols("".join(test)))


def _symbols(text: str) -> np.ndarray:
    """For each character, its place in `ALPHABET`."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    places = np.full(128, len(ALPHABET) - 1, np.uint8)
    places[[ord(c) for c in ALPHABET[:-1]]] = np.arange(len(ALPHABET) - 1)
    return places[np.minimum(codes, 127)]


def _read(path: str) -> "pd.DataFrame":
    needed("pandas", "experiments")
    import pandas as pd

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            frame = pd.read_csv(file, low_memory=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no CSV file in UTF-8 with a header: {error}") from error
    # Where rows are longer than the header, pandas takes their first fields for labels of the rows.
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more fields than its header; give every column a name")
    return frame


def _finite(frame: "pd.DataFrame") -> tuple["pd.DataFrame", set[str]]:
    """The frame without numbers that float32 cannot hold, and the names of its numeric columns."""
    import pandas as pd

    numeric = {name for name in frame if pd.api.types.is_numeric_dtype(frame[name]) and frame[name].dtype != bool}
    frame = frame.copy()
    for name in numeric:
        x = frame[name].astype(float)
        frame[name] = x.where(x.abs() <= np.finfo(np.float32).max)
    return frame, numeric


def _useful(frame: "pd.DataFrame", numeric: set[str], target: str) -> tuple["pd.DataFrame", list[str]]:
    """The frame without columns that nothing can be learnt from, and a sentence for each kind of them."""
    present, different = frame.count().to_dict(), frame.nunique().to_dict()
    empty = [name for name in frame if name != target and present[name] == 0]
    identifiers = [
        name
        for name in frame
        if name not in (target, *numeric, *empty)
        and (different[name] > MAX_CATEGORIES or different[name] == present[name])
    ]
    kinds = {"empty": empty, "text that differs from row to row": identifiers}
    notes = [f"left out, {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    return frame.drop(columns=empty + identifiers), notes


def _target(column: "pd.Series", numeric: bool, train: np.ndarray) -> tuple[np.ndarray, int | None]:
    """The target as an array, and the number of its classes."""
    values = column.to_numpy(float) if numeric else column.astype(str).to_numpy(object)
    different, numbers = np.unique(values, return_inverse=True)
    if len(different) == 1:
        raise UserError(f"the target {column.name!r} is {different[0]} in every row; choose another --target")
    if numeric and (len(different) > MAX_NUMERIC_CLASSES or any(different % 1)):
        if np.ptp(values[train]) == 0:
            raise UserError(f"the target {column.name!r} has one value in all training rows; try another --seed")
        return _standardized(values[:, None], train), None
    if len(different) > MAX_CATEGORIES:
        raise UserError(
            f"the target {column.name!r} has {len(different)} different texts, over {MAX_CATEGORIES}, too many for "
            "classes; choose another --target"
        )
    untrained = np.flatnonzero(np.bincount(numbers[train], minlength=len(different)) == 0)
    if len(untrained):
        raise UserError(
            f"the class {different[untrained[0]]} of {column.name!r} occurs in no training row; remove it, add rows "
            "of it, or try another --seed"
        )
    return numbers.astype(np.int32), len(different)


def _split(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    return order[rows // 5 :], order[: rows // 5]


def _standardized(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1 over the training rows; 0 where they have one value there."""
    known = x[train]
    # Not by a variance of 0: rounding leaves that of a constant 0.1 above it.
    scale = np.where(np.ptp(known, axis=0) == 0, np.inf, known.std(axis=0))
    return ((x - known.mean(axis=0)) / scale).astype(np.float32)


def _listed(names: "pd.Index | list[str]") -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more
