"""Small sets of images on the disk."""

import gzip
import struct

import numpy as np
from PIL import Image


def colors(count, size=10, seed=0):
    """Images of random colors, one channel brighter by class: `(count, size, size, 3)` and labels 0, 1, 2, ... again."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = generator.integers(0, 120, (count, size, size, 3))
    pixels[np.arange(count), :, :, labels] += 120
    return pixels.astype(np.uint8), labels


def write_folders(root, count=12, size=10, seed=0, ending="png"):
    """One folder per class, named red, green and blue."""
    pixels, labels = colors(count, size, seed)
    for index, (image, label) in enumerate(zip(pixels, labels)):
        folder = root / ("red", "green", "blue")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.{ending}")
    return root


def idx_bytes(array):
    """An array of bytes in the IDX format, by its description."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx(root, train=12, validation=6, size=6, zipped=True):
    """The four files of a data set of three classes."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", validation)):
        contents = {
            "images-idx3-ubyte": generator.integers(0, 256, (count, size, size)),
            "labels-idx1-ubyte": np.arange(count) % 3,
        }
        for name, array in contents.items():
            content = idx_bytes(array)
            path = root / f"{prefix}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return root
