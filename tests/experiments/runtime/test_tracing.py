"""JAX's profiler, whose files can't be written."""

import shutil

import jax
import pytest

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.tracing import traced


def test_a_folder_that_goes_while_its_files_are_made_is_one_line(tmp_path):
    folder = tmp_path / "profile"
    tracing = traced(folder)
    tracing.__enter__()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(UserError, match=rf"^cannot write the profile to {folder}: .*not a directory"):
        tracing.__exit__(None, None, None)
    folder.unlink()
    jax.profiler.stop_trace()  # it goes on until its files are written
