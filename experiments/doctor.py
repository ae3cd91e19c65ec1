"""Say what this machine offers a run: `python -m crescendo.experiments.doctor`."""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax
from rich.table import Table
from rich.text import Text

from crescendo.experiments.runtime import cache, hardware
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser
from crescendo.pallas_kernels import OPS
from crescendo.pallas_kernels.bench import specs
from crescendo.pallas_kernels.console import output_console
from crescendo.pallas_kernels.op import explain

EXAMPLES = """examples:
  python -m crescendo.experiments.doctor
  JAX_PLATFORMS=cpu python -m crescendo.experiments.doctor"""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "optuna")
_OPTIONAL = ("jax-cuda13-plugin", "jax-triton", "triton", "libtpu")

Line = tuple[str, str]


def versions() -> Iterator[Line]:
    """Python's and the packages' versions; an optional one that isn't installed says so."""
    yield "python", platform.python_version()
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed" + (" (optional)" if name in _OPTIONAL else ": pip install -e .")


def devices() -> Iterator[Line]:
    """Each device's kind, memory and known peak."""
    for device in jax.devices():
        memory, peak = hardware.memory_bytes(device), hardware.peak_flops_per_second(device)
        facts = [device.device_kind]
        facts += [] if memory is None else [f"{memory / 2**30:.1f} GiB for arrays"]
        facts += ["peak unknown"] if peak is None else [f"{peak / 1e12:,.0f} TFLOP/s in bfloat16"]
        yield f"{device.platform}:{device.id}", ", ".join(facts)


def kernels() -> Iterator[Line]:
    """What each implementation of each kernel says of a typical call on this machine's first device."""
    for name, op in OPS.items():
        try:
            arguments, options = specs(name)[0].abstract()
            yield name, str(explain(op, *arguments, **options))
        except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
            yield name, f"no answer: {error}"


def storage() -> Iterator[Line]:
    """The caches with their sizes, and the free space beside them and here."""
    folder = cache.folder()
    xla = Path(jax.config.jax_compilation_cache_dir or folder / "xla")
    for name, path in (("prepared data and programs", folder), ("compiled programs", xla)):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
        yield name, f"{path}: {size / 2**20:,.1f} MiB"
    for name, path in (("free beside the cache", folder), ("free here", Path.cwd())):
        present = next(each for each in (path, *path.parents) if each.exists())
        writable = "" if os.access(present, os.W_OK) else ", not writable: set XDG_CACHE_HOME or work elsewhere"
        yield name, f"{shutil.disk_usage(present).free / 2**30:,.1f} GiB on {present}{writable}"


def parser() -> argparse.ArgumentParser:
    """The command's options: none."""
    says = "Report devices, versions, usable kernels, caches and disk."
    return plain_parser(says, EXAMPLES, prog="python -m crescendo.experiments.doctor")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser().parse_args(argv)
    console = output_console()
    for title, lines in (("Versions", versions), ("Devices", devices), ("Kernels", kernels), ("Storage", storage)):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for name, value in lines():
            table.add_row(Text(name), Text(value))
        console.print(table, "")


if __name__ == "__main__":
    run_command(main)
