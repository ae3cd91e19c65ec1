"""Continue a text with a trained model: `python -m crescendo.experiments.generate RUN --prompt "Once"`."""

import argparse
import sys
from collections.abc import Sequence

from crescendo.experiments.runs import trained
from crescendo.experiments.runs.generation import generate, stream
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.encoding import check_typed, decoded
from crescendo.experiments.runtime.files import local_path

EXAMPLES = """examples:
  python -m crescendo.experiments.generate runs/debug --prompt "def main("
  python -m crescendo.experiments.generate runs/lm_30m --tokens 400 --temperature 0.8 --top-p 0.95 --seed 1
  cat story.txt | python -m crescendo.experiments.generate runs/lm_30m --prompt -
  python -m crescendo.experiments.generate runs/lm_30m/hf --prompt "Once" --temperature 0"""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = plain_parser("Continue a text with a trained model.", EXAMPLES)
    add = result.add_argument
    add("run", type=local_path, metavar="RUN", help="a run's folder, or one in Hugging Face's format")
    add("--at", type=int, metavar="EXAMPLES", help="the run's checkpoint at so many examples (default: the newest)")
    add("--prompt", default="", help="the text to go on from; - reads it from standard input (default: none)")
    add("--tokens", type=int, default=200, help="at most so many (default 200)")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token (default 1)")
    add("--top-k", type=int, help="draw from the k likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that together reach this (default 1)")
    add("--seed", type=int, default=0, help="of the draws (default 0)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = vars(parser().parse_args(argv))
    run, at, prompt = arguments.pop("run"), arguments.pop("at"), arguments.pop("prompt")
    piped = prompt == "-"
    prompt = decoded(sys.stdin.buffer.read(), "standard input") if piped else check_typed(prompt, "--prompt")
    use_compilation_cache()
    model = trained.load(run, at)
    longest = len(model.tokenizer.encode(prompt)) + arguments["tokens"]
    if model.max_length is not None and longest > model.max_length:
        print(f"note: trained on rows of {model.max_length} tokens, this may go to {longest}", file=sys.stderr)
    text = stream(model, prompt, generate(model, prompt, **arguments))
    sys.stdout.write(prompt)
    for piece in text:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_command(main)
