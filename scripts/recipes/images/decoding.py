"""Images as models read them: upright, with 8 bits per channel, in grayscale or color."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

# Of PIL's modes with one wide channel, those with a fixed range: 16 bits without a sign.
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats of which PIL gives 16 bits in its mode of 32.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
BITS_PER_SAMPLE = 258  # TIFF's tag

# Pictures of one moment, whose further frames are previews or the other eye's.
STILL_FORMATS = ("MPO",)


def decode(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture as its EXIF data say it stands, in PIL's mode "L" (gray) or "RGB", 8 bits per channel.

    One wide channel is scaled by its range: 16 bits without a sign (12 in some TIFF files), and floats from 0 to 1. CMYK is
    converted without its color profile, transparency is dropped, and of several frames the first is read; so do `datasets`
    and transformers.

    Raises:
        ValueError: for a wide channel of another range, which nothing in the file tells.
    """
    highest = _highest(image)
    upright = ImageOps.exif_transpose(image)
    return (upright if highest is None else _scaled(upright, highest)).convert(mode)


def _highest(image: Image.Image) -> float | None:
    """The largest value of a wide channel; None for pictures of 8 bits, and of several channels, which PIL gives in 8."""
    if image.mode == "F":
        return 1.0
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        (bits,) = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return 2.0**bits - 1
    if image.mode == "I":
        raise ValueError(
            "it has 32 bits, or 16 with a sign, of which no range is known; convert it to 8 bits, or 16 without a sign"
        )
    return None


def _scaled(image: Image.Image, highest: float) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    # nan fails the comparison.
    if not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(
            f"its values go from {values.min():.6g} to {values.max():.6g}, and {highest:g} is the highest known of its kind; "
            "convert it to 8 bits"
        )
    return Image.fromarray(np.round(values * (255 / highest)).astype(np.uint8))


# What reading takes from a picture, in words -> whether it does from this one.
REMARKS: dict[str, Callable[[Image.Image], bool]] = {
    "have 16 bits or floats per channel, scaled to 8 bits by the range of their kind": lambda image: (
        image.mode == "F" or image.mode.startswith("I")
    ),
    "are CMYK, converted without their color profile": lambda image: image.mode == "CMYK",
    "have transparency, which is dropped: the colors below it show": lambda image: image.has_transparency_data,
    "have several frames, of which the first is read": lambda image: (
        getattr(image, "is_animated", False) and image.format not in STILL_FORMATS
    ),
}


def remarks(image: Image.Image) -> list[str]:
    """Return what `decode` takes from a picture that is not decoded yet, in the words of `REMARKS`."""
    return [words for words, holds in REMARKS.items() if holds(image)]
