"""`python -m crescendo.experiments.papers.critical_batch`, as `crescendo critical_batch`."""

from crescendo.experiments.papers.critical_batch import main
from crescendo.experiments.runtime.cli import run_command

run_command(main)
