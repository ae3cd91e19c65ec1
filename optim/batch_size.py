"""Batch-size policies, and the wrapper that carries one beside an optimizer.

A policy is pure: it is tested without a model, checkpointed like the parameters, and decides the same again when a
run is resumed. The training loop reads `current_batch_size(opt_state)`, and by definition uses it one step late: the
size decided by update n is that of batch n + 2. So the device never waits for the decision.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, MinLen

from crescendo.optim.registry import POLICIES
from crescendo.optim.scaling import learning_rate_factor, update_with_factor
from crescendo.optim.states import find_states
from crescendo.ranges import Count


class BatchStats(NamedTuple):
    """What the loop tells the transforms of a batch, as the extra argument `batch_stats`.

    Attributes:
      examples_seen: int32, examples drawn before this batch.
      batch_size: int32, examples in this batch.
      loss: float32, the mean over the batch.
      squared_norm: float32, `||g||^2` of the mean gradient, before clipping.
      microbatch_squared_norms: float32 `[k_max]`, the same of each microbatch's mean gradient; 0 from the count on.
      microbatches: int32, k, how many there were.

    The rest is None unless the loop was asked for it, by the name in `STATISTICS` at the head of each line.

    Attributes:
      layer_squared_norms, microbatch_layer_squared_norms: "layers"; float32 `[n]` and `[k_max, n]`, the squared norms
        split up by layer and parameter, in the order of `noise_scale.layer_squared_norms`; no further pass.
      norm_squared_norm, norm_example_squared_norm: "norm_layers"; float32, of the scales of the normalisation layers
        alone: `||g||^2`, and the mean of `||g_j||^2` over the examples j; the backward pass has them.
      microbatch_dot_products: "dot_products"; float32 `[k_max]`, `<g_i, g>`. The gradients are computed twice.
      coordinate_variance_ratio: "coordinates"; float32, `max_c Var_c / g_c^2` over the entries c of the gradient, Var
        being an example's variance, unbiased. The gradients are computed twice.
    """

    examples_seen: jax.Array
    batch_size: jax.Array
    loss: jax.Array
    squared_norm: jax.Array
    microbatch_squared_norms: jax.Array
    microbatches: jax.Array
    layer_squared_norms: jax.Array | None = None
    microbatch_layer_squared_norms: jax.Array | None = None
    norm_squared_norm: jax.Array | None = None
    norm_example_squared_norm: jax.Array | None = None
    microbatch_dot_products: jax.Array | None = None
    coordinate_variance_ratio: jax.Array | None = None


Coupling = Literal["linear", "sqrt", "none"]
"""How the learning rate follows the batch size; see `adaptive_batch_size`."""

STATISTICS = ("layers", "norm_layers", "dot_products", "coordinates")
"""What a loop measures only on demand; see `BatchStats`."""


class BatchSizePolicy(NamedTuple):
    """How the batch size moves.

    Attributes:
      init: `() -> state`, a tree of arrays.
      update: `(state, stats: BatchStats) -> (batch_size, state)`, jittable, `batch_size` an int32 out of `sizes`.
      sizes: every size it may take, in examples, the initial one first.
      reason: why it changes the size, for the log.
      statistics: the members of `STATISTICS` that it reads.
      measured_on: the fingerprint of the model and data whose measurements it follows, for the loop to compare with its
        own; None where it follows none.
      min_microbatches: how many microbatches a batch must have for the policy to learn anything from it; the planner
        gives every size at least so many.
      first_change_examples: on the clock, before which the size is the initial one whatever is measured.
      stays: why the size never changes, for a person, where that is known before and wasn't asked for; else empty.
      for_rows: of a policy whose thresholds are in tokens, `tokens in an example -> the policy`, for the loop to call.
    """

    init: Callable[[], Any]
    update: Callable[[Any, BatchStats], tuple[jax.Array, Any]]
    sizes: tuple[int, ...]
    reason: str
    statistics: tuple[str, ...] = ()
    measured_on: str | None = None
    min_microbatches: int = 1
    first_change_examples: int = 0
    stays: str = ""
    for_rows: Callable[[int], Any] | None = None


@POLICIES
def constant(batch_size: Count) -> BatchSizePolicy:
    """The same batch size throughout the run.

    Args:
      batch_size: in examples, of all devices together.

    >>> constant(32).sizes
    (32,)
    """
    return by_threshold([batch_size], [0], "constant")._replace(stays="")


@POLICIES
def staged(
    sizes: Annotated[Sequence[Count], MinLen(1)],
    *,
    starts_examples: Sequence[Annotated[int, Ge(0)]] | None = None,
    starts_tokens: Sequence[Annotated[int, Ge(0)]] | None = None,
    sequence_length: Count | None = None,
) -> BatchSizePolicy:
    """Size i from threshold i on: `sizes[max {i : starts[i] <= examples seen}]`.

    Args:
      sizes: batch sizes in examples.
      starts_examples: where each begins on the clock; the first is 0, and they increase.
      starts_tokens: the same in tokens, instead.
      sequence_length: tokens in an example, for `starts_tokens`; None: those of the data, which the loop knows.

    Raises:
      ValueError: for a size below 1, thresholds that don't increase from 0, or other than one per size.

    >>> policy = staged([4, 8], starts_tokens=[0, 1000], sequence_length=10)
    >>> stats = BatchStats(jnp.int32(96), jnp.int32(4), *[jnp.float32(0)] * 3, jnp.int32(1))
    >>> int(policy.update(policy.init(), stats)[0])
    8
    """
    if (starts_examples is None) == (starts_tokens is None):
        raise ValueError("give either starts_examples or starts_tokens")
    if starts_examples is None:
        assert starts_tokens is not None

        def of_rows(tokens: int) -> BatchSizePolicy:
            return staged(sizes, starts_examples=[-(-start // tokens) for start in starts_tokens])

        return by_tokens("staged", of_rows, sequence_length)
    if len(sizes) != len(starts_examples):
        raise ValueError(f"{len(sizes)} sizes and {len(starts_examples)} starts: give each size its start")
    if starts_examples[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts_examples)):
        raise ValueError(f"starts {list(starts_examples)} (in examples) must begin with 0 and increase")
    return by_threshold(sizes, starts_examples, "staged threshold")


def by_threshold(sizes: Sequence[int], starts_examples: Sequence[int], reason: str) -> BatchSizePolicy:
    """The policy of sizes with known starts, which don't decrease; of several that start together the last counts."""
    # A start past the range of the clock is never reached.
    starts = np.minimum(np.array(starts_examples, np.int64), np.iinfo(np.int32).max).astype(np.int32)
    table = np.array(sizes, np.int32)

    def update(state, stats: BatchStats):
        seen = stats.examples_seen + stats.batch_size
        return jnp.asarray(table)[jnp.searchsorted(starts, seen, side="right") - 1], state

    policy = BatchSizePolicy(init=lambda: (), update=update, sizes=tuple(sizes), reason=reason)
    changes = [start for size, start in zip(sizes, starts.tolist(), strict=True) if size != sizes[0]]
    if not changes:
        return policy._replace(stays=f"its only size is {sizes[0]}")
    return policy._replace(first_change_examples=changes[0])


def by_tokens(
    name: str, of_rows: Callable[[int], BatchSizePolicy], sequence_length: int | None = None
) -> BatchSizePolicy:
    """A policy whose thresholds are in tokens, for rows whose length a loop may know better.

    Args:
      name: of the policy, for messages.
      of_rows: from the tokens in an example to the policy, of the same sizes whatever they are.
      sequence_length: the tokens in an example, which a loop's must be; None: any will do, and until a loop gives its
        own (`BatchSizePolicy.for_rows`) the policy can't be asked.

    Raises:
      ValueError: of `for_rows`, another one than `sequence_length`; at `update`, none yet.

    >>> policy = staged([4, 8], starts_tokens=[0, 1000])
    >>> policy.for_rows(10).first_change_examples, policy.for_rows(40).first_change_examples
    (100, 25)
    """

    def for_rows(tokens: int) -> BatchSizePolicy:
        if sequence_length not in (None, tokens):
            raise ValueError(
                f"{name}.sequence_length = {sequence_length}, but the data's rows have {tokens} tokens: leave it out, "
                "or give theirs"
            )
        return of_rows(tokens)

    if sequence_length is not None:
        return of_rows(sequence_length)._replace(for_rows=for_rows)

    def update(state: Any, stats: BatchStats):
        raise ValueError(f"{name} counts tokens and doesn't know how many an example has: give sequence_length")

    return of_rows(1)._replace(update=update, first_change_examples=0, for_rows=for_rows)


def stays_throughout(policy: BatchSizePolicy, total_examples: int) -> str:
    """That and why a policy meant to move the batch size can't, in a run of this length; empty where it may.

    The size decided by the update of batch n is that of batch n + 2, so a decision in the last but one comes too late.

    >>> stays_throughout(staged([4, 8], starts_examples=[0, 64]), 68)
    'the batch size stays at 4 in the whole run: staged threshold changes it at 64 examples at the earliest and from \
the batch after the next one on, and the run ends at 68: lengthen it'
    >>> stays_throughout(staged([4, 8], starts_examples=[0, 64]), 72)
    ''
    """
    size, earliest = policy.sizes[0], policy.first_change_examples
    decided = -(-earliest // size) * size  # at the end of a batch
    if policy.stays:
        why = policy.stays
    elif earliest and decided + size >= total_examples:
        why = (
            f"{policy.reason} changes it at {earliest:,} examples at the earliest and from the batch after the next "
            f"one on, and the run ends at {total_examples:,}: lengthen it"
        )
    else:
        return ""
    return f"the batch size stays at {size} in the whole run: {why}"


class AdaptiveBatchSizeState(NamedTuple):
    """State of `adaptive_batch_size`: the optimizer's own, the policy's own, and the size it decided (int32[])."""

    inner_state: optax.OptState
    policy_state: Any
    batch_size: jax.Array


def adaptive_batch_size(
    optimizer: optax.GradientTransformation,
    policy: BatchSizePolicy,
    coupling: Coupling = "sqrt",
    *,
    base_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, with a batch size that `policy` chooses and a learning rate that follows it.

    The rate is f(B / B_0) eta, with B the size of the batch that made the gradient and B_0 the one that eta is meant
    for; f is `x` for "linear" (SGD), `sqrt x` for "sqrt" (Adam and its kin), 1 for "none" (McCandlish et al. 2018;
    Merrill et al. 2025 for batch warmup). The factor reaches the optimizer as the extra argument
    `learning_rate_factor`, so what it derives from its rate (Schedule-Free's average, Prodigy's estimate) and the rate
    in its state follow too. The updates of an optimizer that doesn't take it, such as optax's own, are scaled instead.

    Args:
      optimizer: any optimizer of this package or of optax; chain what comes before it within.
      policy: the batch-size policy.
      coupling: "linear", "sqrt" or "none".
      base_batch_size: B_0; the policy's initial size when None.

    Raises:
      ValueError: an unknown coupling, a base that isn't positive; at `update`, no extra argument `batch_stats`.

    >>> optimizer = adaptive_batch_size(optax.sgd(0.1), staged([2, 8], starts_examples=[0, 64]))
    >>> state = optimizer.init(jnp.ones(3))
    >>> int(current_batch_size(state))
    2
    """
    base = policy.sizes[0] if base_batch_size is None else base_batch_size
    # Raises for an unknown coupling; traced, as a GPU's first use takes seconds.
    jax.eval_shape(lambda: learning_rate_factor(coupling, base, base))
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> AdaptiveBatchSizeState:
        return AdaptiveBatchSizeState(inner.init(params), policy.init(), jnp.int32(policy.sizes[0]))

    def update(
        updates: optax.Updates,
        state: AdaptiveBatchSizeState,
        params: optax.Params | None = None,
        *,
        batch_stats: BatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveBatchSizeState]:
        if batch_stats is None:
            raise ValueError("adaptive_batch_size needs the extra argument batch_stats (BatchStats) in update()")
        extra_args["learning_rate_factor"] = learning_rate_factor(coupling, batch_stats.batch_size, base)
        updates, inner_state = update_with_factor(
            inner, updates, state.inner_state, params, batch_stats=batch_stats, **extra_args
        )
        batch_size, policy_state = policy.update(state.policy_state, batch_stats)
        return updates, AdaptiveBatchSizeState(inner_state, policy_state, batch_size)

    return optax.GradientTransformationExtraArgs(init, update)


def current_batch_size(opt_state: optax.OptState) -> jax.Array:
    """The size that the policy decided last, an int32 scalar, from a state with one `adaptive_batch_size`.

    Raises:
      ValueError: a state with none, or with several.
    """
    states = find_states(opt_state, AdaptiveBatchSizeState)
    if len(states) != 1:
        raise ValueError(f"the optimizer state holds {len(states)} adaptive_batch_size states; wrap exactly one")
    return states[0].batch_size
