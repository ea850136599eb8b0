"""Scores of predictions, with NaN and a reason where a cohort does not define them, and tests of differences."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest, norm, rankdata, t
from sklearn import metrics

BINARY = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "auc")
REGRESSION = ("r2", "rmse", "mae", "spearman")


def classification_scores(truth: Any, predicted: Any, probability: Any, classes: int) -> dict[str, Any]:
    """Accuracy, balanced accuracy, sensitivity, specificity, F1 and AUC; of codes 0 to classes - 1.

    With two classes the second is the one that is looked for; with more, sensitivity, specificity, F1 and AUC are
    means over classes, each against the rest. What an absent class leaves undefined is NaN, and `note` names it.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    sought = [1] if classes == 2 else list(range(classes))
    present = np.isin(np.arange(classes), truth)
    recall = np.array([(predicted[truth == c] == c).mean() if present[c] else np.nan for c in range(classes)])
    out: dict[str, list[float]] = {name: [] for name in ("sensitivity", "specificity", "f1", "auc")}
    for c in sought:
        yes, called = truth == c, predicted == c
        both = yes.any() and not yes.all()
        out["sensitivity"].append(float(recall[c]))
        out["specificity"].append(float((~called[~yes]).mean()) if not yes.all() else np.nan)
        out["f1"].append(2 * float((yes & called).sum()) / (yes.sum() + called.sum()) if yes.any() else np.nan)
        out["auc"].append(float(metrics.roc_auc_score(yes, probability[:, c])) if both else np.nan)
    absent = np.flatnonzero(~present).tolist()
    return {
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(recall.mean()),
        **{name: float(np.mean(values)) for name, values in out.items()},
        "note": f"no rows of class {', '.join(map(str, absent))}" if absent else "",
    }


def regression_scores(truth: Any, predicted: Any) -> dict[str, Any]:
    """R squared, root mean squared and mean absolute error, Spearman's r."""
    truth, predicted = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    varied = bool(np.ptp(truth) > 0)
    ranks = np.corrcoef(rankdata(truth), rankdata(predicted))[0, 1] if varied and np.ptp(predicted) > 0 else np.nan
    return {
        "r2": float(metrics.r2_score(truth, predicted)) if varied else np.nan,
        "rmse": float(metrics.root_mean_squared_error(truth, predicted)),
        "mae": float(metrics.mean_absolute_error(truth, predicted)),
        "spearman": float(ranks),
        "note": "" if varied else "the target is constant",
    }


def corrected_t_test(differences: Any, test_share: float) -> float:
    """p of no mean difference between two models scored on the same resampled splits (Nadeau and Bengio 2003).

    Training parts overlap, so the variance of the mean is taken as (1 / k + test / train) s^2, not s^2 / k. NaN for
    fewer than two splits; 1 where all differences are 0.

    >>> round(corrected_t_test([0.02, 0.03, 0.01, 0.04, 0.03], test_share=0.2), 3)
    0.027
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2 or not np.isfinite(d).all():
        return float("nan")
    spread = d.std(ddof=1)
    if spread == 0:
        return 1.0 if d.mean() == 0 else 0.0
    error = spread * np.sqrt(1 / len(d) + test_share / (1 - test_share))
    return float(2 * t.sf(abs(d.mean()) / error, len(d) - 1))


def mcnemar(truth: Any, first: Any, second: Any) -> float:
    """Exact p of two classifiers erring equally often on one test set.

    >>> mcnemar([1] * 10, [1] * 10, [0] * 8 + [1] * 2)
    0.0078125
    """
    truth, first, second = map(np.asarray, (truth, first, second))
    only = int(((first == truth) & (second != truth)).sum()), int(((first != truth) & (second == truth)).sum())
    return float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0


def delong(truth: Any, first: Any, second: Any) -> float:
    """p of equal AUC of two scores of one test set with classes 0 and 1 (DeLong et al. 1988). NaN without both
    classes, 1 where nothing differs."""
    truth = np.asarray(truth).astype(bool)
    m, n = int(truth.sum()), int((~truth).sum())
    if m < 2 or n < 2:
        return float("nan")
    places = []
    for score in (np.asarray(first, dtype=float), np.asarray(second, dtype=float)):
        ranks = rankdata(score)
        above = (ranks[truth] - rankdata(score[truth])) / n
        below = 1 - (ranks[~truth] - rankdata(score[~truth])) / m
        places.append((above, below))
    gain = [a - b for a, b in zip(places[0], places[1], strict=True)]
    variance = gain[0].var(ddof=1) / m + gain[1].var(ddof=1) / n
    difference = gain[0].mean()
    if variance == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * norm.sf(abs(difference) / np.sqrt(variance)))
