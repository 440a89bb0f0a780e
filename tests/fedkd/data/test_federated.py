import pickle

import numpy as np
import pytest

from fedkd.data import DataSettings, build_federated_data
from fedkd.data.images import open_image

SMALL = {"public": {"size": 60}, "partition": {"kind": "iid"}}


def build(num_clients=4, seed=0, **table):
    return build_federated_data(
        DataSettings.model_validate(table), num_clients=num_clients, seed=seed
    )


def row_numbers(data, inputs):
    """Undo the standardisation and read the number that each picture spells."""
    pixels = inputs * data.channel_std[:, None, None] + data.channel_mean[:, None, None]
    high, low = np.rint(pixels[:, 0, 0] * 255).astype(int).T
    return high * 256 + low


def arrays_of(data):
    names = ("train", "validation", "test")
    arrays = [getattr(data, f"{name}_{part}") for name in names for part in ("inputs", "labels")]
    return [*arrays, data.public_inputs, data.channel_mean, data.channel_std, *data.client_rows]


def test_digits_are_split_as_documented():
    # 1797: 359 test, 500 public, 10 % of the other 938 validation, the rest private.
    data = build(num_clients=10)
    assert [
        len(inputs)
        for inputs in (
            data.test_inputs,
            data.public_inputs,
            data.validation_inputs,
            data.train_inputs,
        )
    ] == [359, 500, 94, 844]
    assert (data.num_classes, data.num_clients, data.input_shape.sides) == (10, 10, (1, 8, 8))
    assert data.num_unassigned_rows == 0


def test_no_picture_is_in_two_sets_or_with_two_clients(numbered_folder):
    data = build(source=str(numbered_folder), **SMALL)
    private = [row_numbers(data, data.private(client)[0]) for client in range(4)]
    sets = [
        *private,
        row_numbers(data, data.public_inputs),
        row_numbers(data, data.validation_inputs),
        row_numbers(data, data.test_inputs),
    ]
    together = np.concatenate(sets)
    expected = np.concatenate([np.arange(300), np.arange(1000, 1060)])
    np.testing.assert_array_equal(np.sort(together), expected)


def test_labels_stay_with_their_pictures(numbered_folder):
    data = build(source=str(numbered_folder), public={"size": 60, "labelled": True})
    for inputs, labels in (
        data.private(2),
        (data.public_inputs, data.public_labels),
        (data.validation_inputs, data.validation_labels),
        (data.test_inputs, data.test_labels),
    ):
        np.testing.assert_array_equal(row_numbers(data, inputs) % 2, labels)


def test_unlabelled_public_data_carries_no_labels(numbered_folder):
    labelled = build(source=str(numbered_folder), public={"size": 60, "labelled": True})
    unlabelled = build(source=str(numbered_folder), public={"size": 60})
    assert unlabelled.public_labels is None
    np.testing.assert_array_equal(labelled.public_inputs, unlabelled.public_inputs)


def test_training_rows_have_zero_mean_and_unit_deviation_per_channel(tmp_path, write_pictures):
    rng = np.random.default_rng(0)
    colours = list(rng.integers(0, [60, 120, 256], size=(50, 4, 4, 3), dtype=np.uint8))
    write_pictures(tmp_path, "train", colours, np.arange(50) % 2)
    data = build(2, source=str(tmp_path), public={"size": 10}, partition={"kind": "iid"})
    used = np.concatenate([data.public_inputs, data.validation_inputs, data.train_inputs])
    np.testing.assert_allclose(used.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(used.std(axis=(0, 2, 3)), 1, rtol=1e-5)


def test_a_channel_without_contrast_becomes_zero_not_nan(tmp_path, write_pictures):
    write_pictures(tmp_path, "train", [np.full((2, 2), 9, np.uint8)] * 20, np.arange(20) % 2)
    data = build(
        2, source=str(tmp_path), public={"size": 2}, partition={"kind": "iid", "min_rows": 1}
    )
    np.testing.assert_allclose(data.train_inputs, 0, atol=1e-6)


def test_arrays_are_contiguous_and_of_the_promised_types():
    data = build(public={"size": 50, "labelled": True})
    for array in (*arrays_of(data), data.public_labels):
        assert array.flags.c_contiguous
        assert array.dtype in (np.float32, np.int64)


@pytest.mark.parametrize(
    ("num_clients", "partition"),
    [
        (12, {"kind": "dirichlet", "min_rows": 1}),
        (4, {"kind": "pathological"}),
        (4, {"kind": "shard"}),
        (4, {"kind": "dirichlet", "alpha": 100.0}),
    ],
)
def test_the_split_depends_on_neither_clients_nor_partition(num_clients, partition):
    base, moved = build(partition={"kind": "iid"}), build(num_clients, partition=partition)
    for name in ("train_inputs", "train_labels", "public_inputs", "validation_inputs"):
        np.testing.assert_array_equal(getattr(base, name), getattr(moved, name))
    np.testing.assert_array_equal(base.test_inputs, moved.test_inputs)


def test_same_seed_same_bits_and_other_seed_other_rows():
    first, again, other = build(), build(), build(seed=1)
    for array, same in zip(arrays_of(first), arrays_of(again), strict=True):
        assert array.tobytes() == same.tobytes()
    assert first.test_inputs.tobytes() != other.test_inputs.tobytes()
    assert first.client_rows[0].tobytes() != other.client_rows[0].tobytes()


def test_a_seed_in_the_settings_overrides_the_seed_of_the_run():
    settings = DataSettings(seed=7)
    fixed, other_run = (
        build_federated_data(settings, num_clients=4, seed=run_seed) for run_seed in (0, 1)
    )
    assert fixed.train_inputs.tobytes() == other_run.train_inputs.tobytes()
    assert fixed.train_inputs.tobytes() == build(seed=7).train_inputs.tobytes()


def test_drawing_data_leaves_the_global_generators_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    build()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_label_counts_agree_with_what_clients_hold():
    data = build(num_clients=5)
    counts = data.label_counts()
    assert counts.shape == (5, 10)
    for client in range(5):
        _, labels = data.private(client)
        np.testing.assert_array_equal(counts[client], np.bincount(labels, minlength=10))
    assert counts.sum() == len(data.train_labels)


def test_rows_that_nobody_holds_are_counted():
    data = build(num_clients=2, partition={"kind": "pathological", "classes_per_client": 2})
    assert data.num_unassigned_rows == len(data.train_labels) - data.label_counts().sum() > 0


@pytest.mark.parametrize("client", [-1, 4])
def test_an_unknown_client_is_refused(client):
    with pytest.raises(ValueError, match=rf"client must be 0 to 3, got {client}"):
        build().private(client)


def test_only_the_rows_in_use_are_decoded(numbered_folder, monkeypatch):
    decoded = []

    def count(encoded, **how):
        decoded.append(encoded)
        return open_image(encoded, **how)

    monkeypatch.setattr("fedkd.data.tables.open_image", count)
    data = build(
        2,
        source=str(numbered_folder),
        public={"size": 20},
        private_rows=45,
        test_rows=10,
        partition={"kind": "iid"},
    )
    # 45 private rows are 90 % of 50, so 5 validation rows.
    assert (len(data.train_inputs), len(data.validation_inputs)) == (45, 5)
    assert len(decoded) == 20 + 45 + 5 + 10


def test_grey_training_and_coloured_test_images_get_the_same_channels(
    tmp_path, write_pictures, numbered
):
    write_pictures(tmp_path, "train", numbered(40), np.arange(40) % 2)
    write_pictures(tmp_path, "test", [np.zeros((3, 2, 3), np.uint8)] * 2, [0, 1])
    data = build(2, source=str(tmp_path), public={"size": 4}, partition={"kind": "iid"})
    assert data.input_shape.sides == (3, 3, 2)
    assert data.test_inputs.shape == (2, 3, 3, 2)


def test_images_of_unequal_size_are_refused_by_the_name_of_the_source(
    tmp_path, write_pictures, numbered
):
    uneven = [*numbered(39), np.zeros((5, 5), np.uint8)]
    write_pictures(tmp_path, "train", uneven, np.arange(40) % 2)
    with pytest.raises(
        ValueError, match=r"data\.source .*one height x width, got 5x5 .*data\.resize"
    ):
        build(2, source=str(tmp_path), public={"size": 4}, partition={"kind": "iid"})


def test_test_images_of_another_size_are_refused(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", numbered(40), np.arange(40) % 2)
    write_pictures(tmp_path, "test", [np.zeros((5, 5), np.uint8)] * 2, [0, 1])
    with pytest.raises(ValueError, match=r"data\.source .*got 3x2 and 5x5"):
        build(2, source=str(tmp_path), public={"size": 4}, partition={"kind": "iid"})


def test_pictures_of_any_size_are_brought_to_one(tmp_path, write_pictures, numbered):
    write_pictures(tmp_path, "train", [*numbered(39), np.zeros((50, 7), np.uint8)], [0, 1] * 20)
    write_pictures(tmp_path, "test", [np.zeros((5, 9), np.uint8)] * 2, [0, 1])
    settings = {"source": str(tmp_path), "public": {"size": 4}, "partition": {"kind": "iid"}}
    data = build(2, resize=[4, 6], **settings)
    assert data.input_shape.sides == (1, 4, 6)
    assert data.test_inputs.shape == (2, 1, 4, 6)
    assert build(resize=16).input_shape.sides == (1, 16, 16)  # digits, too


def test_rows_that_show_a_picture_of_another_set_are_counted_and_told(
    tmp_path, write_pictures, numbered, caplog
):
    write_pictures(tmp_path, "train", numbered(40), np.arange(40) % 2, picture_format="PNG")
    # The same pictures in another encoding: what counts is what they show.
    again = [*numbered(40)[:7], *numbered(3, start=900)]
    write_pictures(tmp_path, "test", again, np.arange(10) % 2, picture_format="BMP")
    data = build(2, source=str(tmp_path), public={"size": 4}, partition={"kind": "iid"})
    told = {note.split(": ", 1)[1] for note in data.notes}
    counts = [int(note.split()[0]) for note in told]
    assert sum(counts) == 7
    assert all(note.endswith("show the same picture as a test row") for note in told)
    assert set(caplog.messages) == set(data.notes)


def test_digits_have_nothing_to_tell(caplog):
    assert build().notes == ()
    assert not caplog.messages


def test_an_impossible_partition_is_refused_before_any_picture_is_decoded(
    tmp_path, write_pictures, numbered
):
    uneven = [*numbered(39), np.zeros((5, 5), np.uint8)]  # decoding these would fail
    write_pictures(tmp_path, "train", uneven, np.arange(40) % 2)
    with pytest.raises(ValueError, match=r"clients\.count must be at most"):
        build(100, source=str(tmp_path), public={"size": 4})


def test_too_large_a_public_set_is_refused_by_its_setting():
    with pytest.raises(ValueError, match=r"data\.public\.size must be at most 1\d{3}, got 5000"):
        build(public={"size": 5000})


@pytest.mark.parametrize("rows", [(3, 1, 4), (2,)])
def test_data_arrive_as_they_left(tiny_data, rows):
    data = tiny_data(rows=rows)
    arrived = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert len(arrived.client_rows) == len(rows)
    for own, sent in zip(arrived.client_rows, data.client_rows, strict=True):
        assert np.array_equal(own, sent)
    assert np.array_equal(arrived.train_inputs, data.train_inputs)
    assert arrived.class_names == data.class_names
