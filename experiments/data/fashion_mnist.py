"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, in ten classes (Xiao et al., 2017, arXiv:1708.07747)."""

import gzip
import importlib.util
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from crescendo.experiments.data.tfds import tfds_images
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import open_file

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
CLASSES = 10
MOST_BYTES = 1 << 30  # of an IDX file, unpacked
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
    images = read_idx(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz", rank=3)[..., None]
    path = folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz"
    labels = read_idx(path, rank=1).astype(np.int32)
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} images but {len(labels)} labels for {split}: get the files anew")
    if labels.max() >= CLASSES:
        raise UserError(
            f"{path} has the label {labels.max()}, and they must lie in 0..{CLASSES - 1}: get the file anew"
        )
    return images, labels


def read_idx(path: Path, rank: int) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, 8 (bytes), the rank, the sizes as big-endian int32, then the array.

    Args:
      path: of the file.
      rank: how many sizes there must be.

    Returns:
      uint8, with at least one entry.

    Raises:
      UserError: if the file is not there or is not such a file. No more of it is unpacked than its sizes say, and no
        more than `MOST_BYTES`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.gz"
    ...     _ = path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])))
    ...     read_idx(path, rank=1).tolist()
    [7, 8, 9]
    """
    try:
        with open_file(path) as packed, gzip.open(packed) as file:
            header = file.read(4 + 4 * rank)
            shape = struct.unpack(f">{rank}i", header[4:]) if len(header) == 4 + 4 * rank else ()
            begins = header[:4] == bytes([0, 0, 8, rank])
            if not shape or not begins or min(shape) < 1 or math.prod(shape) > MOST_BYTES:
                sizes = f" and sizes {list(shape)}" if shape else ""
                raise UserError(
                    f"{path} is not an IDX file of bytes of rank {rank}: it begins with {header[:4].hex(' ')}{sizes}: "
                    "get the file anew"
                )
            size = math.prod(shape)
            content = _read(file, size + 1)
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: apt-get install {DEBIAN_PACKAGE} (Debian), prepare fashion_mnist "
            "with TFDS, or name the folder of the four gzipped IDX files"
        ) from None
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"can't read {path} ({error}): get the file anew") from error
    if len(content) != size:
        raise UserError(f"{path} is not an IDX file of bytes: its sizes {list(shape)} aren't those of what follows")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read(file: gzip.GzipFile, most_bytes: int) -> bytes:
    """What is left of a file, or its begin: memory is taken for what is there, and not for what should be."""
    chunks, left = [], most_bytes
    while left and (chunk := file.read(min(left, 1 << 20))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)
