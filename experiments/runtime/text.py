"""Numbers and messages for people: short, and smoothed."""

import math

import numpy as np


class RunningMean:
    """Exponential mean, unbiased from the first value; what is not finite is left out.

    A value's weight falls by a factor e over `window` units of weight that come after it, so the mean doesn't depend on
    how the same stretch of data is cut into batches.

    >>> mean = RunningMean(window=100.0)
    >>> mean.add(3.0, weight=8)
    3.0
    >>> mean.add(float("nan"), weight=8)
    3.0
    """

    def __init__(self, window: float):
        self._window, self._sum, self._weight = window, 0.0, 0.0

    def add(self, value: float, weight: float) -> float:
        if math.isfinite(value):
            keep = math.exp(-weight / self._window)
            self._sum = keep * self._sum + (1 - keep) * value
            self._weight = keep * self._weight + (1 - keep)
        return self.value

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


def running_means(values: np.ndarray, weights: np.ndarray, window: float) -> np.ndarray:
    """What `RunningMean.add` returns of each value in turn, float64 `[n]`.

    >>> running_means(np.array([np.nan, 3.0, np.inf, 5.0]), np.array([8, 8, 8, 8]), window=100.0)
    array([       nan, 3.        , 3.        , 4.03997868])
    """
    known = np.isfinite(values)
    finite = np.flatnonzero(known)
    shares = weights[finite] / window
    at, gains = np.cumsum(shares), -np.expm1(-shares)
    terms = np.stack([gains * values[finite], gains])
    sums, carried, begin = np.empty_like(terms), np.zeros(2), 0
    while begin < len(finite):
        # Sums of weights that grow by no more than e^30, so that none overflows.
        end = max(begin + 1, int(np.searchsorted(at, at[begin] + 30)))
        growth = np.exp(at[begin:end] - at[begin])
        carried = np.exp(-shares[begin]) * carried
        sums[:, begin:end] = (carried[:, None] + np.cumsum(terms[:, begin:end] * growth, axis=1)) / growth
        carried, begin = sums[:, end - 1], end
    with np.errstate(invalid="ignore"):  # of what weighs nothing yet there is no mean
        means = np.append(sums[0] / sums[1], math.nan)  # the last stands before the first
    return means[np.cumsum(known) - 1]


def compact(value: float) -> str:
    """A number in three digits: 15,623 is `15.6k`, 4e9 is `4B`."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def visible(text: str) -> str:
    """The text with U+FFFD for what a page or a terminal doesn't show, or takes for an order.

    >>> visible("a\\x1b[2Jb\\tc")
    'a�[2Jb\\tc'
    """
    return text if text.isprintable() else "".join(x if x.isprintable() or x in "\n\t" else "\ufffd" for x in text)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3,723 is `1:02:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_short(error: BaseException, most: int = 200) -> str:
    """What a library says, in a line of bearable length.

    >>> in_short(ValueError("no header\\n  at byte 5\\n"))
    'no header at byte 5'
    """
    return " ".join(str(error).split())[:most] or type(error).__name__
