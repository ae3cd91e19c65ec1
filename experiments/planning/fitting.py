"""Whether something fits a device, in words."""

from collections.abc import Mapping

from crescendo.experiments.trainer.microbatches import MEMORY_SHARE

# The part of a session's memory of which the compiler may keep less.
ACTIVATIONS = "activations of a microbatch, at most"


def fit(parts: Mapping[str, float], memory_bytes: int | None, kind: str) -> str:
    """Whether what is needed on a device fits it; where only the activations might be too much, that it may not.

    >>> fit({"parameters": 2**31}, 2**32, "H100"), fit({"parameters": 2**32}, 2**31, "H100")
    ('fits: 2.0 of the 4.0 GiB of one H100', 'does not fit: 4.0 GiB, and one H100 has 2.0')
    >>> fit({"parameters": 2**30, ACTIVATIONS: 2**33}, 2**32, "H100")
    'may not fit: up to 9.0 GiB, and one H100 has 4.0'
    """
    if memory_bytes is None:
        return f"the memory of a {kind} isn't known here: name a device with --device to hear whether it fits"
    needed, limit = sum(parts.values()), MEMORY_SHARE * memory_bytes
    if needed <= limit:
        return f"fits: {needed / 2**30:.1f} of the {memory_bytes / 2**30:.1f} GiB of one {kind}"
    may = needed - parts.get(ACTIVATIONS, 0.0) <= limit
    said = "may not fit: up to" if may else "does not fit:"
    return f"{said} {needed / 2**30:.1f} GiB, and one {kind} has {memory_bytes / 2**30:.1f}"
