"""Say what this machine offers a run: `python -m crescendo.experiments.doctor`."""

import argparse
import importlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crescendo.experiments.runtime import cache, hardware
from crescendo.experiments.runtime.cli import run_command
from crescendo.pallas_kernels.bench import OPS

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
    try:
        explain = importlib.import_module("crescendo.pallas_kernels.op").explain
    except ImportError as error:
        yield "none", f"{error}"
        return
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    calls: dict[str, tuple[list, dict]] = {
        "attention": ([bf16(2, 1024, 8, 64)] * 3, {}),
        "softmax": ([bf16(1024, 4096)], {}),
        "rms_norm": ([bf16(1024, 1024), bf16(1024)], {"eps": 1e-6}),
        "qk_norm_rotary": ([*[bf16(2, 1024, 8, 64)] * 2, *[bf16(64)] * 2, *[bf16(2, 1024, 32)] * 2], {"eps": 1e-6}),
        "linear_cross_entropy": ([bf16(1024, 768), bf16(50304, 768), jax.ShapeDtypeStruct((1024,), jnp.int32)], {}),
    }
    for name, (arguments, options) in calls.items():
        try:
            function = getattr(importlib.import_module(f"crescendo.pallas_kernels.{OPS[name][0]}"), name)
            yield name, str(explain(function, *arguments, **options))
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    argparse.ArgumentParser(
        prog="python -m crescendo.experiments.doctor",
        description="Report devices, versions, usable kernels, caches and disk.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    console = Console()
    for title, lines in (("Versions", versions), ("Devices", devices), ("Kernels", kernels), ("Storage", storage)):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for name, value in lines():
            table.add_row(Text(name), Text(value))
        console.print(table, "")


if __name__ == "__main__":
    run_command(main)
