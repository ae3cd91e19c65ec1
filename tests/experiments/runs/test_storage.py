"""Checkpoints on a disk: names, saves that are read back, what they say of themselves, and errors by their cause."""

import errno
import json
import os
import shutil
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import pytest

from crescendo.experiments.runs import storage
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.metadata import newest_identity
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError

RUN = {"format": 2, "fixed": {"seed": 0}}


def state(value: float) -> TrainState:
    return TrainState({"w": jnp.full((8, 4), value), "b": jnp.zeros(2)}, (), jnp.int32(0), jnp.int32(0))


def save(folder, *examples, **options):
    with Checkpoints(folder, run=RUN, **options) as checkpoints:
        for seen in examples:
            checkpoints.save(state(seen), Clock(seen, seen // 8, 8))
    return folder


def restore(folder, report=pytest.fail):
    with Checkpoints(folder) as checkpoints:
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
        found = checkpoints.restore(wanted, report)
    assert found is not None
    assert found[0].parameters["w"].tolist() == state(found[1].examples_seen).parameters["w"].tolist()
    return found[1].examples_seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoints", 8, 16)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*b?[!c]**\nü %20#|"])
def test_a_name_with_any_characters_holds_checkpoints(tmp_path, name):
    folder = save(tmp_path / name, 8, 16, 24)
    assert sorted(path.name for path in folder.iterdir()) == ["16", "24"]
    assert restore(folder) == 24


@pytest.mark.parametrize("name", ["/s3/bucket/run", os.fsdecode(b"run-\xff")])
def test_a_name_that_cannot_hold_checkpoints_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"can't be kept below /s3|no UTF-8"):
        Checkpoints(tmp_path / name)


@pytest.mark.parametrize("lost", ["state/manifest.ocdbt", "state/_METADATA", "meta/metadata"])
def test_a_save_that_does_not_read_back_is_said_and_nothing_older_goes(copy, monkeypatch, lost):
    monkeypatch.setattr(storage, "sync_folder", lambda written: (written / lost).unlink())
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .*doesn't read back .*those before it are kept"):
        save(copy, 24, keep_last=1)
    monkeypatch.undo()
    assert restore(copy) == 16


def test_a_hook_that_another_thread_may_be_calling_is_not_freed(copy):
    before = threading.excepthook, sys.unraisablehook
    with Checkpoints(copy), Checkpoints(copy, read_only=True):
        hooks = [weakref.ref(hook) for hook in (threading.excepthook, sys.unraisablehook)]
        assert not {threading.excepthook, sys.unraisablehook} & set(before)
    assert (threading.excepthook, sys.unraisablehook) == before
    assert all(hook() for hook in hooks)


def test_what_must_stay_stays(copy):
    with Checkpoints(copy, keep_last=1) as checkpoints:
        checkpoints.keep = lambda saved: {8} & set(saved)
        for seen in (24, 32):
            checkpoints.save(state(seen), Clock(seen, seen // 8, 8))
        checkpoints.wait()
        assert checkpoints.saved() == [8, 32]


def edit(folder, change):
    path = folder / "16" / "meta" / "metadata"
    says = json.loads(path.read_text())
    change(says)
    path.write_text(json.dumps(says))


def of_before(says):
    """As a version wrote it that kept neither."""
    del says["fingerprint"], says["run"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda says: says["clock"].update(seconds=1.5), "its metadata are not the ones that were saved"),
        (lambda says: says["run"]["fixed"].update(seed=1), "its metadata are not the ones that were saved"),
        (lambda says: says["clock"].update(examples_seen=24), "its metadata are not the ones that were saved"),
        (lambda says: says.pop("clock"), "its metadata has no clock"),
        (lambda says: says["clock"].pop("steps"), "its metadata has no clock.steps"),
        (lambda says: says.pop("fingerprints"), "its metadata has no fingerprints"),
        (lambda says: says["clock"].update(steps="2"), "clock.steps = '2'"),
        (lambda says: says["clock"].update(steps=-2), "clock.steps = -2"),
        (lambda says: says["fingerprints"].pop(), "its metadata are not the ones that were saved"),
        (lambda says: says.pop("fingerprint"), "its metadata have lost their fingerprint"),
        # As of a version that had none, what else is known.
        (lambda says: (of_before(says), says["clock"].update(examples_seen=24)), "its clock says 24 examples"),
        (lambda says: (of_before(says), says["fingerprints"].pop()), "its arrays are not the ones"),
    ],
)
def test_metadata_that_are_not_those_saved_give_way_to_the_checkpoint_before(copy, change, said):
    edit(copy, change)
    lines = []
    assert restore(copy, lines.append) == 8
    assert len(lines) == 1
    assert said in lines[0]
    assert (copy.parent / "damaged_checkpoint_16").is_dir()
    # And once more, beside what was set aside before.
    save(copy, 16)
    edit(copy, change)
    assert restore(copy, lines.append) == 8
    assert (copy.parent / "damaged_checkpoint_16_2").is_dir()


@pytest.mark.parametrize("content", [b"", b"\0" * 400, b"[]", b"[" * 10_000, b'{"clock": 1e999}', b"\xff\xfe{"])
def test_metadata_that_are_no_metadata_too(copy, content):
    (copy / "16" / "meta" / "metadata").write_bytes(content)
    assert newest_identity(copy).fixed == {"seed": 0}
    assert restore(copy, lambda line: None) == 8


def test_a_state_that_has_made_more_steps_than_its_clock_is_not_that_clocks(copy):
    more = state(24)
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(
            TrainState(more.parameters, more.opt_state, jnp.int32(4), more.skipped_in_a_row), Clock(24, 3, 8)
        )
    lines = []
    restore(copy, lines.append)
    assert "its clock says 3 steps, its state 4" in lines[0]


def test_a_checkpoint_of_before_these_were_kept_is_taken_and_said(copy):
    edit(copy, of_before)
    lines = []
    assert restore(copy, lines.append) == 16
    assert "of a version whose metadata had no fingerprint yet" in lines[0]
    assert newest_identity(copy).fixed == {"seed": 0}  # the one before it says so


def test_a_file_that_cannot_be_opened_is_that_and_not_damage(copy):
    manifest = copy / "16" / "state" / "manifest.ocdbt"
    manifest.unlink()
    manifest.symlink_to(manifest)  # as root permissions keep nobody out, but this does
    with pytest.raises(UserError, match=r"cannot read .*/16/state/manifest.ocdbt: Too many levels .*mend that"):
        restore(copy)
    assert (copy / "16").is_dir()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; make room, and the same command goes on"),
        (ValueError("x [OS error 13: EACCES Permission denied]"), "Permission denied; make it writable, and"),
        (FileNotFoundError(errno.ENOENT, "x"), "No such file or directory; it was moved or removed: put it back"),
        (OSError(errno.EIO, "x"), "Input/output error; mend that, and"),
    ],
)
def test_what_keeps_a_save_from_the_disk_is_named_with_its_own_way_on(tmp_path, raised, said):
    told = storage.cannot_save(tmp_path, raised)
    assert said in str(told)
    assert "\n" not in str(told)


def test_an_error_that_is_not_the_disks_is_no_users_mistake(tmp_path):
    assert storage.cannot_save(tmp_path, TypeError("ours")) is None
