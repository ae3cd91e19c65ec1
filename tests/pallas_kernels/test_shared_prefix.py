"""Attention over a prefix in common: what its reference means, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import attention, shared_prefix


def test_the_reference_is_attention_of_each_member():
    random = np.random.default_rng()
    draw = lambda *shape: jnp.float32(random.normal(size=shape))  # noqa: E731
    q, prefix_k, prefix_v, k, v = (
        draw(4, 3, 2, 8),
        draw(2, 5, 1, 8),
        draw(2, 5, 1, 8),
        draw(4, 3, 1, 8),
        draw(4, 3, 1, 8),
    )
    found = shared_prefix(q, prefix_k, prefix_v, k, v, causal=True, implementation="reference")
    for row in range(4):
        one = slice(row, row + 1)
        keys, values = (jnp.concatenate([a[row // 2][None], b[one]], 1) for a, b in ((prefix_k, k), (prefix_v, v)))
        positions = jnp.arange(5, 8)[None], jnp.arange(8)[None]
        alone = attention(q[one], keys, values, causal=True, positions=positions, implementation="reference")
        np.testing.assert_allclose(found[one], alone, atol=1e-6)


def test_bad_input_is_named():
    q, prefix, k = jnp.ones((4, 3, 2, 8)), jnp.ones((2, 5, 1, 8)), jnp.ones((4, 3, 1, 8))
    mistakes = {
        "q has 4 rows, which is no multiple of prefix_k's 3 groups": (q, *[jnp.ones((3, 5, 1, 8))] * 2, k, k),
        r"prefix_v must be \[groups, length, 1, 8\] like k, not \(2, 5, 2, 8\)": (
            q, prefix, jnp.ones((2, 5, 2, 8)), k, k
        ),
        "prefix_k and prefix_v must have one shape": (q, prefix, prefix[:, :4], k, k),
        "k and v must have one shape": (q, prefix, prefix, k, k[:, :2]),
    }  # fmt: skip
    for message, arrays in mistakes.items():
        with pytest.raises(ValueError, match=message):
            shared_prefix(*arrays)
    with pytest.raises(TypeError, match="prefix_k must have q's dtype float32, not bfloat16"):
        shared_prefix(q, prefix.astype(jnp.bfloat16), prefix, k, k)
