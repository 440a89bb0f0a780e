import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fedkd.data.images import match_channels, open_image, stack_images


def grey(value, size=(2, 3)):
    return Image.fromarray(np.full(size, value, dtype=np.uint8))


def test_grey_pictures_become_one_channel_between_zero_and_one():
    pixels = stack_images([grey(0), grey(51), grey(255)])
    assert pixels.shape == (3, 1, 2, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0, 0], [0, 0.2, 1], rtol=1e-6)


def test_colour_pictures_become_red_green_blue_planes():
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    picture[:, :, 1] = 255
    pixels = stack_images([Image.fromarray(picture)])
    assert pixels.shape == (1, 3, 2, 3)
    assert (pixels[0, 1] == 1).all()
    assert (pixels[0, [0, 2]] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_other_8_bit_modes_are_read_as_colour(mode):
    red = Image.new("RGB", (3, 2), (255, 0, 0)).convert(mode)
    pixels = stack_images([red])
    assert pixels.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(pixels[0, :, 0, 0], [1, 0, 0], atol=0.01)


def test_a_grey_picture_among_coloured_ones_fills_all_channels():
    pixels = stack_images([grey(51), Image.new("RGB", (3, 2), (255, 0, 0))])
    np.testing.assert_allclose(pixels[0, :, 0, 0], [0.2, 0.2, 0.2], rtol=1e-6)


def test_grey_and_colour_splits_are_brought_to_the_same_channels():
    one, three = stack_images([grey(51)]), stack_images([Image.new("RGB", (3, 2))] * 2)
    first, second = match_channels(one, three)
    assert first.shape[1] == second.shape[1] == 3
    assert (first == first[:, :1]).all()


def test_unequal_sizes_are_refused_by_name_with_what_would_work():
    with pytest.raises(
        ValueError,
        match=r"picture 1: .*one height x width, got 4x4 here and 2x3 in picture 0.*data\.resize",
    ):
        stack_images([grey(1), grey(1, (4, 4))])


def test_resized_pictures_keep_their_mean_and_take_any_size():
    stripes = np.zeros((8, 8), np.uint8)
    stripes[:, ::2] = 200
    fractions = np.full((4, 4, 3), 0.25, np.float32)
    pixels = stack_images([Image.fromarray(stripes), grey(100, (6, 3)), fractions], resize=(2, 4))
    assert pixels.shape == (3, 3, 2, 4)
    # Two neighbours, 200 and 0, are averaged; a box alone would not reach into the next pair.
    np.testing.assert_allclose(pixels[0].mean(), 100 / 255, atol=0.01)
    np.testing.assert_allclose(pixels[1], 100 / 255, atol=1e-6)
    np.testing.assert_allclose(pixels[2], 0.25, atol=1e-6)


def test_pictures_go_to_the_positions_asked_for():
    pixels = stack_images(iter([grey(255), grey(0), grey(51)]), positions=np.array([2, 0, 1]))
    np.testing.assert_allclose(pixels[:, 0, 0, 0], [0, 0.2, 1], rtol=1e-6)


def jpeg(size, orientation=None, exif=None):
    stream = io.BytesIO()
    if exif is None:
        exif = Image.Exif()
        exif[0x0112] = orientation
    ramp = np.linspace(0, 255, size[0] * size[1], dtype=np.uint8).reshape(size)
    Image.fromarray(ramp).save(stream, "JPEG", exif=exif, quality=95)
    return stream.getvalue()


def test_pictures_are_turned_as_their_exif_says():
    upright, lying = open_image(jpeg((4, 8), 1)), open_image(jpeg((4, 8), 6))
    assert (upright.size, lying.size) == ((8, 4), (4, 8))
    # Orientation 6: what is stored has to be turned clockwise by a quarter.
    np.testing.assert_array_equal(np.asarray(lying), np.rot90(np.asarray(upright), -1))


def test_a_damaged_exif_note_does_not_cost_the_picture():
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\xff\xff\xff\xff\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own on writing it
        encoded = jpeg((4, 8), exif=damaged)
    assert stack_images(open_image(each) for each in [encoded]).shape == (1, 1, 4, 8)


def png_header(width, height):
    """A picture of a few bytes that claims to be large."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)]
    chunks += [b"IDAT" + zlib.compress(bytes(64)), b"IEND"]
    framed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("side", [10_000, 13_056, 20_480])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(ValueError, match=r"at most 89,478,485 pixels.*scale it down"):
        open_image(png_header(side, side))


def test_a_picture_too_large_to_learn_from_names_the_setting_that_shrinks_it():
    large = Image.new("L", (3000, 3000), 51)
    with pytest.raises(ValueError, match=r"picture 0: .*3000x3000 .*data\.resize"):
        stack_images([large])
    assert stack_images([large], resize=(2, 2)).shape == (1, 1, 2, 2)


def test_more_pictures_than_memory_are_refused_at_the_first(monkeypatch):
    monkeypatch.setattr("fedkd.data.memory.memory_bytes", lambda: 2**30)
    decoded = []

    def pictures():
        for _ in range(100):
            decoded.append(1)
            yield Image.new("RGB", (1500, 1500))

    with pytest.raises(ValueError, match=r"100 pictures of 1500x1500 need .*data\.resize"):
        stack_images(pictures(), positions=np.arange(100))
    assert len(decoded) == 1


def test_formats_that_start_other_programs_are_no_pictures():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="could not be read: no picture"):
        open_image(postscript)


def test_grey_with_transparency_stays_grey_and_a_mode_may_be_asked_for():
    stream = io.BytesIO()
    Image.new("LA", (3, 2), (51, 10)).save(stream, "PNG")
    assert stack_images([open_image(stream.getvalue())]).shape == (1, 1, 2, 3)
    assert open_image(stream.getvalue(), mode="RGB").mode == "RGB"


def test_pictures_deeper_than_8_bits_are_refused():
    deep = Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"at most 8 bits .*'I;16'"):
        stack_images([deep])


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        stack_images([])


def test_bytes_that_are_no_picture_are_refused():
    stream = io.BytesIO()
    grey(7, (64, 64)).save(stream, format="PNG")
    for encoded in (b"", b"no picture", stream.getvalue()[:60]):
        with pytest.raises(ValueError, match="could not be read"):
            open_image(encoded)
