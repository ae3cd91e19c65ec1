"""What a person runs; the rooms below hold everything else.

A paper's experiment is a module here too: `python -m crescendo.experiments.batch_warmup` finds it in `papers/`.
"""

from crescendo.experiments.runtime.start import ctrl_c_ends_commands

ctrl_c_ends_commands()

from pathlib import Path  # noqa: E402 (for which Ctrl-C may come already)

__path__.append(str(Path(__file__).with_name("papers")))


def run() -> None:
    """The entry point of `crescendo`."""
    from crescendo.experiments import __main__

    __main__.run()
