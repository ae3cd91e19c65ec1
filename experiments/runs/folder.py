"""A run's folder: who holds it, what made it, and whether a run can go on in it."""

import datetime
import fcntl
import functools
import importlib.metadata
import os
import subprocess
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from crescendo.experiments.runs.metadata import newest_identity, numbers
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file, replace_json
from crescendo.parallel.hosts import is_leader

# What run.json holds as a hash, with what the hash is of.
HASHED = {
    "data": "what is read: documents, the names of their files, the tokenizer, the length of rows, the held-out part, "
    "the weights of sources, the chosen rows",
    "fingerprint": "the model and its data",
}
PACKAGES = ("crescendo", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds the folder (made when it isn't there) for this process; the kernel lets go of it however that ends.

    The folder itself is locked, and the file `.lock` in it, which says by whom. Where a file-system locks nothing but
    files that are open for writing (NFS), the file's lock alone counts: while that file isn't deleted.
    Of several processes of one run the first holds it for all.

    Yields:
      A check that the folder which now has this name is still the one that is held: raises UserError where it isn't.

    Raises:
      UserError: while another process holds it, or when it can't be written.
    """
    if not is_leader():
        yield lambda: None
        return
    with ExitStack() as stack:
        with file_access("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, held)
            lock = stack.enter_context((folder / ".lock").open("a+"))
        if not _locks(lock.fileno()) or not _locks(held):
            lock.seek(0)
            raise UserError(
                f"the run folder {folder} is in use by process {lock.read().strip() or '(unknown)'}: "
                "wait for it to end, or give another folder with --run"
            )
        with file_access("write", folder):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield functools.partial(_check_held, folder, held)


def _locks(descriptor: int) -> bool:
    """Locks what is open for this process; False where another one holds it.

    A file-system that knows no such lock, or none on a folder, is taken for one on which nobody else holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _check_held(folder: Path, held: int) -> None:
    """That the folder of this name is the one that is open as `held`."""
    try:
        same = os.path.samestat(folder.stat(), os.fstat(held))
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{folder} was moved, removed or replaced while the run went on: nothing more is written there; put it "
            "back, and the same command goes on from its last checkpoint"
        )


def read_info(folder: Path) -> dict[str, Any] | None:
    """The folder's `run.json`; None where there is none."""
    path = folder / "run.json"
    with file_access("read", path):
        if not path.exists():
            return None
    info = schemas.read(path, dict[str, Any], way_on="restore it, or move the folder away to start anew")
    if not isinstance(info.get("fixed"), dict):
        raise UserError(f"{path} doesn't say what fixes the run: restore it, or move the folder away to start anew")
    return info


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
    except (SyntaxError, tokenize.TokenError):
        raise UserError(f"{path} is damaged: restore it, or give another folder with --run") from None


def check_resumable(
    folder: Path,
    version: int,
    fixed: Mapping[str, Any],
    can_take: Callable[[Mapping[str, str]], bool] = lambda arrays: False,
) -> dict[str, Any] | None:
    """That a training run is what it was when it was begun, by `run.json` and by its newest checkpoint.

    Args:
      folder: the run's.
      version: of what runs keep, as this program has it.
      fixed: see `check_same`.
      can_take: whether arrays that aren't those of `fixed` will do.

    Returns:
      Its `run.json`; None where there is none.

    Raises:
      UserError: a run of another version, or of which nothing says what it is; see `check_same`.
    """
    info, saved = read_info(folder), newest_identity(folder / "checkpoints")
    if info is None and saved is None and numbers(folder / "checkpoints"):
        raise UserError(
            f"{folder} has checkpoints and no run.json, and nothing says of which model, data and seed they are: "
            "restore run.json, or give another folder with --run"
        )
    told = [] if info is None else [(info.get("format", 1), info["fixed"])]
    for begun_with, before in told if saved is None else [*told, (saved.format, saved.fixed)]:
        if begun_with != version:
            raise UserError(
                f"the run in {folder} was begun by a version of Crescendo that keeps optimizers otherwise (format "
                f"{begun_with}, this one {version}) and can't go on: give another folder with --run, with "
                f"train.initialize_from = {str(folder)!r} to take its parameters"
            )
        arrays = before.get("arrays")
        others = isinstance(arrays, Mapping) and arrays != fixed["arrays"] and can_take(arrays)
        check_same(folder, {**before, "arrays": fixed["arrays"]} if others else before, fixed)
    return info


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
