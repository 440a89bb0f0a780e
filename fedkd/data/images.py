"""Pictures as they are stored -> one array of floats."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from fedkd.data.memory import check_room

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = Float32[np.ndarray, "_rows _channels _height _width"]
"""Values in [0, 1]."""

FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"),
    *("JPEG2000", "TGA", "ICO", "PCX", "AVIF"),
)
"""What Pillow decodes by itself; for others (PostScript) it starts programs on what it is given."""

GREY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # above 8 bits per channel

MOST_PIXELS_DECODED = 89_478_485
"""In one picture: Pillow's own threshold, from which on it takes a picture for a bomb."""

MOST_PIXELS_KEPT = 2048 * 2048
"""In one picture that is not resized: far above what any model here can use."""


def open_image(encoded: bytes | Path, *, mode: str | None = None) -> "Image":
    """Decode one picture (PNG, JPEG, ...) and turn it as its EXIF note says.

    Args:
        encoded: the content of a picture file, or where the file is.
        mode: convert to this mode of Pillow, such as ``L``; ``None`` keeps the picture's own.

    Raises:
        ValueError: if it cannot be decoded or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with _quiet_pillow():
            image = _upright(_open(encoded))
            return image if mode is None else image.convert(mode)
    except Image.DecompressionBombError:
        raise ValueError(_too_many_pixels("more than twice as many")) from None
    except _TooManyPixelsError as error:
        raise ValueError(_too_many_pixels(str(error))) from None
    # Each decoder of Pillow reports damage with types of its own: OSError, SyntaxError,
    # NotImplementedError, struct.error, IndexError, ...
    except Exception as error:
        # Of what is unknown Pillow says where the buffer is in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no picture" if unknown else _one_line(error)
        if not isinstance(encoded, Path):
            reason += f" ({len(encoded)} bytes)"
        raise ValueError(f"the picture could not be read: {reason}") from error


class _TooManyPixelsError(Exception):
    pass


def _open(encoded: bytes | Path) -> "Image":
    if isinstance(encoded, Path):
        with encoded.open("rb") as file:
            return _decode(file)
    return _decode(BytesIO(encoded))


def _decode(file: BufferedIOBase) -> "Image":
    from PIL import Image

    image = Image.open(file, formats=FORMATS)  # type: ignore[arg-type]
    if image.width * image.height > MOST_PIXELS_DECODED:
        raise _TooManyPixelsError(f"{image.width}x{image.height}")
    image.load()
    return image


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def _too_many_pixels(got: str) -> str:
    return (
        f"a picture may have at most {MOST_PIXELS_DECODED:,} pixels, got {got}: scale it down first"
    )


def _one_line(error: Exception) -> str:
    """Say what went wrong in at most one line."""
    lines = str(error).splitlines()
    return (lines[0] if lines else "") or type(error).__name__


def stack_images(
    images: "Iterable[Image | Float32[np.ndarray, 'height width channels']]",
    *,
    positions: Int64[np.ndarray, "rows"] | None = None,
    resize: tuple[int, int] | None = None,
    name: Callable[[int], str] = "picture {}".format,
) -> Pixels:
    """Return pictures of one size as one array with values in [0, 1].

    One channel if all of them are grey, else three (RGB). Transparency is dropped. Pictures are
    taken one by one: whatever their size, only one of them is in memory beside the result.

    Args:
        images: pictures, or arrays of values in [0, 1] with one or three channels.
        positions: the row of each in the result; in order if ``None``.
        resize: height and width that each is brought to (bilinear, averaging where it shrinks).
        name: what the i-th is called in an error.

    Raises:
        ValueError: if there is no picture, if sizes differ, if one has more than 8 bits per
            channel, or if they do not fit into memory.
    """
    if positions is None:
        images = list(images)
        positions = np.arange(len(images))
    stacked: np.ndarray | None = None
    with _quiet_pillow():
        for index, image in enumerate(images):
            try:
                array = _to_array(image, resize)
                if stacked is None:
                    stacked = _room_for(len(positions), array)
                elif array.shape[:2] != stacked.shape[2:]:
                    raise ValueError(
                        f"images must all have one height x width, got {_size(array.shape)} here "
                        f"and {_size(stacked.shape[2:])} in {name(0)}: give one with data.resize, "
                        f"such as data.resize={min(stacked.shape[2], array.shape[0])}"
                    )
                elif array.shape[2] > stacked.shape[1]:
                    _check_memory((len(stacked), array.shape[2], *stacked.shape[2:]))
                    stacked = np.repeat(stacked, array.shape[2], axis=1)
            except ValueError as error:
                raise ValueError(f"{name(index)}: {error}") from error
            # A single grey channel fills all three.
            np.divide(
                array.transpose(2, 0, 1),
                np.float32(255 if array.dtype == np.uint8 else 1),
                out=stacked[positions[index]],
            )
    if stacked is None:
        raise ValueError("need at least one image, got none")
    return stacked


def resize_pixels(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Bring pictures to ``size`` (height, width) in the same way as `stack_images` does."""
    if pixels.shape[2:] == size:
        return pixels
    resized = np.empty((*pixels.shape[:2], *size), dtype=np.float32)
    for source, target in zip(
        pixels.reshape(-1, *pixels.shape[2:]), resized.reshape(-1, *size), strict=True
    ):
        target[...] = _resize_channel(source, size)
    return resized


def match_channels(first: Pixels, second: Pixels) -> tuple[Pixels, Pixels]:
    """Repeat the grey channel of one array where the other is in colour."""
    channels = max(first.shape[1], second.shape[1])
    return _repeat_grey(first, channels), _repeat_grey(second, channels)


def _repeat_grey(pixels: Pixels, channels: int) -> Pixels:
    return pixels if pixels.shape[1] == channels else np.repeat(pixels, channels, axis=1)


def _to_array(
    image: "Image | np.ndarray", resize: tuple[int, int] | None
) -> UInt8[np.ndarray, "height width channels"] | Float32[np.ndarray, "height width channels"]:
    if isinstance(image, np.ndarray):
        if resize is None or image.shape[:2] == resize:
            return image
        return np.stack(
            [_resize_channel(image[..., channel], resize) for channel in range(image.shape[2])],
            axis=-1,
        )
    if image.mode in DEEP_MODES:
        raise ValueError(
            "images must have at most 8 bits per channel, got Pillow mode "
            f"{image.mode!r}: convert them first"
        )
    if resize is None and image.width * image.height > MOST_PIXELS_KEPT:
        raise ValueError(
            f"a picture of {image.height}x{image.width} is too large to learn from as it is: "
            "data.resize makes it smaller, such as data.resize=64"
        )
    grey = image.mode in GREY_MODES
    image = image.convert("L" if grey else "RGB")
    if resize is not None and (image.height, image.width) != resize:
        image = image.resize(resize[::-1], _bilinear())
    array = np.asarray(image)
    return array[:, :, None] if grey else array


def _resize_channel(
    channel: Float32[np.ndarray, "height width"], size: tuple[int, int]
) -> Float32[np.ndarray, "new_height new_width"]:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(image.resize(size[::-1], _bilinear()))


def _bilinear() -> int:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _room_for(rows: int, first: np.ndarray) -> Float32[np.ndarray, "rows channels height width"]:
    height, width, channels = first.shape
    shape = (rows, channels, height, width)
    _check_memory(shape)
    return np.empty(shape, dtype=np.float32)


def _check_memory(shape: Sequence[int]) -> None:
    rows, _, *size = shape
    check_room(shape, f"{rows:,} pictures of {_size(size)}", remedy="data.resize, or ")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[:2]))


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence what Pillow remarks about pictures that it reads all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
