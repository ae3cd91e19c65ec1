"""What a user would call otherwise."""

from collections.abc import Callable

import jax

PEERS: dict[str, dict[str, Callable]] = {
    "softmax": {"jax.nn": lambda x: jax.nn.softmax(x, axis=-1)},
    "log_softmax": {"jax.nn": lambda x: jax.nn.log_softmax(x, axis=-1)},
}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""

    def softmax(x):
        import torch

        return torch.softmax(x, -1) if op_name == "softmax" else torch.log_softmax(x, -1)

    return {"torch.compile": softmax}
