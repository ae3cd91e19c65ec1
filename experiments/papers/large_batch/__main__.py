"""`python -m crescendo.experiments.papers.large_batch`, as `crescendo large_batch`."""

from crescendo.experiments.papers.large_batch import main
from crescendo.experiments.runtime.cli import run_command

run_command(main)
