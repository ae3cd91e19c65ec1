"""A trained model, read from a run's newest checkpoint or from a folder in Hugging Face's format."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crescendo import models
from crescendo.experiments import hf
from crescendo.experiments.checkpoint import Checkpoints
from crescendo.experiments.errors import UserError
from crescendo.experiments.metrics import read_run
from crescendo.experiments.state import TrainState, initial_state
from crescendo.experiments.tokenizer import SubwordTokenizer
from crescendo.models import ModelConfig


class Trained(NamedTuple):
    """What generating, exporting and going on need.

    Attributes:
      config: the decoder, decided for this machine.
      parameters: float32 arrays in nested dicts.
      tokenizer: of the text it was trained on.
      max_length: the longest row it was trained on, or what its folder says.
      examples_seen: the checkpoint's clock; None for a folder that isn't a run's.
    """

    config: ModelConfig
    parameters: dict
    tokenizer: SubwordTokenizer
    max_length: int | None
    examples_seen: int | None


def load(folder: Path) -> Trained:
    """The model in a run folder (its newest whole checkpoint) or in a folder in Hugging Face's format.

    Raises:
      UserError: if it is neither, has no checkpoint or no tokenizer, or is damaged.
    """
    if (folder / "config.json").is_file():
        config = hf.read_config(folder)
        parameters, max_length, examples_seen = hf.read_parameters(folder, config), None, None
    else:
        run = read_run(folder)
        try:
            config = ModelConfig(**run.info["fixed"]["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'run.json'} doesn't describe a decoder ({error})") from None
        parameters, examples_seen = _newest(folder, config)
        max_length = run.info["sequence_length"]
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy there the one that the model was trained with")
    here = dataclasses.replace(config, dtype=None, scan_layers=None).for_platform(jax.default_backend())
    return Trained(here, parameters, SubwordTokenizer.load(path), max_length, examples_seen)


def fresh_state(
    config: ModelConfig,
    chain: optax.GradientTransformationExtraArgs,
    seed: int,
    abstract: TrainState,
    initialize_from: str | None = None,
) -> TrainState:
    """The state at the begin of a run, with random parameters or those of a trained model.

    Raises:
      UserError: for a model of another shape; its vocabulary may differ in the rows that no token uses.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if initialize_from is None:
        return jax.jit(lambda: initial_state(config, chain, seed), out_shardings=shardings)()
    parameters = load(Path(initialize_from)).parameters

    def fit(path, have, want):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        have = np.asarray(have)
        if name in ("embedding.table", "head.table") and have.shape[1:] == want.shape[1:]:
            more = max(0, want.shape[0] - have.shape[0])
            have = np.pad(have[: want.shape[0]], ((0, more), (0, 0)))
        if have.shape != want.shape:
            raise UserError(
                f"train.initialize_from = {initialize_from!r}: its {name} is {have.shape}, this model's {want.shape}: "
                "set the model's fields to its own"
            )
        return jax.device_put(have, want.sharding)

    if _paths(parameters) != _paths(abstract.parameters):
        raise UserError(
            f"train.initialize_from = {initialize_from!r} has other parameters than this model: set model.qk_norm and "
            "model.tied_head to its own"
        )
    fitted = jax.tree.map_with_path(fit, parameters, abstract.parameters)

    def begin(parameters):
        return TrainState(parameters, chain.init(parameters), jnp.int32(0), jnp.int32(0))

    return jax.jit(begin, out_shardings=shardings)(fitted)


def _paths(tree: dict) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _newest(folder: Path, config: ModelConfig) -> tuple[dict, int]:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} has no checkpoint yet: a run saves its first after a tenth of its length")
    shapes = jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore_parameters(shapes)
    finally:
        checkpoints.close()
