"""Tables: CSV or parquet files with a target column."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from liplayers.data.sampling import stratified_rows
from liplayers.data.scaling import Scaling
from liplayers.data.source import HoldOut, Loaded, Source
from liplayers.data.split import Split
from liplayers.errors import ArgumentError, DataError, DataNotFoundError, UnknownNameError

__all__ = ["Table"]

Label = str | int | float

# Fixed apart from the user's seed, so that figures on the test rows compare across runs.
_TEST_SEED = 20240229

# What infer_dtype calls columns that become numbers; "empty" has missing values only, which are told apart.
_NUMBERS = ("boolean", "integer", "floating", "mixed-integer-float", "integer-na", "empty")

# Numbers as they are written in many countries, but not in a file for a program.
_LOCAL_NUMBER = re.compile(r"\s*[+-]?\d[\d.,'’ \u00a0\u202f]*(e[+-]?\d+)?\s*%?\s*", re.ASCII | re.IGNORECASE)

# Columns of a CSV file may be separated otherwise; what messages call it.
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}

# A parquet file may claim any number of rows in a few bytes; more cells than this, and than so many for each byte of
# the file, are no table.
_CELLS, _CELLS_OF_A_BYTE = 10**8, 1000


class Table(Source):
    """A `.csv` (with a header) or `.parquet` file with a target column; the other columns are the features.

    Each feature is standardised, (x − mean)/std, by the mean and the population standard deviation of the training
    rows, without those held out, in float64; they stand in `scaling`. Booleans count 0 and 1. Classes are
    the sorted distinct labels of the file; one written in two ways, as 1 and 01, is refused. A certified ℓ2 radius R of
    the standardised features, less what `Scaling.radius` takes off as `certify.py` does, means: feature j alone may
    change by R·std_j of its own unit, and all together by R·min std in ℓ2 norm of the original units.

    A CSV file is UTF-8 text with commas between columns and points in decimals. Rows in messages count from 1 at
    the first one below the header. What pandas reads as missing in a CSV file (an empty cell, NA, null, None, …) is
    missing here, in labels, too.

    Args:
        train: the file of training rows.
        target: the column of the labels: text, booleans or whole numbers.
        test: the file of test rows, with the same columns in any order; None takes them from `train`.
        test_fraction: without `test`, the share of rows to test on, in (0, 1); the same rows for every `seed`.
        features: the columns to use, in this order; None takes all but the target.

    Raises:
        ArgumentError: an argument out of range, or a fraction that leaves nothing to train or test on.
        UnknownNameError: from `load`, a target or feature that is not a column.
        DataNotFoundError: from `load`, when a file is absent.
        DataError: from `load`, a file that cannot be read, has no rows, unnamed or duplicate columns, or columns other
            than the training file; a feature that is not a number, missing, infinite, or constant on the training rows;
            labels that are missing, of one class only, or unknown to the training file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "heights.csv")
    >>> _ = path.write_text("cm,kind\\n" + "".join(f"{150 + i},{'tall' if i > 9 else 'short'}\\n" for i in range(20)))
    >>> loaded = Table(path, "kind").load()
    >>> loaded.train.input_shape, loaded.class_names, loaded.scaling.names, len(loaded.test)
    ((1,), ('short', 'tall'), ('cm',), 4)
    """

    unit = "standardised features"

    def __init__(
        self,
        train: str | Path,
        target: str,
        test: str | Path | None = None,
        test_fraction: float = 0.2,
        features: Sequence[str] | None = None,
    ) -> None:
        if isinstance(test_fraction, bool) or not isinstance(test_fraction, int | float) or not 0 < test_fraction < 1:
            raise ArgumentError(f"test_fraction must be a number within (0, 1), got {test_fraction!r}")
        if features is not None:
            if isinstance(features, str) or not features or len(set(features)) < len(features):
                raise ArgumentError(f"features must be a list of distinct column names, got {features!r}")
            if target in features:
                raise ArgumentError(f"features={list(features)}: {target!r} is the target; leave it out")
        self.train = Path(train)
        self.target = target
        self.test = None if test is None else Path(test)
        self.test_fraction = test_fraction
        self.features = None if features is None else tuple(features)
        self.name = self.train.stem

    def load(self) -> Loaded:
        return self._load(None)

    def load_holding_out(self, hold_out: HoldOut) -> Loaded:
        """As `load`; the features are standardised by the rows that are not held out."""
        return self._load(hold_out)

    def _load(self, hold_out: HoldOut | None) -> Loaded:
        table, written = _read_table(self.train, self.target)
        names = self._feature_names(table)
        spelled: dict[Label, str] = {}
        values = _feature_values(self.train, table[names])
        targets = _targets(self.train, table[self.target], written, spelled)
        number = {label: index for index, label in enumerate(sorted(set(targets)))}
        if len(number) < 2:
            raise DataError(
                f"table: {self.train}, target column {self.target!r} has the class {targets[0]!r} only; a classifier "
                "needs at least two"
            )
        labels = torch.tensor([number[target] for target in targets])
        if self.test is None:
            train, test = self._test_rows(labels)
            test_values, test_labels = values[test], labels[test]
            values, labels = values[train], labels[train]
        else:
            table, written = _read_table(self.test, self.target)
            self._check_columns(table, names)
            test_values = _feature_values(self.test, table[names])
            test_labels = self._test_labels(_targets(self.test, table[self.target], written, spelled), number)
        rest, taken = (torch.arange(len(labels)), None) if hold_out is None else hold_out(labels)
        mean, std = _mean_and_std(self.train, names, values[rest])

        def split(values: np.ndarray, labels: Tensor) -> Split:
            # Overflow to infinity is reported afterwards, with its place.
            with np.errstate(over="ignore"):
                return Split(torch.from_numpy((values - mean) / std), labels)

        return Loaded(
            train=split(values[rest], labels[rest]),
            test=split(test_values, test_labels),
            class_names=tuple(str(label) for label in number),
            val=None if taken is None else split(values[taken], labels[taken]),
            scaling=Scaling(tuple(names), tuple(mean.tolist()), tuple(std.tolist())),
        )

    def _feature_names(self, table: pd.DataFrame) -> list[str]:
        if self.target not in table:
            raise UnknownNameError.of(f"target column in {self.train}", self.target, table)
        names = [name for name in table if name != self.target] if self.features is None else list(self.features)
        for name in names:
            if name not in table:
                raise UnknownNameError.of(f"feature column in {self.train}", name, table)
        if not names:
            raise DataError(f"table: {self.train} has no column but the target {self.target!r}; add features")
        return names

    def _check_columns(self, table: pd.DataFrame, names: list[str]) -> None:
        used = {self.target, *names}
        lacking = sorted(used - set(table))
        extra = sorted(set(table) - used) if self.features is None else []
        if lacking or extra:
            differences = [f"no {', '.join(lacking)}"] * bool(lacking) + [f"also {', '.join(extra)}"] * bool(extra)
            raise DataError(
                f"table: {self.test} has {' and '.join(differences)}, unlike {self.train}; give both the same columns"
            )

    def _test_labels(self, targets: list[Label], number: dict[Label, int]) -> Tensor:
        for row, target in enumerate(targets):
            if target not in number:
                raise DataError(
                    f"table: {self.test}, target column {self.target!r} is {target!r} in row {row + 1}, which is no "
                    f"class of {self.train}; remove the row or train on such rows"
                )
        return torch.tensor([number[target] for target in targets])

    def _test_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        train, test = stratified_rows(labels, self.test_fraction, _TEST_SEED)
        if len(train) == 0 or len(test) == 0:
            raise ArgumentError(
                f"test_fraction={self.test_fraction} of {len(labels)} rows leaves {len(train)} to train on and "
                f"{len(test)} to test on; change data.test_fraction or give data.test"
            )
        return train, test


def _read_table(path: Path, target: str) -> tuple[pd.DataFrame, list[str] | None]:
    """The table in a file: at least one row, columns with distinct names. And the labels as a CSV file writes them."""
    if not path.is_file():
        raise DataNotFoundError(f"table: no file {path}; set data.train and data.test to .csv or .parquet files")
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"table: {path} is neither .csv nor .parquet; save it as one of these")
    try:
        table, written = readers[path.suffix.lower()](path, target)
    except DataError:
        raise
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"table: {path} cannot be read ({' '.join(str(error).split())})") from None
    table.columns = table.columns.map(str)
    if table.empty:
        raise DataError(f"table: {path} has no rows")
    return table, written


def _not_utf8(path: Path) -> DataError:
    return DataError(f"table: {path} cannot be read as text in UTF-8; save it so (in Excel: CSV UTF-8)")


def _read_csv(path: Path, target: str) -> tuple[pd.DataFrame, list[str] | None]:
    # The header on its own: pandas would make up names and rename duplicates.
    header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    names = header.iloc[0].tolist()
    _check_separator(path, names, target)
    _check_header(path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            table = pd.read_csv(path, low_memory=False, index_col=False)
        except (pd.errors.ParserWarning, pd.errors.ParserError) as error:
            for row, cells in enumerate(_lines(path)):
                if len(cells) > len(names):
                    raise DataError(
                        f"table: {path}, row {row} has more columns than its header has names ({len(cells)}, not "
                        f"{len(names)}); name every column, write decimals with a point, and put text with commas in "
                        "quotes"
                    ) from None
            raise ValueError(error) from None
    if target not in table:
        return table, None
    labels = pd.read_csv(path, usecols=[target], index_col=False, dtype=str, keep_default_na=False)
    return table, labels[target].tolist()


def _lines(path: Path, separator: str = ",") -> Iterator[list[str]]:
    """The cells of each line that is not blank."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from filter(None, csv.reader(file, delimiter=separator, skipinitialspace=separator == " "))


def _check_separator(path: Path, names: list[str], target: str) -> None:
    """Raises where the header has the target only when something else than a comma separates its columns."""
    if any("\0" in name for name in names):
        raise _not_utf8(path)
    if target in names:
        return
    for separator, called in _SEPARATORS.items():
        found = [name.strip() for name in next(_lines(path, separator))]
        # One name with spaces in it is no sign of another separator.
        if target in found or (separator != " " and len(names) == 1 and len(found) > 1):
            raise DataError(
                f"table: {path} separates its columns by {called}; expected commas, and points in decimals: save it so "
                "(in pandas: to_csv with its defaults)"
            )


def _read_parquet(path: Path, target: str) -> tuple[pd.DataFrame, list[str] | None]:
    with parquet.ParquetFile(path) as file:
        cells = file.metadata.num_rows * file.metadata.num_columns
        if cells > max(_CELLS, _CELLS_OF_A_BYTE * path.stat().st_size):
            raise DataError(f"table: {path} claims {cells:,} cells in {path.stat().st_size:,} bytes; it is not a table")
        table = file.read()
    _check_header(path, table.column_names)
    return table.to_pandas(), None


def _check_header(path: Path, names: list[str]) -> None:
    for column, name in enumerate(names):
        if not name.strip():
            raise DataError(
                f"table: {path}, column {column + 1} has no name; name it, or save without the row numbers "
                "(index=False in pandas)"
            )
        if name in names[:column]:
            raise DataError(
                f"table: {path}, columns {names.index(name) + 1} and {column + 1} are both called {name!r}; rename one"
            )


def _feature_values(path: Path, table: pd.DataFrame) -> np.ndarray:
    """The finite numbers (N, d), float64."""
    for name in table:
        kind = pd.api.types.infer_dtype(table[name], skipna=True)
        if kind not in _NUMBERS:
            raise DataError(f"table: {path}, column {name!r} holds {kind} values, not numbers{_mend(table[name])}")
    try:
        values = np.stack([table[name].to_numpy(np.float64, na_value=np.nan) for name in table], axis=1)
    except OverflowError:
        raise DataError(f"table: {path} holds a whole number beyond float64; repair or remove its row") from None
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0]
        found = "is missing" if np.isnan(values[row, column]) else f"is {values[row, column]}, not finite"
        raise DataError(
            f"table: {path}, row {row + 1}, column {table.columns[column]!r} {found}; repair or remove the row, or "
            "leave the column out with data.features=[…]"
        )
    return values


def _mend(column: pd.Series) -> str:
    """The first value that is no number, and what to do about such."""
    mend = "one-hot encode it or leave it out with data.features=[…]"
    for row, value in enumerate(column.tolist()):
        if isinstance(value, str) and not is_number(value):
            if _LOCAL_NUMBER.fullmatch(value):
                mend = "write numbers like 1234.5, with a point and nothing between thousands"
            return f", such as {value[:40]!r} in row {row + 1}; {mend}"
    return f"; {mend}"


def number(cell: str) -> float:
    """The nearest float64; not of 1_000, which Python takes for a number."""
    if "_" in cell:
        raise ValueError
    return float(cell)


def is_number(cell: str) -> bool:
    try:
        number(cell)
    except ValueError:
        return False
    return True


def _targets(path: Path, column: pd.Series, written: list[str] | None, spelled: dict[Label, str]) -> list[Label]:
    """The label of each row; `spelled` are those of other files, as they are written there."""
    where = f"table: {path}, target column {column.name!r}"
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise DataError(f"{where} is missing in row {missing[0] + 1}; label the row or remove it")
    targets = column.tolist()
    kinds = {type(target) for target in targets}
    if not (kinds <= {str} or kinds <= {bool} or kinds <= {int, float}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{where} holds values of type {names}; expected text, booleans or whole numbers")
    for row, target in enumerate(targets):
        if isinstance(target, float) and not target.is_integer():
            raise DataError(
                f"{where} is {target} in row {row + 1}, which is no class; expected text, booleans or whole numbers"
            )
    check_spelling(where, targets, [str(target) for target in targets] if written is None else written, spelled)
    return targets


def check_spelling(where: str, labels: Sequence[Label], written: Sequence[str], spelled: dict[Label, str]) -> None:
    """Raises where one label is written in two ways, as 1 and 01, or text with and without spaces around it."""
    for row, (label, text) in enumerate(zip(labels, written, strict=True)):
        first = spelled.setdefault(label.strip() if isinstance(label, str) else label, text)
        if text != first:
            raise DataError(
                f"{where} is {text!r} in row {row + 1} and {first!r} in another, which would be one class; write each "
                "class in one way"
            )


def _mean_and_std(path: Path, names: list[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the training rows (N, d)."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = values.mean(0), values.std(0)
    # Rounding leaves some spread where all values are one.
    std[values.min(0) == values.max(0)] = 0
    wrong = [f"{name!r} ({spread:g})" for name, spread in zip(names, std, strict=True) if not 0 < spread < np.inf]
    if wrong:
        raise DataError(
            f"table: {path}, the standard deviation on the {len(values)} training rows must be above 0 and finite, but "
            f"is not for {', '.join(wrong)}; leave constant columns out with data.features=[…]"
        )
    return mean, std
