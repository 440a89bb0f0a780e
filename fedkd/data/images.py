"""Pictures as they are stored -> one array of floats."""

from collections.abc import Iterable
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = Float32[np.ndarray, "_rows _channels _height _width"]
"""Values in [0, 1]."""

GREY_MODES = ("1", "L")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # above 8 bits per channel


def open_image(encoded: bytes) -> "Image":
    """Decode one picture (PNG, JPEG, ...).

    Raises:
        ValueError: if Pillow cannot read it.
    """
    from PIL import Image

    try:
        image = Image.open(BytesIO(encoded))
        image.load()
    except (OSError, SyntaxError) as error:  # how Pillow reports unknown and damaged files
        raise ValueError(f"an image could not be read: {error}") from error
    return image


def stack_images(images: Iterable["Image"]) -> Pixels:
    """Return pictures of one size as one array with values in [0, 1].

    One channel if all of them are grey, else three (RGB). Transparency is dropped.

    Raises:
        ValueError: if there is no picture, if sizes differ, or if one has more than 8 bits per
            channel.
    """
    arrays = [_to_array(image) for image in images]
    if not arrays:
        raise ValueError("need at least one image, got none")
    sizes = sorted({f"{array.shape[0]}x{array.shape[1]}" for array in arrays})
    if len(sizes) > 1:
        raise ValueError(
            "images must all have one height x width, got "
            f"{', '.join(sizes[:4])}{' and more' if len(sizes) > 4 else ''}: resize them first"
        )
    channels = max(array.shape[2] for array in arrays)
    stacked = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.float32)
    for target, array in zip(stacked, arrays, strict=True):
        target[...] = array.transpose(2, 0, 1)  # a single grey channel fills all three
    stacked /= 255
    return stacked


def match_channels(first: Pixels, second: Pixels) -> tuple[Pixels, Pixels]:
    """Repeat the grey channel of one array where the other is in colour."""
    channels = max(first.shape[1], second.shape[1])
    return _repeat_grey(first, channels), _repeat_grey(second, channels)


def _repeat_grey(pixels: Pixels, channels: int) -> Pixels:
    return pixels if pixels.shape[1] == channels else np.repeat(pixels, channels, axis=1)


def _to_array(image: "Image") -> UInt8[np.ndarray, "height width channels"]:
    if image.mode in DEEP_MODES:
        raise ValueError(
            "images must have at most 8 bits per channel, got Pillow mode "
            f"{image.mode!r}: convert them first"
        )
    if image.mode in GREY_MODES:
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image.convert("RGB"))
