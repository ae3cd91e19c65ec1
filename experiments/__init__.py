"""What a person runs; the rooms below hold everything else.

A paper's experiment is a module here too: `python -m crescendo.experiments.batch_warmup` finds it in `papers/`.
"""

from pathlib import Path

__path__.append(str(Path(__file__).with_name("papers")))
