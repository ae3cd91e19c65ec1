"""What a user would write otherwise, for a compiler to fuse."""

from collections.abc import Callable

import jax

from crescendo.pallas_kernels.swiglu.gradient import halves


def _product(gate, up=None):
    gate, up = halves(gate, up)
    return jax.nn.silu(gate) * up


PEERS: dict[str, dict[str, Callable]] = {"swiglu": {"jax.nn": _product}}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""
    del op_name

    def swiglu(gate, up=None):
        import torch

        gate, up = halves(gate, up)
        return torch.nn.functional.silu(gate) * up

    return {"torch.compile": swiglu}
