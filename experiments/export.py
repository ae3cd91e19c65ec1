"""Write a trained model for others' tools: `python -m crescendo.experiments.export RUN --to hf`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from crescendo.experiments.runs import hf, trained
from crescendo.experiments.runs.hf_config import FORMATS, format_of
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.pallas_kernels.console import plain_console

EXAMPLES = """examples:
  python -m crescendo.experiments.export runs/lm_30m --to hf
  python -m crescendo.experiments.export runs/lm_30m --to hf --out exported/lm_30m
  python -m crescendo.experiments.export runs/lm_30m --to hf --at 65536

Then, with Hugging Face's library: AutoModelForCausalLM.from_pretrained("runs/lm_30m/hf")"""


def export(run: Path, out: Path, at: int | None = None) -> hf.ModelConfig:
    """Writes a checkpoint of a run as a folder that `transformers` reads; returns the decoder's shape.

    The checkpoint is the newest, or that of `at` examples. What kind of a model it is, `runs.hf_config.format_of` says.
    Weights are float32.

    Raises:
      UserError: for a folder without a checkpoint, a model that the format can't hold, or a place that is taken.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give another folder with --out, or remove it")
    model = trained.load(run, at)
    hf.write_folder(out, model.config, model.parameters, model.tokenizer, max_length=model.max_length or 2048)
    return model.config


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = plain_parser("Write a trained model in another library's format.", EXAMPLES)
    result.add_argument("run", type=local_path, metavar="RUN", help="a run's folder")
    result.add_argument("--to", required=True, choices=["hf"], help="hf: Hugging Face's transformers")
    result.add_argument(
        "--at", type=int, metavar="EXAMPLES", help="the run's checkpoint at so many examples (default: the newest)"
    )
    result.add_argument(
        "--out", type=local_path, help="the folder to write (default: hf in the run's, hf-EXAMPLES with --at)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    out = arguments.out or arguments.run / ("hf" if arguments.at is None else f"hf-{arguments.at}")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    config = export(arguments.run, out, arguments.at)
    kind = FORMATS[format_of(config)].name
    plain_console().print(f"{out}: a {kind} model of {config.layers} layers", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
