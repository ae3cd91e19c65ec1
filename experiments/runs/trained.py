"""A trained model, read from a run's newest or chosen checkpoint or from a folder in Hugging Face's format."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from crescendo import models
from crescendo.experiments.data.tokenizer import SubwordTokenizer
from crescendo.experiments.runs import hf
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import to_json
from crescendo.models import ModelConfig

Tree = Any


class Trained(NamedTuple):
    """What generating, exporting and going on need.

    Attributes:
      config: the decoder, decided for this machine.
      parameters: float32 arrays in nested dicts.
      tokenizer: of the text it was trained on.
      max_length: the longest row it was trained on; None for a folder that isn't a run's.
      examples_seen: the checkpoint's clock; None for a folder that isn't a run's.
    """

    config: ModelConfig
    parameters: dict
    tokenizer: SubwordTokenizer
    max_length: int | None
    examples_seen: int | None


def named(text: str) -> tuple[Path, int | None]:
    """A folder and, where the text is `RUN@EXAMPLES`, the checkpoint that is meant; else None.

    >>> named("runs/stable@4096"), named("runs/stable")
    ((PosixPath('runs/stable'), 4096), (PosixPath('runs/stable'), None))
    """
    folder, at, examples = text.rpartition("@")
    if not at or not folder or not examples.isdecimal() or Path(text).is_dir():
        return Path(text), None
    return Path(folder), int(examples)


def load(folder: Path, at: int | None = None) -> Trained:
    """The model in a run folder or in a folder in Hugging Face's format.

    Args:
      folder: of either kind.
      at: which checkpoint of a run, by its examples; None: the newest complete one.

    Raises:
      UserError: if it is neither, has no checkpoint or no tokenizer, or is damaged.
    """
    if (folder / "config.json").is_file():
        if at is not None:
            raise UserError(
                f"{folder} is in Hugging Face's format, which has no checkpoint at {at} examples: leave it out"
            )
        config = hf.read_config(folder)
        parameters, max_length, examples_seen = hf.read_parameters(folder, config), None, None
    else:
        run = read_run(folder)
        config = decoder(run.info.get("fixed", {}).get("model", {}), f"{folder / 'run.json'}: fixed.model")
        max_length = run.said("sequence_length")
        here = config.for_platform(jax.default_backend())
        shapes = jax.eval_shape(lambda: models.initialize(here, jax.random.key(0)))
        parameters, examples_seen = saved_parameters(folder, shapes, at)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy there the one that the model was trained with")
    here = dataclasses.replace(config, dtype=None, scan_layers=None).for_platform(jax.default_backend())
    return Trained(here, parameters, SubwordTokenizer.load(path), max_length, examples_seen)


def decoder(fields: dict[str, Any], where: str) -> ModelConfig:
    """The decoder that a run's `run.json` describes.

    Args:
      fields: of it.
      where: they stand, for messages.

    Raises:
      UserError: for fields that are none of a decoder's.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if not fields or (others := sorted(fields.keys() - known)):
        raise UserError(f"{where} doesn't describe a decoder{f': it has {others[0]!r:.60}' if fields else ''}")
    return schemas.parse(to_json(fields), ModelConfig, where, way_on="restore the file")


def saved_parameters(folder: Path, shapes: Tree, at: int | None = None) -> tuple[dict, int]:
    """The parameters to use of a run's checkpoint, and its `examples_seen`.

    Args:
      folder: the run's.
      shapes: of the parameters.
      at: which checkpoint, by its examples; None: the newest.

    Raises:
      UserError: where there is none, or it is damaged or of another shape.
    """
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} has no checkpoint yet: a run saves its first after a tenth of its length")
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_parameters(shapes, at)
