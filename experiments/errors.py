"""What a person did wrong, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend: its message names the value, the limit and the fix.

    Commands print it as one line on standard error and exit with code 2 (`run_command` in `cli.py`).

    >>> raise UserError("train.batch_size = -4 must be at least 1")
    Traceback (most recent call last):
    ...
    crescendo.experiments.errors.UserError: train.batch_size = -4 must be at least 1
    """


@contextmanager
def user_values() -> Iterator[None]:
    """Around calls whose arguments are the user's own: a library's `ValueError` about them is the user's to mend.

    >>> with user_values(): raise ValueError("batch_size = 0 must be at least 1")
    Traceback (most recent call last):
    ...
    crescendo.experiments.errors.UserError: batch_size = 0 must be at least 1
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
