"""Folders that several processes want, that are moved or copied while a run goes on, or that are half prepared."""

import shutil
import time

import pytest
from faults import (
    MOVING,
    assert_clean,
    errors,
    examples_seen,
    fingerprints,
    finish,
    kill,
    random_moments,
    times,
    wait_until,
)

BINDINGS = ("TOTAL_EXAMPLES = 6144", *MOVING)
KILLS_OF_DATA = 8


@pytest.fixture(scope="module")
def whole(start_train, tmp_path_factory):
    """The run without a fault."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start_train(run, *BINDINGS))
    return run


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_of_three_processes_on_one_folder_one_trains_and_two_are_refused(start_train, tmp_path, whole, records):
    run = tmp_path / "run"
    processes = [start_train(run, *BINDINGS) for _ in range(3)]
    outputs = [process.communicate(timeout=1000)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2], outputs
    (first,) = (process for process in processes if process.returncode == 0)
    for process, output in zip(processes, outputs, strict=True):
        assert_clean(output)
        if process is not first:
            (line,) = errors(output)
            assert f"is in use by process {first.pid}" in line
    assert records(run) == records(whole)
    assert fingerprints(run) == fingerprints(whole)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_folder_copied_while_the_run_goes_on_can_be_gone_on_with(start_train, tmp_path, whole, records):
    run, moments = tmp_path / "run", random_moments()
    process, copies = start_train(run, *BINDINGS), []
    for _ in range(3):
        at = examples_seen(run) + moments.randrange(1000)
        wait_until(lambda at=at: examples_seen(run) > at, process)
        copies.append(tmp_path / f"copy{len(copies)}")
        copy_what_is_there(run, copies[-1])
    finish(process)
    for each in (run, *copies):
        finish(start_train(each, *BINDINGS))
        assert records(each) == records(whole)
        assert fingerprints(each) == fingerprints(whole)


def copy_what_is_there(source, target) -> None:
    """As `cp -r` does, which says what went away meanwhile and copies the rest."""
    try:
        shutil.copytree(source, target)
    except shutil.Error as error:
        print(error)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_folder_moved_while_the_run_goes_on_loses_nothing(start_train, tmp_path, whole, records):
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = start_train(run, *BINDINGS)
    wait_until(lambda: examples_seen(run) >= 1200, process)
    run.rename(moved)
    output, _ = process.communicate(timeout=600)
    assert_clean(output)
    assert process.returncode in (0, 2), output
    assert len(errors(output)) == (process.returncode == 2), output
    finish(start_train(moved, *BINDINGS))
    assert records(moved) == records(whole)
    assert fingerprints(moved) == fingerprints(whole)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_data_whose_preparation_is_killed_are_prepared_anew(start_train, tmp_path, records):
    documents, random = tmp_path / "books", random_moments()
    documents.mkdir()
    for i in range(20):
        (documents / f"{i}.txt").write_text(" ".join(random.choices(("batch", "size", "noise", "scale"), k=60_000)))
    cache, run = tmp_path / "cache", tmp_path / "run"
    data = (
        "TOTAL_EXAMPLES = 512",
        f"text_files.paths = ['{documents}/*.txt']",
        "text_data.tokenizer = 'bpe:300'",
    )
    own = f"text_data.cache_directory = '{cache}'"
    killed = 0
    for _ in range(times(KILLS_OF_DATA)):
        process = start_train(run, *data, own)
        wait_until(lambda: list(cache.rglob("*.partial")), process)
        time.sleep(random.random() * 0.8)
        killed += kill(process)
        print(sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_dir()))
    assert killed
    finish(start_train(run, *data, own))
    whole = tmp_path / "whole"
    finish(start_train(whole, *data, f"text_data.cache_directory = '{tmp_path / 'fresh'}'"))
    assert records(run) == records(whole)
    assert fingerprints(run) == fingerprints(whole)
    assert not list(cache.rglob("*.partial"))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_compiled_programs_that_are_damaged_are_compiled_anew(start_train, tmp_path, records):
    programs, moments, settings = tmp_path / "xla", random_moments(), ("TOTAL_EXAMPLES = 512",)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(programs)}
    finish(start_train(tmp_path / "before", *settings, environment=environment))
    for path in programs.glob("*-cache"):
        content = bytearray(path.read_bytes())
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        path.write_bytes(bytes(content[: moments.choice((len(content), len(content) // 2))]))
    output = finish(start_train(tmp_path / "after", *settings, environment=environment))
    assert "Error reading persistent compilation cache entry" in output
    assert records(tmp_path / "after") == records(tmp_path / "before")
