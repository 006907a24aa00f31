"""Comparing methods over data sets, after Demšar 2006 (JMLR 7): scores are (sets, methods), higher is better.

The set is the unit: one number for each set and method. Folds of a set overlap and seeds share its rows, so that
neither are samples of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import stats

DIGITS = 10  # means of the same accuracies, added in another order, are the same


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """(methods,) mean over sets of the rank, 1 for the best; ties share their mean.

    >>> average_ranks(np.array([[0.9, 0.8, 0.8], [0.5, 0.6, 0.7]])).tolist()
    [2.0, 2.25, 1.75]
    """
    return stats.rankdata(-scores.round(DIGITS), axis=1).mean(0)


def friedman(scores: np.ndarray) -> float:
    """p-value of Friedman's test that all methods rank alike; NaN for fewer than three methods or two sets."""
    sets, methods = scores.shape
    if methods < 3 or sets < 2:
        return math.nan
    return float(stats.friedmanchisquare(*scores.round(DIGITS).T).pvalue)


def wilcoxon(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test over sets; equal scores count half for either side."""
    difference = (a - b).round(DIGITS)
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference, zero_method="zsplit").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down rule.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def pairwise(scores: np.ndarray) -> np.ndarray:
    """(methods, methods) Holm-corrected p-values of Wilcoxon's test for each pair; 1 on the diagonal."""
    methods = scores.shape[1]
    pairs = list(combinations(range(methods), 2))
    table = np.ones((methods, methods))
    for (i, j), p in zip(pairs, holm([wilcoxon(scores[:, i], scores[:, j]) for i, j in pairs]), strict=True):
        table[i, j] = table[j, i] = p
    return table


def critical_difference(methods: int, sets: int, alpha: float = 0.05) -> float:
    """Nemenyi's CD = q_α √(k(k + 1)/(6N)): average ranks that differ by less are not told apart.

    >>> round(critical_difference(methods=4, sets=14, alpha=0.1), 2)  # Demšar's example
    1.12
    """
    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(methods * (methods + 1) / (6 * sets)))


def groups(ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """Lowest and highest rank of each largest group of two or more methods that differ by less than `difference`.

    >>> groups([1.0, 1.5, 2.2, 4.0], 1.0)
    [(1.0, 1.5), (1.5, 2.2)]
    """
    found: list[tuple[float, float]] = []
    ordered = sorted(ranks)
    for i, low in enumerate(ordered):
        members = [rank for rank in ordered[i:] if rank - low < difference]
        if len(members) > 1 and (not found or members[-1] > found[-1][1]):
            found.append((low, members[-1]))
    return found


def wins_ties_losses(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int]:
    """On how many sets a is above, equal to and below b."""
    difference = (a - b).round(DIGITS)
    return int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum())
