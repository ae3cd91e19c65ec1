"""Shares of sources along a run, and how many examples each has given, exactly: whole numbers and no history."""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from crescendo.experiments.runtime.errors import UserError

PARTS = 4096
"""Shares are whole numbers of such parts, so that a window of as many examples can have them exactly."""

Between = Literal["hold", "anneal"]


class Shares:
    """Shares of K sources as functions of the clock, whole 4,096ths at points, held or on a line between them.

    With the share s(t) of a source and its integral S(t) = ∫ s from 0 to t, its row number i is due at the first whole
    t with S(t) >= i + 1/2. Examples are in the order in which they are due, sources by their number where several are
    due at once. So N(t) = sum over sources of floor(S(t) + 1/2) rows are due up to t, which is within K / 2 of t:
    whatever the example, its place is found from K + 2 values of t.

    While shares stay the same, any window of 4,096 examples has exactly these of each source. Of two sources any window
    has what the integral says within 1. Of K sources the first n examples have it within (K + 3) / 2: three and more
    can't be within 1 in windows of every length.

    Args:
      points: the clock of each point, from 0 on, increasing, int64 `[points]`.
      parts: of `PARTS` for each source at each point, int64 `[points, K]`, rows that add up to `PARTS`.
      between: "hold" keeps the shares of a point to the next one, "anneal" goes there on a line; behind the last point
        they stay.

    Example:
      >>> shares = Shares([0], [[3072, 1024]], "hold")
      >>> source, row = shares.drawn(range(8))
      >>> source.tolist(), row.tolist()
      ([0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 2, 3, 4, 1, 5])
      >>> shares.before(10**9).tolist()
      [750000000, 250000000]
      >>> Shares([0, 1000], [[4096, 0], [0, 4096]], "anneal").before(1000).tolist()
      [500, 500]

    References:
      Tijdeman, "The chairman assignment problem", 1980 (https://doi.org/10.1016/0012-365X(80)90269-1): what can be had.
    """

    def __init__(self, points: Sequence[int], parts: Sequence[Sequence[int]] | np.ndarray, between: Between):
        self.points, self.parts, self.between = np.asarray(points, np.int64), np.asarray(parts, np.int64), between
        following = np.concatenate([self.parts[1:], self.parts[-1:]])
        self._slopes = following - self.parts if between == "anneal" else np.zeros_like(self.parts)
        self._spans = np.append(np.diff(self.points), 1)
        # Integrals up to each point, in halves of a part.
        areas = self._spans[:, None] * (2 * self.parts + self._slopes)
        self._begins = np.cumsum(np.concatenate([np.zeros_like(areas[:1]), areas[:-1]]), axis=0)

    def due(self, clock: np.ndarray) -> np.ndarray:
        """How many rows of each source are due up to each clock, floor(S + 1/2), int64 `[clocks, K]`; 0 below 0."""
        clock = np.maximum(clock, 0)
        i = np.searchsorted(self.points, clock, "right") - 1
        x, span = (clock - self.points[i])[:, None], self._spans[i][:, None]
        # slope * x^2 / span, rounded down, of which no product passes 2^63 for clocks below 2^31.
        whole, rest = np.divmod(self._slopes[i] * x, span)
        return (self._begins[i] + 2 * self.parts[i] * x + whole * x + rest * x // span + PARTS) // (2 * PARTS)

    def drawn(self, examples: Any) -> tuple[np.ndarray, np.ndarray]:
        """`(source, row)` of examples by their numbers, int64 `[examples]` each: row `row` of those of the source."""
        examples = np.asarray(examples, np.int64)
        due, total = self._around(examples)
        at = np.searchsorted(total, examples, "right")  # the first clock at which more are due than come before
        before, is_due = due[at - 1], due[at] > due[at - 1]
        rank = examples - total[at - 1]  # among those that are due at once
        source = np.argmax(np.cumsum(is_due, axis=1) > rank[:, None], axis=1)
        return source, before[np.arange(len(examples)), source]

    def before(self, examples_seen: int) -> np.ndarray:
        """How many of the first examples are of each source, int64 `[K]`."""
        due, total = self._around(np.array([examples_seen]))
        at = int(np.searchsorted(total, examples_seen, "right"))
        is_due = due[at] > due[at - 1]
        return due[at - 1] + (is_due & (np.cumsum(is_due) <= examples_seen - total[at - 1]))

    def _around(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many rows are due, by source and in all, at increasing clocks around those at which examples are."""
        reach = -(-self.parts.shape[1] // 2)
        clock = np.unique(examples[:, None] + np.arange(-reach, reach + 1))
        due = self.due(clock)
        return due, due.sum(axis=1)


def make_shares(weights: Mapping[Any, Any], sources: Sequence[str], between: Between, where: str) -> Shares:
    """Shares from weights as people write them.

    Args:
      weights: of every source by name; or such weights by the clock, in examples seen, from 0 on.
      sources: the names, in order.
      between: see `Shares`.
      where: names the weights in messages.

    Raises:
      UserError: for what isn't weights of just these sources, weights that are negative, not finite, or add up to 0,
        and a share above 0 that is below 1/4,096: names the source and the clock.

    >>> make_shares({0: {"a": 3, "b": 1}, 100: {"a": 1, "b": 1}}, ["a", "b"], "hold", "weights").parts.tolist()
    [[3072, 1024], [2048, 2048]]
    >>> make_shares({"a": 1.0, "b": -1}, ["a", "b"], "hold", "weights")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: weights: b has -1 at 0 examples: it must be a number from 0 to 1e300
    """
    if not weights:
        raise UserError(f"{where} is empty: give each of {', '.join(sources)} a weight")
    constant = not any(isinstance(of, Mapping) for of in weights.values())
    by_clock = {0: weights} if constant else weights
    points = []
    for clock, at in by_clock.items():
        number = int(clock) if isinstance(clock, str) and clock.isdecimal() and len(clock) < 11 else _plain(clock)
        if type(number) is not int or not 0 <= number < 2**31 or not isinstance(at, Mapping):
            raise UserError(
                f"{where}: {str(clock)[:40]!r} must be a clock, examples seen from 0 to below 2^31, with the weights "
                "there; or else give each source a weight and no clock"
            )
        points.append((number, at))
    points.sort(key=lambda point: point[0])
    if points[0][0] != 0:
        raise UserError(f"{where} begins at {points[0][0]} examples: say the weights at 0 too")
    if twice := [a for (a, _), (b, _) in itertools.pairwise(points) if a == b]:
        raise UserError(f"{where} says {twice[0]} examples twice: leave one out")
    return Shares([at for at, _ in points], [_parts(of, sources, at, where) for at, of in points], between)


def _parts(weights: Mapping[Any, Any], sources: Sequence[str], clock: int, where: str) -> list[int]:
    """The weights at a clock as whole parts that add up to `PARTS`: by the largest remainders."""
    if missing := [name for name in sources if name not in weights]:
        raise UserError(f"{where}: {missing[0]} has none at {clock} examples: give it 0 to leave it out")
    if unknown := [name for name in weights if name not in sources]:
        raise UserError(
            f"{where}: {str(unknown[0])[:40]!r} at {clock} examples is no source; there are {', '.join(sources)}"
        )
    given = [_plain(weights[name]) for name in sources]
    for name, weight in zip(sources, given, strict=True):
        if type(weight) not in (int, float) or not 0 <= weight <= 1e300:
            raise UserError(
                f"{where}: {name} has {str(weight)[:40]} at {clock} examples: it must be a number from 0 to 1e300"
            )
    total = sum(map(Fraction, given))
    if not total:
        raise UserError(
            f"{where}: those of {', '.join(sources)} add up to 0 at {clock} examples: give one of them more than 0"
        )
    exact = [Fraction(weight) * PARTS / total for weight in given]
    for name, parts in zip(sources, exact, strict=True):
        if 0 < parts < 1:
            raise UserError(
                f"{where}: {name} has {float(parts / PARTS):.2g} of all at {clock} examples, and the smallest share is "
                f"1/{PARTS}: raise its weight, or set it to 0"
            )
    result = [int(parts) for parts in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (result[i] - exact[i], i))
    for i in by_remainder[: PARTS - sum(result)]:
        result[i] += 1
    return result


def _plain(value: Any) -> Any:
    """The value, one of NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value
