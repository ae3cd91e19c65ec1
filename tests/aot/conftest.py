"""Compilers for devices that are not here: libtpu asks no metadata server, and CUDA's tools come as a wheel."""

import os
import site
from pathlib import Path

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two processes at a time: no device is there to fight for
# Where the machine has its own CUDA compiler, either will do.
for packages in site.getsitepackages():
    os.environ["PATH"] += os.pathsep + str(Path(packages) / "nvidia" / "cu13" / "bin")
