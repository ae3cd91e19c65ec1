"""A run's folder: who holds it, what made it, and whether a run can go on in it."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file, replace_json
from crescendo.parallel.hosts import is_leader

# What run.json holds as a hash, with what the hash is of.
HASHED = {
    "data": "what is read: documents, the names of their files, the tokenizer, the length of rows, the held-out part",
    "fingerprint": "the model and its data",
}
PACKAGES = ("crescendo", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder (made when it isn't there) for this process; the kernel lets go of it however that ends.

    Of several processes of one run the first holds it for all.

    Raises:
      UserError: while another process holds it, or when it can't be written.
    """
    if not is_leader():
        yield
        return
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"the run folder {folder} is in use by process {lock.read().strip() or '(unknown)'}: "
                "wait for it to end, or give another folder with --run"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def read_info(folder: Path) -> dict | None:
    """The folder's `run.json`; None where there is none."""
    path = folder / "run.json"
    if not path.exists():
        return None
    with file_access("read", path):
        try:
            return json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}): move the folder away to start anew") from None


def write_info(folder: Path, info: Mapping[str, Any], config: str) -> None:
    """Writes `run.json` and `config.gin`, each whole or not at all; of several processes the first does."""
    if not is_leader():
        return
    replace_json(folder / "run.json", info)
    with file_access("write", folder):
        replace_file(folder / "config.gin", config.encode())


def changed_settings(
    folder: Path, differences: Callable[..., tuple[dict[str, str], dict[str, str]]], but_for: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of the folder's `config.gin` that have another value now: `(before, now)`, text by name.

    Args:
      folder: the run's; without a `config.gin` nothing has changed.
      differences: of an earlier configuration's text and what is bound now.
      but_for: settings that may differ, beside the run's label.

    Raises:
      UserError: a file that is no configuration.
    """
    path = folder / "config.gin"
    if not path.is_file():
        return {}, {}
    with file_access("read", path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return differences(text, but_for={"train.label", *but_for})
    except SyntaxError:
        raise UserError(f"{path} is damaged: restore it, or give another folder with --run") from None


def check_resumable(folder: Path, before: Mapping[str, Any], version: int, fixed: Mapping[str, Any]) -> None:
    """That a training run is what it was when it was begun.

    Args:
      folder: the run's.
      before: its `run.json`.
      version: of what runs keep, as this program has it.
      fixed: see `check_same`.

    Raises:
      UserError: a run of another version; see `check_same`.
    """
    if before.get("format") != version:
        raise UserError(
            f"the run in {folder} was begun by a version of Crescendo that keeps optimizers otherwise (format "
            f"{before.get('format', 1)}, this one {version}) and can't go on: give another folder with --run, with "
            f"train.initialize_from = {str(folder)!r} to take its parameters"
        )
    check_same(folder, before["fixed"], fixed)


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """That what fixes the shape and the order of a run is the same as when it was begun.

    Raises:
      UserError: names each field that differs, with both values, and what stands behind those that are hashes.
    """
    if shown := differing(before, now):
        raise UserError(f"the run in {folder} can't go on: {shown}: undo that, or give another folder with --run")


def differing(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 6) -> str:
    """What differs between two nested mappings, in words; empty where nothing does.

    >>> differing({"seed": 0, "model": {"width": 16}}, {"seed": 0, "model": {"width": 32}})
    'model.width was 16 and is now 32'
    """
    every = [
        f"{name} was {old} and is now {new}" + (f", a hash of {HASHED[name]}" if name in HASHED else "")
        for name, old, new in _differences(before, now)
    ]
    return "; ".join(every[:most]) + (f"; and {len(every) - most} more" if len(every) > most else "")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """`(path, old, new)` of every entry of two nested mappings that isn't the same."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{name}.{inner}", a, b) for inner, a, b in _differences(old, new))
        elif old != new:
            yield name, old, new


def provenance() -> dict[str, Any]:
    """When, from which commit, with which versions and on which devices."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source tree that is running, with `+` behind it where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            # A package that is installed inside of somebody else's repository has no commit.
            env=environment | {"GIT_CEILING_DIRECTORIES": str(root.parent)},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None
