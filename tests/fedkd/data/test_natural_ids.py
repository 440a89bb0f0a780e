import numpy as np
import pyarrow as pa
import pytest

from fedkd.data import DataSettings, build_federated_data, plot_split, split_table
from fedkd.data.natural_ids import NaturalIds, deal_by_id, read_ids
from fedkd.data.sources import open_source
from fedkd.data.splits import split_rows_by_id
from fedkd.data.tables import ArrowTable

SPEAKERS = ("ann", "bob", "cy")


def table(name="a.parquet", **columns):
    return ArrowTable(pa.table(columns), name, {})


def ids_of(*counts):
    """As many rows of each id, one after the other in turn."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"id{place}" for place in range(len(counts)))
    return NaturalIds(names, np.random.default_rng(0).permutation(numbers))


def deal(ids, clients, *, seed=0, **given):
    settings = DataSettings(partition={"kind": "natural", "column": "who", **given}).partition
    return deal_by_id(ids, settings, num_clients=clients, rng=np.random.default_rng(seed))


# --- reading ----------------------------------------------------------------------------------


def test_ids_of_several_files_are_numbered_together():
    found = read_ids([table(who=["bob", "ann"]), table("b", who=["cy", None, "ann"])], "who")
    assert found.names == SPEAKERS
    assert found.numbers.tolist() == [1, 0, 2, -1, 0]


def test_whole_numbers_are_in_the_order_of_their_size():
    found = read_ids([table(who=[10, 9, None, 10])], "who")
    assert found.names == ("9", "10")
    assert found.numbers.tolist() == [1, 0, -1, 1]


def test_numbers_that_a_file_names_are_called_by_their_names():
    noted = {"who": {"_type": "ClassLabel", "names": ["zoe", "ann"]}}
    found = read_ids([ArrowTable(pa.table({"who": [0, 1, -1, None, 0]}), "a", noted)], "who")
    assert found.names == ("ann", "zoe")
    assert found.numbers.tolist() == [1, 0, -1, -1, 1]


def test_categories_and_truth_values_are_ids_too():
    column = pa.array(["b", "a", "b"]).dictionary_encode()
    assert read_ids([table(who=column)], "who").numbers.tolist() == [1, 0, 1]
    assert read_ids([table(who=[True, False])], "who").names == ("false", "true")


@pytest.mark.parametrize(
    ("column", "cells", "refusal"),
    [
        ("whom", ["a"], r"column must name a column of a\.parquet, got 'whom'; known: who"),
        ("who", [0.5], r"column 'who' must hold texts or whole numbers.*got double in a\.parquet"),
        ("who", [[1, 2]], r"must hold texts or whole numbers"),
        ("who", pa.array([None], pa.string()), r"column 'who' holds empty cells only"),
    ],
)
def test_columns_that_name_nobody_are_refused(column, cells, refusal):
    with pytest.raises(ValueError, match=rf"data\.partition\.{refusal}|{refusal}"):
        read_ids([table(who=cells)], column)


# --- dealing ----------------------------------------------------------------------------------


def test_each_id_is_one_client_with_all_its_rows():
    ids = ids_of(10, 20, 30)
    dealt = deal(ids, 3)
    assert dealt.names == ("id0", "id1", "id2")
    assert dealt.notes == ()
    for place, rows in enumerate(dealt.rows):
        np.testing.assert_array_equal(rows, np.flatnonzero(ids.numbers == place))


def test_parts_are_those_of_flwr_datasets_row_for_row():
    from datasets import Dataset
    from flwr_datasets.partitioner import NaturalIdPartitioner

    ids = ids_of(3, 11, 7, 5)
    theirs = NaturalIdPartitioner("who")
    names = [ids.names[number] for number in ids.numbers]
    theirs.dataset = Dataset.from_dict({"row": np.arange(len(names)), "who": names})
    for client, rows in enumerate(deal(ids, 4, min_rows=1).rows):
        np.testing.assert_array_equal(rows, theirs.load_partition(client)["row"])


def test_fewer_clients_are_drawn_among_the_ids_by_the_seed_and_the_rest_is_said():
    ids = ids_of(*range(10, 30))
    dealt, again, other = deal(ids, 5), deal(ids, 5), deal(ids, 5, seed=1)
    assert dealt.names == again.names != other.names
    assert list(dealt.names) == sorted(dealt.names, key=ids.names.index)
    held = sum(map(len, dealt.rows))
    (note,) = dealt.notes
    assert note == (
        "data.partition.column 'who': 5 of 20 ids are clients; "
        f"{390 - held} of 390 private rows are of others or of nobody, and unassigned"
    )


def test_ids_with_few_rows_and_rows_of_nobody_are_left_out_and_counted():
    ids = ids_of(7, 8, 9)
    ids = NaturalIds(ids.names, np.append(ids.numbers, [-1, -1]))
    dealt = deal(ids, 2)
    assert dealt.names == ("id1", "id2")
    assert "9 of 26 private rows" in dealt.notes[0]
    assert "(1 ids have fewer than 8 private rows)" in dealt.notes[0]


def test_more_clients_than_ids_are_refused_with_what_would_work():
    with pytest.raises(
        ValueError,
        match=r"clients\.count must be at most 2, .*got 3: .*data\.partition\.repeat=true",
    ):
        deal(ids_of(20, 20, 7), 3)


def test_clients_that_share_an_id_have_as_equal_sizes_as_ids_allow():
    # By hand: each id one client (30, 20, 10), then the largest of 15, 10, 5 is the first's, then
    # of 10, 10, 5 the first's again: 10, 10, 10 and 20 and 10 rows.
    ids = ids_of(30, 20, 10)
    dealt = deal(ids, 5, repeat=True)
    assert dealt.names == ("id0", "id0", "id0", "id1", "id2")
    assert [len(rows) for rows in dealt.rows] == [10, 10, 10, 20, 10]
    for name, rows in zip(dealt.names, dealt.rows, strict=True):
        assert {ids.names[number] for number in ids.numbers[rows]} == {name}
        assert (np.diff(rows) > 0).all()
    assert len(np.unique(np.concatenate(dealt.rows))) == 60
    other = deal(ids, 5, repeat=True, seed=1)
    assert set(dealt.rows[0]) != set(other.rows[0])


def test_as_many_clients_share_ids_as_the_fewest_rows_allow_and_no_more():
    # 8 rows each: 3 + 2 + 1 clients.
    ids = ids_of(30, 20, 10, 5)
    assert min(map(len, deal(ids, 6, repeat=True).rows)) >= 8
    with pytest.raises(ValueError, match=r"clients\.count must be at most 6, .*got 7"):
        deal(ids, 7, repeat=True)


@pytest.mark.parametrize("repeat", [False, True])
def test_no_id_with_enough_rows_is_said(repeat):
    with pytest.raises(ValueError, match=r"no id has data\.partition\.min_rows=8 of the 10 "):
        deal(ids_of(5, 5), 1, repeat=repeat)


# --- from files -------------------------------------------------------------------------------


@pytest.fixture
def speech(tmp_path, write_pictures, numbered):
    """90 rows of three speakers, in turn."""
    import pyarrow.parquet as pq

    folder = write_pictures(tmp_path / "speech", "train", numbered(90), np.arange(90) // 3 % 2)
    (path,) = folder.glob("*.parquet")
    rows = pq.read_table(path)
    speakers = pa.array([SPEAKERS[row % 3] for row in range(90)])
    pq.write_table(rows.append_column("speaker", speakers), path)
    return folder


def build(source, clients=3, **partition):
    settings = DataSettings(
        source=str(source),
        public={"size": 12},
        partition={"kind": "natural", "min_rows": 1, **partition},
    )
    return build_federated_data(settings, num_clients=clients, seed=3)


def speaker_of(data, rows):
    """Each picture spells its number in its first two pixels."""
    pixels = (
        data.train_inputs[rows] * data.channel_std[:, None, None] + data.channel_mean[:, None, None]
    )
    first = np.rint(pixels[:, 0, 0] * 255).astype(int)
    return {SPEAKERS[number % 3] for number in first[:, 0] * 256 + first[:, 1]}


def test_clients_hold_their_own_pictures_and_are_called_by_their_ids(speech):
    data = build(speech, column="speaker")
    assert data.client_names == SPEAKERS
    assert data.num_unassigned_rows == 0
    for name, rows in zip(data.client_names, data.client_rows, strict=True):
        assert speaker_of(data, rows) == {name}
    assert [row["id"] for row in split_table(data)] == list(SPEAKERS)
    ticks = plot_split(data).axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == list(SPEAKERS)


def test_what_belongs_to_no_client_is_among_the_notes(speech):
    data = build(speech, clients=2, column="speaker")
    assert any("2 of 3 ids are clients" in note for note in data.notes)
    assert data.num_unassigned_rows > 0


def test_public_validation_and_test_rows_may_be_of_ids_that_are_no_clients():
    rng = np.random.default_rng(0)
    labels, ids = rng.integers(0, 3, 1000), rng.integers(0, 20, 1000)
    ids[:7] = -1
    given = NaturalIds(tuple(map(str, range(20))), ids)
    settings = DataSettings(public={"size": 100}, test_rows=150)
    split = split_rows_by_id(labels, None, given, settings, seed=0)
    of = {
        name: set(ids[getattr(split, name)]) for name in ("test", "public", "validation", "private")
    }
    assert len(split.public) == 100
    assert len(split.test) == 150
    # 993 rows of somebody: 199 for testing, 100 public ones, and a tenth of the other 694.
    assert len(split.validation) == 69
    assert not of["private"] & (of["test"] | of["public"] | of["validation"])
    assert -1 not in set().union(*of.values())
    rows = np.concatenate([split.test, split.public, split.validation, split.private])
    assert len(np.unique(rows)) == len(rows)
    assert set(ids[split.private]) | of["test"] | of["public"] | of["validation"] == set(range(20))
    (note,) = split.notes
    apart = 20 - len(of["private"])
    assert note.startswith(f"data.partition.apart: {apart} of 20 ids are no clients; 368 of their ")
    again, other = (split_rows_by_id(labels, None, given, settings, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(split.private, again.private)
    assert of["private"] != set(ids[other.private])


def test_a_test_split_of_the_source_stays_the_test_set():
    ids = NaturalIds(("a", "b", "c"), np.arange(90) % 3)
    settings = DataSettings(public={"size": 10}, private_rows=20)
    split = split_rows_by_id(np.arange(90) % 2, np.arange(8) % 2, ids, settings, seed=0)
    np.testing.assert_array_equal(split.test, np.arange(8))
    assert (len(split.validation), len(split.private)) == (2, 20)
    assert len(set(split.private % 3)) == 2
    assert len({*(split.public % 3), *(split.validation % 3)}) == 1


def test_ids_apart_that_leave_no_client_are_refused(speech):
    # 18 rows for testing, 12 public and 6 validation ones take two of three speakers of 30 rows.
    data = build(speech, clients=1, column="speaker", apart=True)
    assert len(data.client_rows[0]) == 30
    assert any(note.startswith("data.partition.apart: 2 of 3 ids") for note in data.notes)
    with pytest.raises(ValueError, match=r"leaves no id for a client: .* need 70 rows .* of 3 ids"):
        build_federated_data(
            DataSettings(
                source=str(speech),
                public={"size": 50},
                partition={"kind": "natural", "column": "speaker", "apart": True},
            ),
            num_clients=1,
            seed=0,
        )


def test_what_save_to_disk_wrote_has_ids(speech, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_parquet(str(next(speech.glob("*.parquet"))), cache_dir=str(tmp_path / "c"))
    rows.save_to_disk(str(tmp_path / "saved"))
    assert build(tmp_path / "saved", column="speaker").client_names == SPEAKERS


def test_the_folder_above_those_of_the_classes_says_whose_pictures_are(tmp_path, numbered):
    from PIL import Image

    for number, picture in enumerate(numbered(90)):
        folder = tmp_path / "p" / "train" / SPEAKERS[number % 3] / ("cat", "dog")[number // 3 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    data = build(tmp_path / "p", column="folder")
    assert data.client_names == SPEAKERS
    for name, rows in zip(data.client_names, data.client_rows, strict=True):
        assert speaker_of(data, rows) == {name}
    with pytest.raises(ValueError, match=r"column must be 'folder' for a folder of pictures"):
        build(tmp_path / "p", column="speaker")


def test_pictures_in_folders_of_classes_only_are_refused(tmp_path, numbered):
    from PIL import Image

    for number, picture in enumerate(numbered(40)):
        folder = tmp_path / "p" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match=r"none above that says whose it is"):
        build(tmp_path / "p", column="folder")


def test_digits_have_no_ids():
    settings = DataSettings(partition={"kind": "natural", "column": "writer"})
    with pytest.raises(ValueError, match=r"data\.partition\.column 'writer': .* has no columns"):
        build_federated_data(settings, num_clients=2, seed=0)


def test_without_a_column_those_that_could_be_it_are_named(speech, tmp_path):
    natural = {"partition": {"kind": "natural"}}
    with pytest.raises(ValueError, match=r"^data\.partition\.column must .* has speaker$"):
        open_source(DataSettings(source=str(speech), **natural))
    # A column of many texts would be refused as a feature: the question comes first.
    file = tmp_path / "own.csv"
    lines = [f"{n},{n / 7},name {n},{n % 3},{n % 2}" for n in range(120)]
    file.write_text("\n".join(["n,a,who,site,label", *lines]))
    with pytest.raises(ValueError, match=r"has n, who, site$"):
        open_source(DataSettings(source=str(file), **natural))
    np.savez(tmp_path / "own.npz", x=np.ones((4, 2)), y=[0, 1, 0, 1], who=[0, 0, 1, 1], n=[3])
    with pytest.raises(ValueError, match=r"has who$"):
        open_source(DataSettings(source=str(tmp_path / "own.npz"), **natural))
    with pytest.raises(ValueError, match=r"'digits' has none that could$"):
        open_source(DataSettings(**natural))
