"""What a user would write otherwise, for a compiler to fuse."""

from collections.abc import Callable

import jax

PEERS: dict[str, dict[str, Callable]] = {"swiglu": {"jax.nn": lambda gate, up: jax.nn.silu(gate) * up}}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""
    del op_name

    def swiglu(gate, up):
        import torch

        return torch.nn.functional.silu(gate) * up

    return {"torch.compile": swiglu}
