"""The state that a run begins with: random, from a trained model, or of another run's checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.experiments.runs import trained
from crescendo.experiments.runs.arrays import describe_arrays, described_array
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.trainer.adapting import Adapting
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig, upcycling

Tree = Any


def fresh_state(session: Session, initialize_from: str | None = None) -> TrainState:
    """The state at the begin of a run, with random parameters or those of a trained model.

    Where only the run's model has experts, each begins as a copy of a feed-forward part (`models.upcycling`).

    Raises:
      UserError: for a model of another shape; its vocabulary may differ in the rows that no token uses.
    """
    if initialize_from is None:
        return session.fresh_state()
    (folder, at), wanted = trained.named(initialize_from), session.abstract_state.parameters
    if (folder / "run.json").is_file():
        fixed = read_run(folder).info.get("fixed", {})
        upcycles_to = _upcycles_to(session, fixed.get("model", {}))
        stored = wanted if upcycles_to is None else upcycling.dense_shapes(upcycles_to)
        shapes = stored_shapes(fixed.get("arrays", {}), stored, f"train.initialize_from = {initialize_from!r}")
        parameters, _ = trained.saved_parameters(folder, shapes, at)
    else:
        model = trained.load(folder, at)
        parameters, upcycles_to = model.parameters, _upcycles_to(session, model.config.identity)
        stored = wanted if upcycles_to is None else upcycling.dense_shapes(upcycles_to)

    tokens = getattr(session.task.data, "vocab_size", 0)

    def fit(path, have, want):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        have = np.asarray(have)
        if name in ("embedding.table", "head.table") and len(have) < tokens:
            raise UserError(
                f"train.initialize_from = {initialize_from!r}: its {name} has {len(have):,} rows, and the data's "
                f"tokenizer {tokens:,} tokens: read the data with the model's own tokenizer"
            )
        if name in ("embedding.table", "head.table") and have.shape[1:] == want.shape[1:]:
            more = max(0, want.shape[0] - have.shape[0])
            have = np.pad(have[: want.shape[0]], ((0, more), (0, 0)))
        if have.shape != want.shape:
            raise UserError(
                f"train.initialize_from = {initialize_from!r}: its {name} is {have.shape}, this model's {want.shape}: "
                "set the model's fields to its own"
            )
        return jax.device_put(have, want.sharding)

    _check_alike(_paths(parameters), _paths(stored), f"train.initialize_from = {initialize_from!r}")
    if upcycles_to is not None:
        with user_values():
            parameters = upcycling.upcycled(upcycles_to, parameters, jax.random.key(session.seed))
    return session.fresh_state(jax.tree.map_with_path(fit, parameters, wanted))


def _upcycles_to(session: Session, model: Mapping[str, Any]) -> ModelConfig | None:
    """The session's model if it has experts and the one that it starts from, by its fields, has none."""
    config = getattr(session.task, "config", None)  # tasks over text have one
    sparse = isinstance(config, ModelConfig) and config.experts is not None
    return config if sparse and "experts" not in model else None


def state_of(start_from: str, session: Session) -> tuple[TrainState, Clock]:
    """The state and the clock of another run's checkpoint, `RUN@EXAMPLES`, laid out as the session wants them.

    Raises:
      UserError: for another form, a run or a checkpoint that isn't there, arrays that aren't this session's, or a
        checkpoint at or past the end of this run.
    """
    folder, examples = trained.named(start_from)
    if examples is None:
        raise UserError(f"train.start_from = {start_from!r} must be RUN@EXAMPLES, such as 'runs/stable@4096'")
    adapting = Adapting(session)
    before, now = read_run(folder).info.get("fixed", {}).get("arrays"), describe_arrays(session.abstract_state)
    if before != now and not adapting.can_take(before or {}):
        differing = sorted(name for name in {*(before or {}), *now} if (before or {}).get(name) != now.get(name))
        raise UserError(
            f"train.start_from = {start_from!r}: {len(differing)} of its arrays are not this run's, such as "
            f"{differing[0]}: use its model and optimizer, or train.initialize_from for its parameters alone"
        )
    if session.end_from(examples) <= examples:
        raise UserError(
            f"train.start_from = {start_from!r} lies at or past the end of this run, or less than a microbatch of "
            f"{session.plan.microbatch_examples} before it: train.total_examples = {session.total_examples}; raise "
            "that, since the clock goes on"
        )
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"train.start_from = {start_from!r}: {folder} has no checkpoint yet")
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        checkpoints.adapting = adapting
        state, clock = checkpoints.restore_at(examples, session.abstract_state)
    # What it left out is in its own records. Two arrays, as the step is given the memory of each.
    none, in_a_row = (jnp.zeros_like(x) for x in (state.skipped_steps, state.skipped_in_a_row))
    state = dataclasses.replace(state, skipped_steps=none, skipped_in_a_row=in_a_row)
    return state, dataclasses.replace(clock, seconds=0.0)


def _paths(tree: Tree) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _check_alike(have: set[str], wanted: set[str], where: str) -> None:
    """That parameters have the names of a model's."""
    if differing := sorted(have ^ wanted):
        who = "it alone" if differing[0] in have else "this model alone"
        raise UserError(
            f"{where} has other parameters than this model, as {who} has {differing[0]}: set model.qk_norm, "
            "model.tied_head, model.shared_layers and what is about experts to its own"
        )


def stored_shapes(arrays: Mapping[str, str], wanted: Tree, where: str) -> Tree:
    """The shapes of a run's parameters in a tree like `wanted`.

    Args:
      arrays: of the run's state, as its `run.json` has them (`runs.arrays.describe_arrays`).
      wanted: the shapes of a model's parameters.
      where: the run comes from, for messages.

    Raises:
      UserError: for parameters that aren't those of `wanted`, whatever their shapes.
    """
    prefix = ".parameters"
    stored = {name.removeprefix(prefix): text for name, text in arrays.items() if name.startswith(prefix)}
    _check_alike(set(stored), _paths(wanted), where)

    def shape(path, _) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        try:
            return described_array(stored[name])
        except (ValueError, TypeError):
            raise UserError(f"{where}: its run.json has no shape of {name}: {stored[name]!r:.60}") from None

    return jax.tree.map_with_path(shape, wanted)
