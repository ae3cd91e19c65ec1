"""Ops with many implementations each; a call is served by the first that can, and `explain` says which and why.

>>> import jax.numpy as jnp
>>> from crescendo.pallas_kernels import rms_norm, softmax
>>> print(softmax(rms_norm(jnp.array([3.0, 3.0]), jnp.ones(2), eps=0.0)))
[0.5 0.5]
>>> print(softmax.implementations["triton"])
crescendo.pallas_kernels.softmax.triton

A folder here is a package with one op or several, `OPS` has them all by name, and each is an attribute of this package;
`hopper` has pieces that kernels for Hopper GPUs are made of.
The folder of `attention` is thereby hidden as an attribute; `import crescendo.pallas_kernels.attention.specs` and
`from crescendo.pallas_kernels.attention import specs` mean it nevertheless.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the loop below binds
    from crescendo.pallas_kernels.attention import attention as attention
    from crescendo.pallas_kernels.attention import shared_prefix as shared_prefix
    from crescendo.pallas_kernels.grouped_matmul import grouped_matmul as grouped_matmul
    from crescendo.pallas_kernels.layer_norm import layer_norm as layer_norm
    from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from crescendo.pallas_kernels.rms_norm import qk_norm_rotary as qk_norm_rotary
    from crescendo.pallas_kernels.rms_norm import rms_norm as rms_norm
    from crescendo.pallas_kernels.softmax import log_softmax as log_softmax
    from crescendo.pallas_kernels.softmax import softmax as softmax
    from crescendo.pallas_kernels.swiglu import swiglu as swiglu

OPS: dict[str, Any] = {}
"""Every op by its name."""

for _folder in pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        _package = importlib.import_module(f"{__name__}.{_folder.name}")
        OPS |= {name: value for name, value in vars(_package).items() if hasattr(value, "implementations")}
globals().update(OPS)
