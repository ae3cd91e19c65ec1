"""A run's folder: held by one process, known by what its checkpoints say, and followed where it goes."""

import json
import os

import pytest

from crescendo.experiments.configs.binding import differences
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs import metadata
from crescendo.experiments.runs.arrays import by_path
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.wrapping import Wraps

FIXED = {"seed": 0, "model": {"width": 16}, "arrays": {".w": "float32[8]"}}


def checkpoint(folder, number, run):
    path = folder / "checkpoints" / str(number) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(metadata.sealed(Clock(number, number // 8, 8), run, [1])))


def test_a_lock_does_not_go_with_its_file(tmp_path):
    with run_folder.locked(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(UserError, match="is in use by process"), run_folder.locked(tmp_path):
            pass
    with run_folder.locked(tmp_path):
        pass


def test_where_folders_cannot_be_locked_the_file_is(tmp_path, monkeypatch):
    lock = run_folder.fcntl.flock

    def of_nfs(descriptor, how):
        if not isinstance(descriptor, int) or not run_folder.os.readlink(f"/proc/self/fd/{descriptor}").endswith(
            "lock"
        ):
            raise OSError(9, "Bad file descriptor")
        lock(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", of_nfs)
    with (
        run_folder.locked(tmp_path),
        pytest.raises(UserError, match=r"is in use by process \d+"),
        run_folder.locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_was_moved_is_noticed(tmp_path, replaced):
    folder = tmp_path / "run"
    with run_folder.locked(folder) as check_held:
        check_held()
        folder.rename(tmp_path / "elsewhere")
        if replaced:
            folder.mkdir()
        with pytest.raises(UserError, match="moved, removed or replaced while the run went on"):
            check_held()
        if replaced:
            folder.rmdir()
        (tmp_path / "elsewhere").rename(folder)
        check_held()


def test_what_fixes_a_run_is_known_without_its_run_json(tmp_path):
    assert run_folder.check_resumable(tmp_path, 2, FIXED) is None
    checkpoint(tmp_path, 8, {"format": 2, "fixed": FIXED})
    checkpoint(tmp_path, 16, None)
    assert run_folder.check_resumable(tmp_path, 2, FIXED) is None
    with pytest.raises(UserError, match="can't go on: seed was 0 and is now 1"):
        run_folder.check_resumable(tmp_path, 2, {**FIXED, "seed": 1})
    with pytest.raises(UserError, match=r"begun by a version .*format 2, this one 3"):
        run_folder.check_resumable(tmp_path, 3, FIXED)
    # Another run's run.json doesn't make it that run.
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "fixed": {**FIXED, "seed": 1}}))
    with pytest.raises(UserError, match="can't go on: seed was 0 and is now 1"):
        run_folder.check_resumable(tmp_path, 2, {**FIXED, "seed": 1})


def test_checkpoints_that_say_nothing_are_not_gone_on_with_without_run_json(tmp_path):
    checkpoint(tmp_path, 8, None)
    with pytest.raises(UserError, match=r"has checkpoints and no run.json, .* restore run.json, or give another"):
        run_folder.check_resumable(tmp_path, 2, FIXED)
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "fixed": FIXED}))
    assert run_folder.check_resumable(tmp_path, 2, FIXED)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"fixed": 3}', "{", "\0" * 80, "[" * 10_000])
def test_a_run_json_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json.*restore it, or move the folder away to start anew") as told:
        run_folder.check_resumable(tmp_path, 2, FIXED)
    assert "\n" not in str(told.value)


def test_checkpoints_that_may_not_be_read_are_that(tmp_path):
    checkpoint(tmp_path, 8, None)
    user, folder = os.geteuid(), tmp_path / "checkpoints"
    folder.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
            run_folder.check_resumable(tmp_path, 2, FIXED)
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("arrays", [[], None, 3, {"": "float32[]"}, {".w": 3}])
def test_arrays_that_are_none_are_one_line(tmp_path, arrays):
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "fixed": {**FIXED, "arrays": arrays}}))
    part = Wraps(False, False, False).part
    with pytest.raises(UserError, match=r"can't go on: arrays") as told:
        run_folder.check_resumable(tmp_path, 2, FIXED, lambda saved: set(map(part, by_path(saved))) == {1})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("value", ["[1,", "'''a", "\0", "@", "[" * 999])
def test_a_configuration_that_is_cut_is_one_line(tmp_path, value):
    (tmp_path / "config.gin").write_text(f"train.seed = {value}")
    with pytest.raises(UserError, match=r"config\.gin is damaged: restore it, or give another folder"):
        run_folder.changed_settings(tmp_path, differences)
