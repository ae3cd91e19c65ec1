"""What a run that was started from Python keeps as its configuration: what it was given, as comments.

Python's objects have no text that would make them again, so such a file repeats nothing, and says so.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from crescendo.experiments.runtime.errors import UserError

FIRST_LINE = "# Started from Python: this says what the run was given, and does not repeat it."
_LONGEST = 300


def given(arguments: Mapping[str, Any]) -> str:
    """The text for `config.gin`: a comment for each argument of `train`.

    >>> print(given({"batch_size": 8, "task": given}), end="")
    # Started from Python: this says what the run was given, and does not repeat it.
    # train.batch_size = 8
    # train.task = crescendo.experiments.runtime.from_python.given
    """
    lines = [f"# train.{name} = {_shown(value)}" for name, value in sorted(arguments.items())]
    return "\n".join([FIRST_LINE, *lines, ""])


def differences(earlier: str, now: str, *, but_for: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """What two such texts say otherwise, as far as values have a text: `(before, now)`, by name.

    >>> differences(given({"batch_size": 8, "seed": 0}), given({"batch_size": 16, "seed": 0}))
    ({'train.batch_size': '8'}, {'train.batch_size': '16'})
    """
    if not earlier.startswith(FIRST_LINE):
        return {}, {}
    then, asked = (dict(re.findall(r"^# (\S+) = (.*)$", text, re.MULTILINE)) for text in (earlier, now))
    names = [n for n in then | asked if n not in but_for and then.get(n) != asked.get(n)]
    return {n: then.get(n, "not set") for n in names}, {n: asked.get(n, "not set") for n in names}


def _shown(value: Any) -> str:
    """On one line: a value itself where that is short and means something, else what kind of thing it is.

    Of a dataclass its fields' defaults are left out, so that a field that is new says no difference to earlier texts.
    """
    text = repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        of_fields = ((x.name, repr(getattr(value, x.name)), repr(x.default)) for x in dataclasses.fields(value))
        text = f"{type(value).__name__}({', '.join(f'{name}={is_}' for name, is_, was in of_fields if is_ != was)})"
    text = " ".join(text.split())
    if len(text) <= _LONGEST and not re.search(r" at 0x[0-9a-f]+", text):
        return text
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def check_repeatable(text: str, named: str) -> None:
    """That a configuration isn't that of a run from Python.

    Raises:
      UserError: where it is.
    """
    if text.startswith(FIRST_LINE):
        raise UserError(
            f"{named} is of a run that was started from Python, whose objects have no text: repeat it there"
        )
