"""What an input is follows from its shape."""

import pytest
import torch

from fedkd.inputs import InputShape, input_shape_of, per_channel


@pytest.mark.parametrize(
    ("sides", "vocabulary", "kind", "told"),
    [
        ((1, 28, 28), None, "pictures", "pictures of 1x28x28"),
        ((16,), None, "features", "16 features"),
        ((40,), 66, "text", "texts of 40 tokens"),
    ],
)
def test_a_shape_says_what_it_is_of(sides, vocabulary, kind, told):
    shape = InputShape(sides, vocabulary)
    assert (shape.kind, str(shape), tuple(shape), len(shape)) == (kind, told, sides, len(sides))
    assert torch.zeros(2, *shape).shape == (2, *sides)


@pytest.mark.parametrize(
    ("sides", "vocabulary"),
    [((28, 28), None), ((), None), ((0,), None), ((1, 2, 3, 4), None), ((1, 8, 8), 9), ((4,), 2)],
)
def test_a_shape_of_no_input_is_refused(sides, vocabulary):
    with pytest.raises(ValueError, match="an input has the shape"):
        InputShape(sides, vocabulary)


def test_a_bare_shape_is_that_of_pictures_or_of_features():
    assert input_shape_of((1, 8, 8)).kind == "pictures"
    assert input_shape_of((8,)).kind == "features"
    text = InputShape((8,), 5)
    assert input_shape_of(text) is text


def test_numbers_of_each_channel_and_of_each_feature_compute_with_inputs():
    two = torch.tensor([1.0, 2.0])
    assert (torch.zeros(3, 2, 4, 4) + per_channel(two, 3))[0, 1, 0, 0] == 2
    assert (torch.zeros(3, 2) + per_channel(two, 1)).tolist() == [[1, 2]] * 3
