"""The 121 UCI sets, in the folders that they were prepared in, with their official folds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liplayers.data.scaling import Scaling
from liplayers.data.source import Loaded, Source
from liplayers.data.split import Split
from liplayers.data.tabular import check_spelling, is_number, number
from liplayers.errors import ArgumentError, DataError, DataNotFoundError, UnknownNameError

__all__ = ["UCI", "UCISet", "read_uci", "uci_names"]


@dataclass(frozen=True, eq=False)
class UCISet:
    """One UCI classification set with its folds.

    Args:
        name: of the set.
        features: float64 (N, d), standardised by those who prepared the files.
        labels: int64 (N,), each class 0 … K − 1 at least once.
        test: bool (N, folds), the test rows of each fold; folds are drawn independently and overlap.
        validation: bool (N, folds), the validation rows; never test rows of the same fold.
        class_names: the class numbers as text.

    Source: Fernández-Delgado et al., Do we need hundreds of classifiers …?, JMLR 15, 2014; folds of Klambauer et al.
    2017, arXiv 1706.02515.
    """

    name: str
    features: Tensor
    labels: Tensor
    test: Tensor
    validation: Tensor
    class_names: tuple[str, ...]


def uci_names(root: str | Path) -> tuple[str, ...]:
    """The sets under `root`, sorted.

    Args:
        root: the folder that holds the folders of the sets, or its parent when that folder is called `uci121`.

    Raises:
        DataNotFoundError: no such folder, or no set in it.
    """
    return tuple(sorted(_uci_folders(root)))


def read_uci(root: str | Path, name: str) -> UCISet:
    """Reads `<name>/{<name>_py,labels_py,folds_py,validation_folds_py}.dat`: comma separated, without a header.

    Rows and columns in messages count from 1, as lines of a file do.

    Args:
        root: as for `uci_names`.
        name: of the set.

    Raises:
        UnknownNameError: no set of that name.
        DataNotFoundError: no such folder, or a file of the set is absent.
        DataError: a file that is not a table of finite numbers, files of different lengths, labels that are not
            0 … K − 1 with K ≥ 2, folds that are not 0 or 1, overlap, or leave nothing to train or test on.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "toy")
    >>> folder.mkdir()
    >>> tables = {"toy": "0.5,1 -1,2 0,3", "labels": "0 1 1", "folds": "1 0 0", "validation_folds": "0 0 1"}
    >>> for key, rows in tables.items():
    ...     _ = (folder / f"{key}_py.dat").write_text(rows.replace(" ", "\\n"))
    >>> uci_names(folder.parent), read_uci(folder.parent, "toy").labels
    (('toy',), tensor([0, 1, 1]))
    """
    folders = _uci_folders(root)
    if name not in folders:
        raise UnknownNameError.of(f"UCI set in {root}", name, folders)
    folder = folders[name]
    features = _read_features(folder / f"{name}_py.dat")
    labels = _read_labels(folder / "labels_py.dat", len(features))
    test = _read_marks(folder / "folds_py.dat", len(features))
    validation = _read_marks(folder / "validation_folds_py.dat", len(features))
    _check_folds(folder, test, validation)
    return UCISet(
        name=name,
        features=torch.from_numpy(features),
        labels=torch.from_numpy(labels),
        test=torch.from_numpy(test),
        validation=torch.from_numpy(validation),
        class_names=tuple(str(label) for label in range(labels.max() + 1)),
    )


def _uci_folders(root: str | Path) -> dict[str, Path]:
    root = Path(root)
    if not root.is_dir():
        raise DataNotFoundError(f"UCI data: no folder {root}; set data.root to the folder that holds the sets' folders")
    holder = root / "uci121" if (root / "uci121").is_dir() else root
    folders = {path.parent.name: path.parent for path in holder.glob("*/*_py.dat")}
    if not folders:
        raise DataNotFoundError(f"UCI data: no <set>/<set>_py.dat in {holder}; unpack the sets there or set data.root")
    return folders


def _read_cells(path: Path) -> list[list[str]]:
    """The cells of a comma-separated file, as many in each row."""
    if not path.is_file():
        raise DataNotFoundError(f"UCI data: no file {path}; unpack the set again")
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"UCI data: {path} cannot be read as text ({reason}); unpack the set again") from None
    if not lines:
        raise DataError(f"UCI data: {path} is empty; expected comma-separated numbers")
    cells = [line.split(",") for line in lines]
    for row, line in enumerate(cells):
        if len(line) != len(cells[0]):
            raise DataError(
                f"UCI data: {path}, row {row + 1} has {len(line)} columns, row 1 has {len(cells[0])}; every row must "
                "have as many"
            )
    return cells


def _numbers(path: Path, cells: list[list[str]]) -> np.ndarray:
    """The cells as finite numbers (N, d), float64."""
    try:
        values = np.array([[number(cell) for cell in line] for line in cells])
    except ValueError:
        row, column = next((i, j) for i, line in enumerate(cells) for j, cell in enumerate(line) if not is_number(cell))
        raise DataError(
            f"UCI data: {path}, row {row + 1}, column {column + 1}: {cells[row][column][:40]!r} is not a number"
        ) from None
    _refuse(path, ~np.isfinite(values), cells, "a finite number")
    return values


def _refuse(path: Path, wrong: np.ndarray, cells: object, expected: str) -> None:
    """Raises for the first row and column that is `wrong`."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        value = np.asarray(cells)[row, column]
        raise DataError(f"UCI data: {path}, row {row + 1}, column {column + 1}: {value} is not {expected}")


def _read_features(path: Path) -> np.ndarray:
    values = _numbers(path, _read_cells(path))
    with np.errstate(over="ignore"):
        trained_on = values.astype(np.float32)
    _refuse(path, ~np.isfinite(trained_on), values, "within the range of float32")
    return values


def _check_length(path: Path, values: np.ndarray, samples: int) -> None:
    if len(values) != samples:
        raise DataError(f"UCI data: {path} has {len(values)} rows, the features {samples}; expected one row for each")


def _read_labels(path: Path, samples: int) -> np.ndarray:
    cells = _read_cells(path)
    values = _numbers(path, cells)
    _check_length(path, values, samples)
    if values.shape[1] != 1:
        raise DataError(f"UCI data: {path} has {values.shape[1]} columns; expected one, the labels")
    _refuse(path, (values < 0) | (values % 1 != 0), values, "a class number 0, 1, 2, …")
    # More classes than rows is a gap, too; reported before anything of that size is made.
    _refuse(path, values >= samples, values, f"a class number below the number of rows, {samples}")
    labels = values[:, 0].astype(np.int64)
    check_spelling(f"UCI data: {path}, column 1", labels.tolist(), [line[0] for line in cells], {})
    counts = np.bincount(labels)
    if len(counts) < 2:
        raise DataError(f"UCI data: {path}, column 1 holds the class 0 only; a classifier needs at least two")
    if not counts.all():
        raise DataError(
            f"UCI data: {path}, column 1 has no row of class {counts.argmin()}, but of class {len(counts) - 1}; "
            "number the classes from 0 without gaps"
        )
    return labels


def _read_marks(path: Path, samples: int) -> np.ndarray:
    values = _numbers(path, _read_cells(path))
    _check_length(path, values, samples)
    _refuse(path, (values != 0) & (values != 1), values, "0 or 1")
    return values.astype(bool)


def _check_folds(folder: Path, test: np.ndarray, validation: np.ndarray) -> None:
    tests, validations = folder / "folds_py.dat", folder / "validation_folds_py.dat"
    if test.shape != validation.shape:
        raise DataError(
            f"UCI data: {validations} has {validation.shape[1]} columns, {tests} has {test.shape[1]}; expected one for "
            "each fold"
        )
    both = test & validation
    if both.any():
        row, column = np.argwhere(both)[0]
        raise DataError(
            f"UCI data: row {row + 1}, column {column + 1} is 1 in {tests} and in {validations}; a row is for test or "
            "for validation"
        )
    for kind, empty in (("test", ~test.any(0)), ("training", (test | validation).all(0))):
        if empty.any():
            fold = int(empty.argmax())
            raise DataError(f"UCI data: {tests}, column {fold + 1}: no {kind} rows are left in fold {fold}")


class UCI(Source):
    """A fold of a UCI set, in the folders of `read_uci`: official test rows, official validation rows, the rest trains.

    The features are taken as they are: they come standardised, on the whole set or on its training part.

    Args:
        name: of the set.
        root: the folder that holds the folders of the sets, or its parent when that folder is called `uci121`.
        fold: which column of the files, from 0.
        validation: whether to hold out the validation rows; False trains on them.

    Raises:
        ArgumentError: an argument out of range.
        UnknownNameError, DataNotFoundError, DataError: from `load`, as from `read_uci`; a fold that is not there or
            has no validation rows.
    """

    unit = "standardised features"

    def __init__(self, name: str, root: str | Path, fold: int = 0, validation: bool = True) -> None:
        if isinstance(fold, bool) or not isinstance(fold, int) or fold < 0:
            raise ArgumentError(f"fold must be an integer of at least 0, got {fold!r}")
        if not isinstance(validation, bool):
            raise ArgumentError(f"validation must be true or false, got {validation!r}")
        self.name = name
        self.root = Path(root)
        self.fold = fold
        self.validation = validation

    def load(self) -> Loaded:
        data = read_uci(self.root, self.name)
        folds = data.test.shape[1]
        if self.fold >= folds:
            raise ArgumentError(f"fold={self.fold}: {self.name} has the folds 0 … {folds - 1}; set data.fold")
        test, validation = data.test[:, self.fold], data.validation[:, self.fold]
        if self.validation and not validation.any():
            raise DataError(
                f"UCI data: fold {self.fold} of {self.name} has no validation rows; set data.validation=false"
            )
        val = Split(data.features[validation], data.labels[validation]) if self.validation else None
        train = ~(test | validation) if self.validation else ~test
        return Loaded(
            train=Split(data.features[train], data.labels[train]),
            test=Split(data.features[test], data.labels[test]),
            class_names=data.class_names,
            val=val,
            scaling=Scaling(tuple(str(column + 1) for column in range(data.features.shape[1]))),
            no_val=None if self.validation else "validation=false; set data.validation=true",
        )
