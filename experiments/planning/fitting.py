"""Whether something fits a device, in words."""

from crescendo.experiments.trainer.session import MEMORY_SHARE


def fit(needed_bytes: float, memory_bytes: int | None, kind: str) -> str:
    """Whether what is needed on a device fits it.

    >>> fit(2**31, 2**32, "H100"), fit(2**32, 2**31, "H100")
    ('fits: 2.0 of the 4.0 GiB of a H100', 'does not fit: 4.0 GiB, and a H100 has 2.0')
    """
    if memory_bytes is None:
        return f"the memory of a {kind} isn't known here: name a device with --device to hear whether it fits"
    if needed_bytes > MEMORY_SHARE * memory_bytes:
        return f"does not fit: {needed_bytes / 2**30:.1f} GiB, and a {kind} has {memory_bytes / 2**30:.1f}"
    return f"fits: {needed_bytes / 2**30:.1f} of the {memory_bytes / 2**30:.1f} GiB of a {kind}"
