"""Where a sweep's runs execute: as processes here, or through Ray on the machines of a cluster."""

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access


class Process(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Asks it to save and end."""


class Launcher(Protocol):
    """Starts runs.

    Attributes:
      slots: one for each run at once; what it holds is the launcher's.
    """

    slots: list[str | None]

    def start(self, command: Sequence[str], log: Path, slot: str | None) -> Process:
        """Starts a command whose output goes to the end of a file."""


class Local:
    """Processes on this machine, its NVIDIA GPUs divided among them.

    Args:
      jobs: how many at once.
      devices: of the GPUs; None: those that this process may use.

    Raises:
      UserError: for more jobs than GPUs.
    """

    def __init__(self, jobs: int, devices: Sequence[str] | None = None):
        self.slots = divide_devices(cuda_devices() if devices is None else devices, jobs)

    def start(self, command: Sequence[str], log: Path, slot: str | None) -> Process:
        return _popen(command, log, os.environ | ({} if slot is None else {"CUDA_VISIBLE_DEVICES": slot}))


class Ray:
    """Runs on a Ray cluster: the one that `RAY_ADDRESS` names or that runs here, else a new one on this machine.

    Each run takes a GPU where the cluster has any, else a CPU. All machines must see the same folders: the sweep's, the
    data's and that of this Python.

    Args:
      jobs: how many at once; those for which the cluster has no room wait there.

    Raises:
      UserError: where Ray isn't installed or can't be reached.
    """

    def __init__(self, jobs: int):
        try:
            import ray
        except ImportError:
            raise UserError("--launcher ray needs Ray: pip install 'crescendo[ray]'") from None
        if not ray.is_initialized():
            try:
                ray.init(logging_level=logging.WARNING, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"Ray can't be reached ({reason}): start it, or unset RAY_ADDRESS") from None
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # Two calls at once: one waits for the process while the other ends it.
        self._runner: Any = ray.remote(_Runner).options(num_cpus=1, num_gpus=gpus, max_concurrency=2)
        self.slots: list[str | None] = [None] * jobs

    def start(self, command: Sequence[str], log: Path, slot: str | None) -> Process:
        del slot
        return _RayProcess(self._runner.remote(), command, log)


class _Runner:
    """A process on the machine that Ray chose."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._ended = False

    def run(self, command: Sequence[str], log: str, folder: str, environment: dict[str, str]) -> int:
        """Runs the command to its end; its exit code."""
        if self._ended:
            return -signal.SIGTERM
        granted = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
        self._process = _popen(command, Path(log), environment | granted, folder)
        return self._process.wait()

    def terminate(self) -> None:
        self._ended = True
        if self._process is not None:
            self._process.terminate()


class _RayProcess:
    """A run through Ray, as the process that it is there."""

    def __init__(self, runner: Any, command: Sequence[str], log: Path):
        self._runner = runner
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        self._code = runner.run.remote(list(command), str(log.resolve()), os.getcwd(), environment)

    def poll(self) -> int | None:
        import ray

        if not ray.wait([self._code], timeout=0)[0]:
            return None
        try:
            return ray.get(self._code)
        except ray.exceptions.RayError:
            return -signal.SIGKILL  # its machine or its actor is gone

    def terminate(self) -> None:
        self._runner.terminate.remote()


def _popen(command: Sequence[str], log: Path, environment: dict[str, str], folder: str | None = None):
    with file_access("write", log), open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=folder,
            start_new_session=True,  # Ctrl-C reaches it once, from the sweep
        )


def divide_devices(devices: Sequence[str], jobs: int) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of each of the jobs that run at once; None where there are no such devices.

    >>> divide_devices(["0", "1", "2", "3"], 2)
    ['0,1', '2,3']

    Raises:
      UserError: for more jobs than devices.
    """
    if not devices:
        return [None] * jobs
    if jobs > len(devices):
        raise UserError(f"--jobs {jobs} is more than the {len(devices)} devices: each run needs one")
    each = len(devices) // jobs
    return [",".join(devices[i * each : (i + 1) * each]) for i in range(jobs)]


def cuda_devices() -> list[str]:
    """The NVIDIA GPUs that this process may use; found without JAX, which would take their memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
