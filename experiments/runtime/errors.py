"""What a person did wrong, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend: its message names the value, the limit and the fix.

    Commands print it as one line on standard error and exit with code 2 (`run_command` in `cli.py`). Whatever names and
    values stand in it, it is one line of a bounded length, and what a terminal would obey is written out.

    >>> raise UserError("train.batch_size = -4 must be at least 1")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: train.batch_size = -4 must be at least 1
    >>> print(UserError("runs/a\\nb\\x1b[2J: no such folder"))
    runs/a\\nb\\x1b[2J: no such folder
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def one_line(text: str, most: int = 1000) -> str:
    """A text without line ends and other characters that aren't shown, cut in its middle where it's long.

    >>> one_line("a" * 2000, most=20)
    'aaaaaaaaaa ... aaaaa'
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 4) :]}"


@contextmanager
def user_values() -> Iterator[None]:
    """Around calls whose arguments are the user's own: a library's `ValueError` about them is the user's to mend.

    So is a file that can't be opened.

    >>> with user_values(): raise ValueError("batch_size = 0 must be at least 1")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: batch_size = 0 must be at least 1
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
