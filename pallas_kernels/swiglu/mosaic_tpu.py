"""For TPU: none, as XLA fuses the product with the matrix multiplication that takes it."""

from crescendo.pallas_kernels.op import Unsupported


def swiglu(gate, up):
    """See the op."""
    raise Unsupported("has no kernel: on TPU XLA fuses the product with the projections about it")
