"""Go on with a model of Hugging Face's: `python -m crescendo.experiments.import_hf FOLDER --config mine.gin`.

The folder gives the decoder's shape, its weights and its tokenizer; the config gives the text and the length. The
learning rate is warmed up again and decays by half a cosine, as Gupta et al. 2023 found good for going on with other
data (`crescendo.optim.schedules.rewarm`).
"""

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path

from crescendo import optim
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runs import hf
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.trainer.training import train
from crescendo.models.config import EXPERT_FIELDS, SPEED_FIELDS

EXAMPLES = """examples:
  python -m crescendo.experiments.import_hf downloads/SmolLlama --config lm_30m.gin \\
    --set 'text_files.paths = ["books/*.txt"]' --peak 3e-4
  python -m crescendo.experiments.import_hf runs/lm_30m/hf --config lm_30m.gin --run runs/continued

The folder holds config.json, *.safetensors and tokenizer.json (a Llama, Qwen3, Mixtral or Qwen3-MoE model). The same
command goes on where an interrupted run stopped."""

_LEFT = ("vocab_size", *SPEED_FIELDS, "dropout", "z_loss", "balance_loss", "router_z_loss")
"""The fields of a model that its folder doesn't say: the data's, and those that ask something of training alone."""


def bindings(folder: Path, peak: float) -> list[str]:
    """The gin statements that make a config's run go on with the model in a folder.

    Raises:
      UserError: if the folder holds no model that can be imported, or the peak is no learning rate.
    """
    if not 0 < peak < float("inf"):
        raise UserError(f"--peak {peak} must be above 0 and finite")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy there the one that the model was trained with")
    config = hf.read_config(folder)
    left = {*_LEFT, *(EXPERT_FIELDS if config.experts is None else ())}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in left}
    decided = {name: value for name, value in fields.items() if value is not None}
    return [
        f"train.initialize_from = {str(folder)!r}",
        f"text_data.tokenizer = {str(folder / 'tokenizer.json')!r}",
        *(f"model.{name} = {value!r}" for name, value in decided.items()),
        *(f"{name}.learning_rate = @rewarm()" for name in optim.OPTIMIZERS if _asks_for_a_rate(name)),
        f"rewarm.peak = {peak!r}",
    ]


def _asks_for_a_rate(optimizer: str) -> bool:
    """Whether its learning rate is the caller's to say; prodigy's, which it finds itself, is not."""
    return inspect.signature(optim.OPTIMIZERS[optimizer]).parameters["learning_rate"].default is inspect.Parameter.empty


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = configurables.parser("Go on training a model in Hugging Face's format with other text.", EXAMPLES)
    result.add_argument(
        "folder", type=local_path, metavar="FOLDER", help="config.json, *.safetensors and tokenizer.json"
    )
    result.add_argument("--run", type=local_path, help="the run's folder (default: runs/FOLDER-continued)")
    result.add_argument(
        "--peak",
        type=float,
        default=3e-4,
        help="the learning rate to warm up to, of any optimizer that asks for one (default 3e-4)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    made = bindings(arguments.folder, arguments.peak)
    bound = configurables.bind(train, arguments.config or ["debug.gin"], arguments.set, own=made)
    bound(run=str(arguments.run or f"runs/{arguments.folder.resolve().name}-continued"))


if __name__ == "__main__":
    run_command(main)
