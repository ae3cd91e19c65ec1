"""What is left out of imports."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(name: str) -> Iterator[None]:
    """Within it a package seems not to be installed, for importing another one that can do without; if it is new.

    >>> _ = sys.modules.pop("tabnanny", None)
    >>> with without("tabnanny"):
    ...     import tabnanny
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: import of tabnanny halted; None in sys.modules
    >>> import tabnanny
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
