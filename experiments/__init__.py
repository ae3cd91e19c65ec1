"""What a person runs; the rooms below hold everything else.

A paper's experiment is a module here too: `python -m crescendo.experiments.batch_warmup` finds it in `papers/`.
"""

from pathlib import Path

from crescendo.experiments.runtime.start import ctrl_c_ends

__path__.append(str(Path(__file__).with_name("papers")))


def run() -> None:
    """The entry point of `crescendo`."""
    with ctrl_c_ends():
        from crescendo.experiments import __main__
    __main__.run()
