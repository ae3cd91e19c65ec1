"""Which sizes would do, as errors say it."""

from collections.abc import Iterable


def divisors(n: int) -> list[int]:
    """The divisors of n, increasing.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [i for i in range(1, n + 1) if n % i == 0]


def alternatives(numbers: Iterable[int] | Iterable[str]) -> str:
    """In words.

    >>> alternatives([1, 2, 4]), alternatives([3])
    ('1, 2 or 4', '3')
    """
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


def nearest_multiples(size: int, of: int) -> str:
    """The multiples on both sides of a size that is none, from 1 times on.

    >>> nearest_multiples(10, of=4), nearest_multiples(3, of=4)
    ('8 or 12', '4')
    """
    below = size // of * of
    return alternatives([below, below + of] if below else [of])
