"""Compilers for devices that are not here."""

import os
import site
from pathlib import Path

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# The CUDA compiler comes as a wheel; where the machine has its own, either will do.
for packages in site.getsitepackages():
    os.environ["PATH"] += os.pathsep + str(Path(packages) / "nvidia" / "cu13" / "bin")
