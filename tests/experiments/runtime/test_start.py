"""What a start leaves out: a package that isn't asked for, and looking for garbage."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from crescendo.experiments.runtime import start


@pytest.mark.slow
def test_a_run_imports_no_torch_where_it_is_installed(tmp_path):
    (tmp_path / "torch.py").write_text("")
    script = "import sys, crescendo.experiments.train; print('torch' in sys.modules); import torch"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["False"]


def test_garbage_is_left_until_the_last_thread_is_through():
    inside, leave = threading.Event(), threading.Event()
    while start._without_collection:  # threads of earlier tests, on their way out
        time.sleep(0.01)

    def other():
        with start.no_collection():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    with start.no_collection():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join(60)
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    while start._without_collection:
        time.sleep(0.01)
    gc.disable()
    try:
        with start.no_collection(), start.no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_age_of_a_command_is_that_of_its_process(monkeypatch):
    assert start.command_seconds() == 0  # pytest is none of ours
    monkeypatch.setattr(start, "_is_command", lambda: True)
    first = start.command_seconds()
    assert 0 < first <= start.command_seconds() < first + 60
