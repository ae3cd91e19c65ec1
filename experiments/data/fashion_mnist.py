"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, in ten classes (Xiao et al., 2017, arXiv:1708.07747)."""

import gzip
import importlib.util
import os
import zlib
from pathlib import Path

import numpy as np

from crescendo.experiments.data.tfds import tfds_images
from crescendo.experiments.runtime.errors import UserError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
_PREFIX = {"train": "train", "test": "t10k"}


def read_fashion_mnist(split: str, *, idx_directory: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One split, from TFDS where it is prepared there, else from the publisher's four gzipped IDX files.

    Args:
      split: "train" (60,000 pictures) or "test" (10,000).
      idx_directory: the folder with the IDX files; None for TFDS' own folder and then that of Debian's package
        dataset-fashion-mnist.

    Returns:
      (images, labels): uint8 [N, 28, 28, 1] and int32 [N].

    Raises:
      UserError: if the data set is in none of these places, or a file is damaged.

    References:
      https://www.tensorflow.org/datasets/catalog/fashion_mnist
    """
    if split not in _PREFIX:
        raise UserError(f'Fashion-MNIST has no split "{split}": use {" or ".join(_PREFIX)}')
    if idx_directory is None and importlib.util.find_spec("tensorflow_datasets"):
        try:
            source = tfds_images("fashion_mnist", split=split)
        except UserError:
            pass  # not prepared
        else:
            examples = [source[i] for i in range(len(source))]
            labels = np.array([example["label"] for example in examples], np.int32)
            return np.stack([example["image"] for example in examples]), labels
    folder = DEBIAN_FOLDER if idx_directory is None else Path(idx_directory)
    images = read_idx(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz")[..., None]
    labels = read_idx(folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz").astype(np.int32)
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} images but {len(labels)} labels for {split}: get the files anew")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, 8 (bytes), the rank, the sizes as big-endian int32, then the array.

    Raises:
      UserError: if the file is not there or is not such a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.gz"
    ...     _ = path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])))
    ...     read_idx(path).tolist()
    [7, 8, 9]
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: apt-get install {DEBIAN_PACKAGE} (Debian), prepare fashion_mnist "
            "with TFDS, or name the folder of the four gzipped IDX files"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"can't read {path} ({error}): get the file anew") from error
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">i4")
    if not rank or len(shape) != rank or len(content) != 4 + 4 * rank + np.prod(shape):
        raise UserError(f"{path} is not an IDX file of bytes: get the file anew")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
