"""The TFDS builder of `stdlib_text`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from crescendo.experiments.data.stdlib_text import stdlib_files, stdlib_identity


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """The source text of the running interpreter's standard library, about 10.8 MB of Python and English.

    One split, "train", with an example for each *.py file outside of tests and idlelib: {"path": below the library's
    folder, "text": the file}. The one configuration is named after the interpreter, so that data prepared by another
    interpreter are never taken for this one's.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=stdlib_identity())]  # noqa: RUF012 (TFDS' own interface)
    code_path = Path(__file__)  # TFDS would look in the folder of the package `crescendo`: editable installs have none

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=features, license="PSF-2.0")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        folder, paths = stdlib_files()
        for path in paths:
            yield path, {"path": path, "text": (folder / path).read_text(encoding="utf-8")}
