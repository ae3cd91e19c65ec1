"""Groups of parameters, by path or by logical axis, each with its own share of the learning rate and of the decay."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import optax

from crescendo.optim.masks import leaves_with_paths
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import update_with_factor
from crescendo.optim.states import nodes
from crescendo.ranges import NotNegative, check_fields


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Some of the parameters, and how they are trained differently.

    Attributes:
      path: a pattern over paths such as "blocks/attention/query/kernel"; `*` matches slashes too. Or
      axis: a logical name that one of the parameter's axes has, such as "vocab".
      learning_rate: multiplies the rate (that of a decay that is multiplied by the rate, too).
      weight_decay: multiplies the decay.
      frozen: not trained at all.

    Raises:
      ValueError: both a path and an axis or neither, or a multiplier that is negative, NaN or infinite.
    """

    path: str | None = None
    axis: str | None = None
    learning_rate: NotNegative = 1.0
    weight_decay: NotNegative = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.axis is None):
            raise ValueError(f"a group needs either a path or an axis, got path {self.path!r} and axis {self.axis!r}")
        check_fields(self)

    def __str__(self) -> str:
        return f"group {self.path!r}" if self.axis is None else f"group of axis {self.axis!r}"

    def matches(self, path: str, axes: Sequence[str | None]) -> bool:
        """Whether a parameter of this path and of these logical axes is in the group."""
        return fnmatch.fnmatchcase(path, self.path) if self.path is not None else self.axis in axes


def group(
    path: str | None = None,
    axis: str | None = None,
    learning_rate: NotNegative = 1.0,
    weight_decay: NotNegative = 1.0,
    frozen: bool = False,
) -> ParameterGroup:
    """A `ParameterGroup`, for configs.

    >>> str(group(axis="vocab", learning_rate=0.1))
    "group of axis 'vocab'"
    """
    return ParameterGroup(path, axis, learning_rate, weight_decay, frozen)


def assign(groups: Sequence[ParameterGroup], params: optax.Params, logical_axes: Any = None) -> Any:
    """The index of every parameter's group, the first that matches, in a tree like `params`; None where none does.

    Args:
      groups: in order of precedence.
      params: the parameters, or their shapes.
      logical_axes: a tree like `params` of tuples of names; needed by groups that have an axis.

    Raises:
      ValueError: a group that gets no parameter, with the nearest names.

    >>> params = {"head": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}}
    >>> assign([group("head/*"), group("*/scale")], params)
    {'head': {'bias': 0, 'kernel': 0}, 'norm': {'scale': 1}}
    """
    indices = _indices(groups, params, logical_axes)
    _refuse_empty(groups, indices, params, logical_axes, range(len(groups)))
    return jax.tree.unflatten(jax.tree.structure(params), indices)


def frozen_mask(groups: Sequence[ParameterGroup], params: optax.Params, logical_axes: Any = None) -> Any:
    """A tree like `params` of booleans: True where a parameter's group is frozen.

    Args and Raises: as `assign`.

    >>> frozen_mask([group("head/*", frozen=True)], {"head": {"kernel": 1.0}, "norm": {"scale": 1.0}})
    {'head': {'kernel': True}, 'norm': {'scale': False}}
    """
    indices = _indices(groups, params, logical_axes)
    _refuse_empty(groups, indices, params, logical_axes, range(len(groups)))
    frozen = [index is not None and groups[index].frozen for index in indices]
    return jax.tree.unflatten(jax.tree.structure(params), frozen)


def scale_groups(
    optimizer: optax.GradientTransformation, groups: Sequence[ParameterGroup], logical_axes: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, each group's updates multiplied by its share of the rate, and its decay by its share of the decay.

    The shares reach the optimizer as the extra arguments `rate_multipliers` and `decay_multipliers`, trees of floats.
    Where nothing takes the former (`schedule_free` and `average_weights` do, since they average what the update makes),
    the updates are scaled. Parameters of a frozen group get updates of 0; a loop that leaves them out of `params`
    altogether saves their state. The state is the optimizer's own, and without groups so is the transform.

    Args:
      optimizer: any optimizer, as long as no group has a share of the decay; else one that reads it.
      groups: the first that matches a parameter counts.
      logical_axes: see `assign`; may hold more parameters than are trained.

    Raises:
      ValueError: at `init`, a group that isn't frozen and gets no parameter, or a share of the decay that the optimizer
        doesn't read.

    >>> import jax.numpy as jnp
    >>> optimizer = scale_groups(optax.sgd(1.0), [group("head", learning_rate=0.5)])
    >>> params = {"head": jnp.ones(1), "table": jnp.ones(1)}
    >>> print(optimizer.update(params, optimizer.init(params), params)[0])
    {'head': Array([-0.5], dtype=float32), 'table': Array([-1.], dtype=float32)}
    """
    inner = optax.with_extra_args_support(optimizer)
    if not groups:
        return inner
    trained = [index for index, member in enumerate(groups) if not member.frozen]
    decays = any(member.weight_decay != 1 for member in groups)

    def init(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        if jax.tree.leaves(params):  # none while optax looks for what mirrors a parameter
            _refuse_empty(groups, _indices(groups, params, logical_axes), params, logical_axes, trained)
        if decays and not _reads_decay(state):
            which = next(member for member in groups if member.weight_decay != 1)
            raise ValueError(
                f"{which}: weight_decay = {which.weight_decay} has no effect on this optimizer: "
                f"use one of {', '.join(decaying())}"
            )
        return state

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        members = [None if index is None else groups[index] for index in _indices(groups, updates, logical_axes)]
        structure = jax.tree.structure(updates)
        rates = [1.0 if g is None else 0.0 if g.frozen else g.learning_rate for g in members]
        if any(rate != 1 for rate in rates):
            extra_args["rate_multipliers"] = jax.tree.unflatten(structure, rates)
        if decays:
            shares = [1.0 if g is None else g.weight_decay for g in members]
            extra_args["decay_multipliers"] = jax.tree.unflatten(structure, shares)
        return update_with_factor(inner, updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def decaying() -> list[str]:
    """The names of the optimizers that read `decay_multipliers`.

    >>> "lion" in decaying(), "muon" in decaying()
    (True, False)
    """
    params = jax.ShapeDtypeStruct((2, 2), "float32")
    return [name for name, make in OPTIMIZERS.items() if _reads_decay(jax.eval_shape(make(1.0).init, params))]


def _reads_decay(opt_state: optax.OptState) -> bool:
    """Whether a transform whose state this is, or its shapes, takes the extra argument `decay_multipliers`."""
    return any(getattr(node, "reads_decay_multipliers", False) is True for node in nodes(opt_state))


def _indices(groups: Sequence[ParameterGroup], params: optax.Params, logical_axes: Any) -> list[int | None]:
    """The group of every leaf, in order."""
    axes = _axes_by_path(logical_axes)
    return [
        next((i for i, member in enumerate(groups) if member.matches(path, axes.get(path, ()))), None)
        for path in ("/".join(path) for path, _ in leaves_with_paths(params))
    ]


def _axes_by_path(logical_axes: Any) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every parameter by its path."""
    return {"/".join(path): names for path, names in leaves_with_paths(logical_axes, lambda x: isinstance(x, tuple))}


def _refuse_empty(
    groups: Sequence[ParameterGroup],
    indices: Sequence[int | None],
    params: optax.Params,
    logical_axes: Any,
    needed: Sequence[int],
) -> None:
    """Raises ValueError for a needed group that gets no parameter."""
    for index in needed:
        if index in indices:
            continue
        paths = ["/".join(path) for path, _ in leaves_with_paths(params)]
        axes = _axes_by_path(logical_axes)
        if any(groups[index].matches(path, axes.get(path, ())) for path in paths):
            raise ValueError(f"{groups[index]} gets no parameter: groups before it take all that it matches")
        wanted, known = groups[index].path, paths
        if wanted is None:
            wanted, known = str(groups[index].axis), sorted({n for path in paths for n in axes.get(path, ()) if n})
        close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"{groups[index]} matches no parameter; nearest: {', '.join(close) or 'none'}")
