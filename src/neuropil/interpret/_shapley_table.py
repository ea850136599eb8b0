"""Any table as a matrix of numbers with one column a column: categories become codes, what is missing NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.utils.validation import check_array

from neuropil.errors import NeuropilError
from neuropil.interpret._shapley_functions import require

SPREAD_RATIO = 10.0


class CohortError(NeuropilError, ValueError):
    """A cohort that cannot be judged by this workflow: columns missing, in other units, or classes never seen."""

    exit_code = 2


def as_frame(X: Any) -> Any:
    """`X` as a DataFrame with string column names; raises ValueError or TypeError for what is no table."""
    pandas = require("pandas")
    if not isinstance(X, pandas.DataFrame):
        words = not hasattr(X, "nnz") and np.asarray(X).dtype.kind in "OUS"
        X = check_array(X, dtype=object if words else None, ensure_all_finite=False if words else "allow-nan")
        X = pandas.DataFrame(X)
        X.columns = [f"x{i}" for i in X.columns]
    frame = X.copy(deep=False)
    frame.columns = [str(name) for name in frame.columns]
    twice = frame.columns[frame.columns.duplicated()].unique().tolist()
    if twice:
        raise ValueError(f"columns that stand twice: {twice}; rename or drop them")
    if not len(frame) or not frame.shape[1]:
        raise ValueError(f"Found array with 0 {'feature(s)' if len(frame) else 'sample(s)'} (shape={frame.shape})")
    return frame


def _numbers(column: Any) -> np.ndarray | None:
    """The column as float64 if it holds numbers, else None."""
    pandas = require("pandas")
    types = pandas.api.types
    if types.is_complex_dtype(column):
        raise ValueError(f"Complex data not supported: column {column.name!r}")
    if types.is_datetime64_any_dtype(column) or types.is_timedelta64_dtype(column):
        raise ValueError(f"column {column.name!r} holds dates; give a number instead, such as the age in years")
    if types.is_numeric_dtype(column) or types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    if isinstance(column.dtype, pandas.CategoricalDtype):
        return None
    try:
        return pandas.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        odd = next((v for v in column if not isinstance(v, str | bool | int | float) and not pandas.isna(v)), None)
        if odd is not None:
            raise TypeError(f"column {column.name!r}: argument must be a string or a number, not {odd!r}") from None
        return None


class TableEncoder:
    """Learns which columns hold categories and which categories there are.

    Categories take the order of a pandas Categorical, else sorted order; those met later for the first time count as
    missing. `nominal_` marks columns of three or more unordered categories, whose codes have no order.
    """

    def fit(self, frame: Any) -> TableEncoder:
        pandas = require("pandas")
        self.columns_ = tuple(frame.columns)
        self.categories_: dict[str, list[Any]] = {}
        ordered = set()
        for name in self.columns_:
            column = frame[name]
            if _numbers(column) is not None:
                continue
            if isinstance(column.dtype, pandas.CategoricalDtype):
                self.categories_[name] = list(column.cat.categories)
                ordered |= {name} if column.cat.ordered else set()
            else:
                self.categories_[name] = sorted({value for value in column if not pandas.isna(value)}, key=str)
        self.nominal_: Bool[np.ndarray, " m"] = np.array(
            [len(self.categories_.get(name, ())) > 2 and name not in ordered for name in self.columns_]
        )
        return self

    def transform(self, frame: Any) -> Float[np.ndarray, "n m"]:
        """Codes and numbers; raises CohortError for missing columns, ValueError for infinity."""
        missing = [name for name in self.columns_ if name not in frame.columns]
        if missing:
            raise CohortError(f"columns missing: {missing}; the workflow was fitted on {list(self.columns_)}")
        columns = [self._coded(frame[name]) for name in self.columns_]
        return check_array(np.column_stack(columns), ensure_all_finite="allow-nan", input_name="X")

    def _coded(self, column: Any) -> np.ndarray:
        if column.name in self.categories_:
            code = {value: float(i) for i, value in enumerate(self.categories_[column.name])}
            return np.array([code.get(value, np.nan) for value in column])
        numbers = _numbers(column)
        if numbers is None:
            raise CohortError(f"column {column.name!r} held numbers when the workflow was fitted, and holds words now")
        return numbers


def other_units(
    columns: tuple[str, ...], known: Float[np.ndarray, "n m"], other: Float[np.ndarray, "r m"]
) -> list[str]:
    """Columns that are not merely shifted: the median left the range they had, by a factor of two (where all is
    positive) or by a whole range, or the middle half is over ten times as wide or as narrow."""
    odd = []
    for name, a, b in zip(columns, known.T, other.T, strict=True):
        a, b = a[~np.isnan(a)], b[~np.isnan(b)]
        if len(a) < 2 or len(b) < 2 or np.ptp(a) == 0:
            continue
        before, here = np.median(a), np.median(b)
        positive = a.min() > 0 and b.min() > 0
        beyond = max(a.min() - here, here - a.max()) > (0 if positive else np.ptp(a))
        scaled = beyond and (not positive or max(before / here, here / before) > 2)
        widths = [np.subtract(*np.quantile(values, [0.75, 0.25])) for values in (a, b)]
        if scaled or (min(widths) > 0 and max(widths) / min(widths) > SPREAD_RATIO):
            odd.append(f"{name} (median {before:.4g}, here {here:.4g})")
    return odd
