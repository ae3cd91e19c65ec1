"""What a person did wrong, said in one line."""


class UserError(Exception):
    """A mistake that the user can mend: its message names the value, the limit and the fix.

    Commands print it as one line on standard error and exit with code 2 (`run_command` in `cli.py`).

    >>> raise UserError("train.batch_size = -4 must be at least 1")
    Traceback (most recent call last):
    ...
    crescendo.experiments.errors.UserError: train.batch_size = -4 must be at least 1
    """
