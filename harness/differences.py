"""Differences between methods at the same seeds: their interval, and how sure they are.

    found = differences.against(ours, theirs)        # of {seed: run} each
    differences.holm([0.01, 0.04, nan])              # [0.02, 0.04, nan]
    differences.words(found, 0.02)                   # "+1.2 (+0.3 to +2.1) above"
"""
import math
from typing import NamedTuple

import numpy as np

LEVEL = 0.05


class Difference(NamedTuple):
    """A mean difference in accuracy, in points; half of its 95 % interval; and p, the
    probability of a mean as far from 0 if there is no difference. NaN where it is not
    known."""

    mean: float
    half: float
    p: float


UNKNOWN = Difference(np.nan, np.nan, np.nan)


def against(runs, baseline):
    """Return the Difference in accuracy to a baseline at the same seeds, by Student's t
    for pairs.

    runs, baseline: {seed: run}. It is UNKNOWN where they share fewer than two seeds.
    Where all pairs differ alike, only the mean is known: accuracies are counts of
    images, so that two seeds are equal by chance at times, and t has no spread to rest
    on.
    """
    found = pairs(runs, baseline)
    if len(found) < 2 or runs == baseline:
        return UNKNOWN
    mean, degrees = float(np.mean(found)), len(found) - 1
    error = float(np.std(found, ddof=1) / np.sqrt(len(found)))
    if error < 1e-9:  # alike up to rounding
        return Difference(mean, np.nan, np.nan)
    return Difference(mean, quantile(degrees) * error, p_value(mean / error, degrees))


def pairs(runs, baseline):
    """Return the difference in accuracy of each seed that two share, in points, a list.
    runs, baseline: {seed: run}."""
    return [100 * (run.summary["test_accuracy"]
                   - baseline[seed].summary["test_accuracy"])
            for seed, run in runs.items() if seed in baseline]


def p_value(t, degrees):
    """Return the two-sided p of Student's t, which has a closed form for whole degrees
    of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(odd + 2, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)  # rounding may leave less than 0


def quantile(degrees):
    """Return the t whose interval holds 95 %, by bisection."""
    low, high = 0.0, 13.0  # it is 12.7 at one degree of freedom, and less at more
    for _ in range(50):
        middle = (low + high) / 2
        if p_value(middle, degrees) > LEVEL:
            low = middle
        else:
            high = middle
    return middle


def holm(values):
    """Return p-values corrected for their number (Holm, 1979). If those below LEVEL are
    taken as found, chance alone brings one or more of them with a probability of 5 % at
    most. NaN stays and does not count."""
    known = sorted((p, i) for i, p in enumerate(values) if not np.isnan(p))
    corrected, least = [np.nan] * len(values), 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        corrected[i] = least
    return corrected


def sign(mean, p):
    """Return 1 for above, -1 for below, 0 where it cannot be told. p: corrected."""
    return int(np.sign(mean)) if p < LEVEL else 0


def words(mean, half, p):
    """Return a difference in words, "+1.2 (+0.3 to +2.1) above"; "+1.2" where only the
    mean is known, "-" where nothing is. The interval is that of this difference alone;
    p is corrected."""
    if np.isnan(mean):
        return "-"
    if np.isnan(half):
        return f"{mean:+.1f}"
    word = {1: " above", -1: " below", 0: ""}[sign(mean, p)]
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}){word}"
