import math
import pickle

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from fedkd.data import DataSettings, build_federated_data, split_table
from fedkd.data.feature_shift import FeatureShift, Shift, ShiftField, check_shifts, shift_inputs

ANY = np.random.default_rng(0)
PICTURES = ANY.random((5, 3, 9, 9), dtype=np.float32)


def shift(**table) -> Shift:
    return TypeAdapter(ShiftField).validate_python(table)


def applied(inputs=PICTURES, seed=0, **table):
    before = inputs.copy()
    result = shift(**table).apply(inputs, np.random.default_rng(seed))
    np.testing.assert_array_equal(inputs, before)  # a copy is changed, not what came in
    assert result.dtype == np.float32
    assert result.shape == inputs.shape
    return result


def build(seed=0, clients=4, **table):
    settings = DataSettings(partition={"kind": "iid"}, feature_shift=table)
    return build_federated_data(settings, num_clients=clients, seed=seed)


# --- kinds ------------------------------------------------------------------------------------


def test_quarter_turns_are_exact_and_counter_clockwise():
    picture = np.array([[[[1, 2], [3, 4]]]], dtype=np.float32)
    np.testing.assert_array_equal(
        applied(picture, kind="rotation", degrees=90)[0, 0], [[2, 4], [1, 3]]
    )
    np.testing.assert_array_equal(
        applied(picture, kind="rotation", degrees=-180)[0, 0], [[4, 3], [2, 1]]
    )


def test_other_angles_turn_the_same_way_as_pillow_does():
    # One bright pixel right of the middle goes up and right of it.
    picture = np.zeros((1, 1, 9, 9), dtype=np.float32)
    picture[0, 0, 4, 7] = 1
    turned = applied(picture, kind="rotation", degrees=45)[0, 0]
    row, column = np.unravel_index(turned.argmax(), (9, 9))
    away = 3 * math.sqrt(0.5)  # 2.1
    assert (row, column) == (4 - round(away), 4 + round(away))
    pillow = np.array(Image.fromarray(picture[0, 0]).rotate(45, resample=Image.Resampling.BILINEAR))
    np.testing.assert_allclose(turned, pillow, atol=1e-5)


def test_a_picture_that_is_not_square_keeps_its_size_and_its_corners_turn_black():
    wide = np.ones((2, 1, 5, 11), dtype=np.float32)
    turned = applied(wide, kind="rotation", degrees=90)
    np.testing.assert_allclose(turned[:, :, :, 3:8], 1, atol=1e-6)
    np.testing.assert_array_equal(turned[:, :, :, :2], 0)
    np.testing.assert_array_equal(applied(wide, kind="rotation", degrees=180), wide)


def test_blur_spreads_a_point_as_a_gaussian_and_changes_no_plain_picture():
    point = np.zeros((1, 1, 31, 31), dtype=np.float32)
    point[0, 0, 15, 15] = 1
    blurred = applied(point, kind="blur", std=2.0)[0, 0]
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    # Of two neighbours at 0 and 2 pixels: exp(-4 / (2 * 4)) = 0.6065.
    assert blurred[15, 17] / blurred[15, 15] == pytest.approx(0.6065, abs=0.001)
    plain = np.full((1, 3, 6, 6), 0.4, dtype=np.float32)
    np.testing.assert_allclose(applied(plain, kind="blur"), plain, atol=1e-6)


def test_colours_are_those_computed_by_hand():
    pixel = np.array([0.2, 0.4, 0.6], dtype=np.float32).reshape(1, 3, 1, 1)
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6  # 0.363
    darker = applied(pixel, kind="colour", brightness=0.5)
    np.testing.assert_allclose(darker.ravel(), [0.1, 0.2, 0.3], rtol=1e-5)
    np.testing.assert_allclose(
        applied(pixel, kind="colour", saturation=0.0).ravel(), grey, rtol=1e-5
    )
    strong = applied(pixel, kind="colour", contrast=2.0)
    np.testing.assert_allclose(
        strong.ravel(), np.clip(grey + 2 * (pixel.ravel() - grey), 0, 1), rtol=1e-5
    )
    np.testing.assert_allclose(
        applied(pixel, kind="colour", invert=True).ravel(), [0.8, 0.6, 0.4], rtol=1e-5
    )
    np.testing.assert_allclose(applied(kind="colour"), PICTURES, atol=1e-6)


def test_grey_pictures_have_no_saturation_to_change():
    grey = PICTURES[:, :1]
    np.testing.assert_allclose(applied(grey, kind="colour", saturation=0.0), grey, atol=1e-6)


def test_noise_has_its_standard_deviation_and_pixels_stay_in_range():
    middle = np.full((20, 1, 30, 30), 0.5, dtype=np.float32)
    noisy = applied(middle, kind="noise", std=0.1)
    assert (noisy - middle).std() == pytest.approx(0.1, rel=0.02)
    wild = applied(middle, kind="noise", std=5.0)
    assert (wild.min(), wild.max()) == (0, 1)
    features = ANY.standard_normal((4000, 3)).astype(np.float32)
    moved = applied(features, kind="noise", std=3.0)
    np.testing.assert_allclose((moved - features).std(axis=0), 3, rtol=0.05)


def test_features_are_scaled_and_moved():
    features = np.array([[1.0, -2.0]], dtype=np.float32)
    np.testing.assert_array_equal(applied(features, kind="scale", factor=3), [[3, -6]])
    np.testing.assert_array_equal(applied(features, kind="offset", by=-1), [[0, -3]])


@pytest.mark.parametrize(
    ("table", "what", "refusal"),
    [
        ({"kind": "offset", "by": 1}, "pictures", r"'offset' is for features, .* holds pictures: "),
        ({"kind": "blur"}, "features", r"for features there are none, noise, scale, offset"),
        (
            {"kind": "noise"},
            "text",
            r"shifts\.1: 'noise' is for pictures and features.*text has no",
        ),
    ],
)
def test_shifts_that_inputs_cannot_have_are_refused_by_name(table, what, refusal):
    first = {"kind": "noise"} if what != "text" else None
    shifts = [first, table] if first else [table]
    with pytest.raises(ValueError, match=refusal.replace("1", "0") if not first else refusal):
        check_shifts(FeatureShift(shifts=shifts), what)


@pytest.mark.parametrize(
    "table",
    [
        {"shifts": [{"kind": "rotation"}]},
        {"shifts": [{"kind": "rotation", "degrees": 400}]},
        {"shifts": [{"kind": "blur", "std": 0}]},
        {"shifts": [{"kind": "blur", "degrees": 10}]},
        {"shifts": [{"kind": "mirror"}]},
        {"shifts": [{}]},
        {"dealt": "randomly"},
        {"judged": True},
    ],
)
def test_shifts_that_cannot_be_are_refused(table):
    with pytest.raises(ValueError, match="feature_shift"):
        DataSettings(feature_shift=table)


# --- in a federation --------------------------------------------------------------------------


def test_only_the_rows_of_shifted_clients_change():
    plain = build()
    data = build(shifts=[{"kind": "none"}, {"kind": "rotation", "degrees": 90}])
    for name in (
        "public_inputs",
        "validation_inputs",
        "test_inputs",
        "channel_mean",
        "train_labels",
    ):
        np.testing.assert_array_equal(getattr(data, name), getattr(plain, name))
    for client, (rows, same) in enumerate(zip(data.client_rows, plain.client_rows, strict=True)):
        np.testing.assert_array_equal(rows, same)
        expected = plain.train_inputs[rows]
        if client % 2:
            expected = np.rot90(expected, axes=(2, 3))
        np.testing.assert_allclose(data.train_inputs[rows], expected, atol=1e-5)


def test_clients_are_judged_on_test_rows_that_are_shifted_alike():
    data = build(shifts=[{"kind": "none"}, {"kind": "rotation", "degrees": 90}])
    shifts = data.client_shifts
    assert shifts.labels == ("none", "rotation degrees=90")
    assert shifts.of_client.tolist() == [0, 1, 0, 1]
    unshifted, turned = shifts.test_inputs
    assert unshifted is None
    np.testing.assert_allclose(turned, np.rot90(data.test_inputs, axes=(2, 3)), atol=1e-5)
    as_is = build(shifts={"kind": "rotation", "degrees": 90}, judged="as_is")
    assert as_is.client_shifts.test_inputs == (None,)
    assert build().client_shifts is None


def test_features_are_moved_by_their_own_standard_deviations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    features = rng.normal([5, -3], [10, 0.1], size=(200, 2)).tolist()
    table = pa.table(
        {"features": features, "label": np.arange(200) % 2, "site": np.arange(200) % 2}
    )
    pq.write_table(table, tmp_path / "train.parquet")

    def build(**shift):
        settings = DataSettings(
            source=str(tmp_path),
            public={"size": 20},
            partition={"kind": "natural", "column": "site"},
            feature_shift=shift,
        )
        return build_federated_data(settings, num_clients=2, seed=0)

    plain, data = build(), build(shifts=[{"kind": "none"}, {"kind": "offset", "by": 1.5}])
    assert plain.train_inputs.std(axis=0) == pytest.approx(1, abs=0.1)
    for client, by in ((0, 0), (1, 1.5)):
        rows = data.client_rows[client]
        np.testing.assert_allclose(
            data.train_inputs[rows], plain.train_inputs[rows] + by, rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(data.test_inputs, plain.test_inputs)
    np.testing.assert_allclose(
        data.client_shifts.test_inputs[1], data.test_inputs + 1.5, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"'blur' is for pictures, and data\.source holds features"
    ):
        build(shifts=[{"kind": "blur"}])


def test_noise_is_drawn_from_the_seed_for_each_client():
    inputs = np.full((6, 4), 0.0, dtype=np.float32)
    rows = (np.array([0, 2]), np.array([1, 3]))
    settings = FeatureShift(shifts=[{"kind": "noise", "std": 1.0}])

    def drawn(seed, rows=rows):
        pool = inputs.copy()
        shift_inputs(pool, inputs, rows, settings, seed=seed)
        return pool

    first = drawn(1)
    np.testing.assert_array_equal(first, drawn(1))
    assert (first[:4] != drawn(2)[:4]).all()
    assert (first[[0, 2]] != first[[1, 3]]).all()
    np.testing.assert_array_equal(first[4:], 0)  # nobody's
    # What another client holds changes nothing for this one.
    np.testing.assert_array_equal(drawn(1, (rows[0], np.array([5])))[[0, 2]], first[[0, 2]])


def test_shifts_may_be_dealt_by_lot():
    shifts = [{"kind": "none"}, {"kind": "noise"}, {"kind": "blur"}]
    one, again, other = (
        build(seed, clients=20, shifts=shifts, dealt="by_lot").client_shifts.of_client
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert set(one) == {0, 1, 2}


def test_the_table_shows_who_sees_what():
    data = build(shifts=[{"kind": "colour", "invert": True, "contrast": 0.5}, {"kind": "noise"}])
    assert [row["shift"] for row in split_table(data)] == 2 * [
        "colour invert contrast=0.5",
        "noise std=0.1",
    ]
    assert "shift" not in split_table(build())[0]


def test_shifted_data_travel_to_workers():
    data = build(shifts=[{"kind": "blur"}], clients=2)
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(
        copy.client_shifts.test_inputs[0], data.client_shifts.test_inputs[0]
    )
