import io

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


def test_unequal_sizes_are_refused_and_listed():
    with pytest.raises(ValueError, match=r"one height x width, got 2x3, 4x4: resize"):
        stack_images([grey(1), grey(1, (4, 4))])


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
