import io
import math
import sys

import numpy as np
import pytest

from fedkd.data import DataSettings, build_federated_data, plot_split, split_table
from fedkd.data.overview import label_entropy


@pytest.fixture(scope="module")
def data():
    settings = DataSettings(partition={"kind": "pathological", "classes_per_client": 2})
    return build_federated_data(settings, num_clients=4, seed=0)


def test_entropy_matches_hand_computed_values():
    # (3/4, 1/4): 3/4 ln(4/3) + 1/4 ln 4 = 0.562335
    entropies = label_entropy(np.array([[5, 0], [2, 2], [3, 1], [0, 0]]))
    np.testing.assert_allclose(entropies, [0, math.log(2), 0.562335, 0], rtol=1e-5)


def test_table_has_one_row_per_client_that_adds_up(data):
    table = split_table(data)
    assert [row["client"] for row in table] == [0, 1, 2, 3]
    for row, rows in zip(table, data.client_rows, strict=True):
        assert row["rows"] == len(rows) == sum(row[f"class {name}"] for name in data.class_names)
        assert row["classes"] == 2
        assert 0 < row["label_entropy"] <= math.log(2) + 1e-9


def test_picture_shows_every_count_and_says_what_nobody_holds(data):
    figure = plot_split(data)
    cells, totals, colour_scale = figure.axes
    shown = sorted(int(text.get_text()) for text in cells.texts)
    assert shown == sorted(data.label_counts()[data.label_counts() > 0].tolist())
    assert [bar.get_width() for bar in totals.patches] == [len(r) for r in data.client_rows]
    assert colour_scale.get_ylabel() == "rows of this class"
    assert f"({data.num_unassigned_rows:,} unassigned)" in figure.get_suptitle()


def test_picture_is_drawn_without_pyplot(data):
    already = "matplotlib.pyplot" in sys.modules
    stream = io.BytesIO()
    plot_split(data).savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    if already:
        import matplotlib.pyplot as plt

        assert plt.get_fignums() == []
    else:
        assert "matplotlib.pyplot" not in sys.modules


def test_many_clients_are_drawn_without_numbers():
    settings = DataSettings(partition={"kind": "iid"})
    figure = plot_split(build_federated_data(settings, num_clients=60, seed=0))
    assert not figure.axes[0].texts
    figure.savefig(io.BytesIO(), format="png")


def test_picture_shows_whose_labels_are_wrong_and_who_sees_what():
    settings = DataSettings(
        partition={"kind": "iid"},
        label_noise={"rate": [0.0, 0.5]},
        feature_shift={"shifts": [{"kind": "none"}, {"kind": "blur"}]},
    )
    data = build_federated_data(settings, num_clients=4, seed=0)
    cells, totals, _ = plot_split(data).axes
    assert [tick.get_text() for tick in cells.get_yticklabels()] == [
        "0: none",
        "1: blur std=1",
        "2: none",
        "3: blur std=1",
    ]
    widths = [bar.get_width() for bar in totals.patches]
    assert widths == [*map(len, data.client_rows), *data.wrong_counts()]
    assert widths[4] == widths[6] == 0 < widths[5]
