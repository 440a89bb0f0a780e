"""Clients with inputs of different kinds that speak of one index of public rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedkd.data import DataSettings, build_federated_data
from sim.commands.running import load_data, run
from sim.keeping.identity import data_digest
from sim.keeping.provenance import provenance_of
from sim.keeping.records import EXCHANGE_FILE, METRICS_FILE, read_rows
from sim.settings import Settings, SettingsError
from strategies import STRATEGIES, strategy_class

QUICK = ("dml", "fd", "fedmd", "scarlet")
TAKE_VIEWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(STRATEGIES)
    if strategy_class(name).takes_views
]


def write_sounds(folder: Path, *, classes: int = 10, rows: int = 400) -> Path:
    """Features of the ten digits, named in another order than theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(number) for number in reversed(range(classes))]
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % classes
    centres = rng.normal(0, 2, (classes, 12))
    features = (centres[labels] + rng.normal(0, 1, (rows, 12))).astype(np.float32)
    table = pa.table(
        {"features": pa.array(features.tolist()), "label": [names[label] for label in labels]}
    )
    pq.write_table(table, folder / "train.parquet")
    return folder


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "sounds")


@pytest.fixture
def mixed(small: Callable[..., Settings], sounds: Path) -> Callable[..., Settings]:
    """Settings of clients with pictures of digits and with features, in turn."""

    def settings(*words: str) -> Settings:
        return small(f"data.views=[{{source: {sounds}}}]", "clients.models=[cnn,mlp]", *words)

    return settings


def test_public_rows_show_the_same_class_in_every_view(sounds: Path) -> None:
    settings = DataSettings.model_validate(
        {"views": [{"source": str(sounds)}], "public": {"size": 60, "labelled": True}}
    )
    data = build_federated_data(settings, num_clients=5, seed=3)
    (view,) = data.views
    assert data.input_shape.sides == (1, 8, 8)
    assert view.input_shape.sides == (12,)
    np.testing.assert_array_equal(view.public_labels, data.public_labels)
    # Named in another order, numbered in that of the digits: nearest class means say so.
    means = np.stack([view.train_inputs[view.train_labels == c].mean(0) for c in range(10)])
    distances = ((view.public_inputs[:, None] - means) ** 2).sum(-1)
    assert (distances.argmin(-1) == view.public_labels).mean() > 0.9


def test_rows_of_clients_are_of_their_own_view(sounds: Path) -> None:
    settings = DataSettings.model_validate(
        {"views": [{"source": str(sounds)}], "public": {"size": 60}}
    )
    data = build_federated_data(settings, num_clients=5, seed=3)
    assert [data.of_client(client) is data for client in range(5)] == [True, False] * 2 + [True]
    for view in (data, *data.views):
        own = [data.client_rows[c] for c in range(5) if data.of_client(c) is view]
        together = np.sort(np.concatenate(own))
        np.testing.assert_array_equal(together, np.arange(len(view.train_labels)))
    assert data.private(1)[0].shape[1:] == (12,)
    assert data.label_counts().sum() == sum(map(len, data.client_rows))
    assert data.public_labels is None
    assert data.num_unassigned_rows == 0


def test_without_views_the_rows_are_what_they_were() -> None:
    one = build_federated_data(DataSettings(), num_clients=4, seed=7)
    assert one.views == ()
    assert one.of_client(3) is one


@pytest.mark.parametrize("name", TAKE_VIEWS)
def test_algorithms_that_exchange_predictions_run(
    mixed: Callable[..., Settings], name: str
) -> None:
    needs = STRATEGIES[name].card.needs if name == "fedgems" else ()
    result = run(mixed(f"strategy.name={name}", *needs))
    assert sorted(result.history.clients) == [0, 1, 2, 3]
    rows = read_rows(result.folder / METRICS_FILE)
    views = {row["client"]: row["view"] for row in rows if row["scope"] == "client"}
    assert views == {0: "digits", 1: "sounds", 2: "digits", 3: "sounds"}
    assert "ensemble_accuracy" not in result.history.federation[-1]


def test_views_learn_from_each_other(mixed: Callable[..., Settings]) -> None:
    result = run(mixed("strategy.name=dml"))
    taught = {
        row["client"] for row in read_rows(result.folder / EXCHANGE_FILE) if row["round"] == 2
    }
    assert taught == {0, 1, 2, 3}
    losses = [row for row in read_rows(result.folder / METRICS_FILE) if row["round"] == 2]
    assert all(row["loss/kd"] > 0 for row in losses if row["scope"] == "client")


def test_one_model_may_be_that_of_all_views(mixed: Callable[..., Settings]) -> None:
    # The same settings build networks of other widths for other inputs: no stack holds both.
    words = ("clients.models=[mlp]", "strategy.name=dml")
    stacked, alone = (run(mixed(*words, f"engine.vectorize={one}")) for one in ("vmap", "loop"))
    for client, row in alone.history.clients.items():
        assert stacked.history.clients[client]["accuracy"] == pytest.approx(
            row["accuracy"], abs=0.03
        )


def test_what_looks_at_rows_refuses_views_by_name(mixed: Callable[..., Settings]) -> None:
    for name in ("fedavg", "feddf", "one_way", "fedproto"):
        with pytest.raises(SettingsError, match=f"data.views: {name} cannot do with clients"):
            load_data(mixed(f"strategy.name={name}"))


def test_other_classes_are_refused(small: Callable[..., Settings], tmp_path: Path) -> None:
    five = write_sounds(tmp_path / "five", classes=5)
    with pytest.raises(SettingsError, match=r"data\.views\[0\]: its classes must be those of data"):
        load_data(small(f"data.views=[{{source: {five}}}]", "clients.models=[cnn,mlp]"))


def test_too_few_clients_and_a_second_public_source_are_refused(
    mixed: Callable[..., Settings],
) -> None:
    with pytest.raises(SettingsError, match=r"clients\.count must be at least 2"):
        load_data(mixed("clients.count=1"))
    with pytest.raises(SettingsError, match=r"leave out data\.public\.source"):
        mixed("data.public.source=digits")


def test_a_view_is_part_of_what_a_run_is(mixed: Callable[..., Settings], sounds: Path) -> None:
    settings = mixed()
    before, rows = provenance_of(settings).data, data_digest(load_data(settings))
    assert [name for name in before if name.startswith("view 1: ")] == [
        "view 1: sounds/train.parquet"
    ]
    write_sounds(sounds, rows=420)
    assert provenance_of(settings).data != before
    assert data_digest(load_data(settings)) != rows
