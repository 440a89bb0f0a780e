"""Heat maps: colours are shares, numbers stand out, many cells show colours only."""

import numpy as np

from fedkd import figures


def test_the_confusion_map_colours_shares_and_writes_rows():
    axes = figures.confusion_heat_map(np.array([[6, 2], [0, 0]])).axes[0]
    shown = axes.images[0].get_array()
    assert shown[0].tolist() == [75, 25]
    assert shown.mask[1].all()  # an absent class has no shares
    assert [text.get_text() for text in axes.texts] == ["6", "2", "", ""]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1"]


def test_the_input_layers_of_the_cka_map_are_at_the_bottom():
    axes = figures.cka_heat_map(np.array([[0.1, 0.2], [0.3, 0.4]]), ["in", "out"], ["x", "y"]).axes[
        0
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["out", "in"]
    assert axes.images[0].get_array().tolist() == [[0.3, 0.4], [0.1, 0.2]]
    assert [text.get_text() for text in axes.texts] == ["0.30", "0.40", "0.10", "0.20"]


def test_numbers_on_cells_stand_out_from_their_colour():
    axes = figures.agreement_heat_map(np.array([[1.0, 0.0], [0.0, 1.0]]), ["a", "b"]).axes[0]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "white", "black"]


def test_a_map_of_many_cells_shows_colours_and_some_names_only():
    axes = figures.agreement_heat_map(np.eye(90), [f"client {k}" for k in range(90)]).axes[0]
    assert not axes.texts
    assert len(axes.get_xticklabels()) == 30
