"""Columns of text become numbers of characters, or counts of hashed n-grams."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedkd.data import DataSettings, build_federated_data
from fedkd.data.settings import TextSettings
from fedkd.data.sources import open_source
from fedkd.data.texts import Characters


def write(path, **columns):
    pq.write_table(pa.table(columns), path)


def opened(path, **settings):
    return open_source(DataSettings(source=str(path), **settings))


def test_characters_are_numbered_by_code_point_and_short_texts_filled_up(tmp_path):
    write(tmp_path / "train.parquet", text=["cab", "b", "", "ab\u00fc"], label=[0, 1, 0, 1])
    source = opened(tmp_path)
    # a 2, b 3, c 4, ü 5
    assert source.train.read(np.arange(4)).tolist() == [[4, 2, 3], [3, 0, 0], [0, 0, 0], [2, 3, 5]]
    assert (source.kind, source.vocabulary) == ("text", 6)


def test_a_longer_text_keeps_its_end_and_other_characters_are_unknown(tmp_path):
    write(tmp_path / "train.parquet", text=["abab", "b"], label=[0, 1])
    write(tmp_path / "test.parquet", text=["xba"], label=[0])
    source = opened(tmp_path, text={"length": 2})
    assert source.train.read(np.arange(2)).tolist() == [[2, 3], [3, 0]]
    assert source.test.read(np.arange(1)).tolist() == [[3, 2]]
    assert Characters("ab", 3).encode(["xba"]).tolist() == [[1, 3, 2]]
    assert Characters("", 2).encode(["a"]).tolist() == [[1, 0]]


def test_a_text_beside_other_columns_is_found_by_its_name_or_by_the_setting(tmp_path):
    write(tmp_path / "train.parquet", text=["a", "b"], role=[5, 6], label=[0, 1])
    assert opened(tmp_path).kind == "text"
    # Whoever has numbers beside a text may have meant them to be learnt from.
    assert "not read: column 'role'" in opened(tmp_path).notes[0]
    assert opened(tmp_path, text_column="text").notes == ()
    write(tmp_path / "train.parquet", words=["a", "b"], role=[5, 6], label=[0, 1])
    assert opened(tmp_path).kind == "features"
    assert opened(tmp_path, text_column="words").kind == "text"
    write(tmp_path / "train.parquet", words=["a", "b"], label=[0, 1])
    assert opened(tmp_path).kind == "text"
    with pytest.raises(ValueError, match=r"data\.text_column 'label': holds numbers, not text"):
        opened(tmp_path, text_column="label")


def test_an_empty_cell_is_named_by_file_and_row(tmp_path):
    write(tmp_path / "train.parquet", text=["a", None], label=[0, 1])
    with pytest.raises(
        ValueError, match=r"train\.parquet, row 2 .counted from 1., column 'text': there is no text"
    ):
        opened(tmp_path).train.read(np.array([1, 0]))


def test_hashed_grams_are_counts_scaled_to_length_one_in_stable_places(tmp_path):
    write(tmp_path / "train.parquet", text=["aab", "to be to"], label=[0, 1])
    grams = {"form": "character_ngrams", "ngrams": 1, "features": 16}
    source = opened(tmp_path, text=grams)
    row = source.train.read(np.array([0]))[0]
    # MurmurHash3 of 32 bits with seed 0: "a" is 1009084850, place 2; the sign of "b" is minus.
    assert np.flatnonzero(row).tolist() == [2, 13]
    assert row[[2, 13]] == pytest.approx([2 / 5**0.5, -1 / 5**0.5])
    assert source.kind == "features"
    words = opened(tmp_path, text={"form": "word_ngrams", "ngrams": 1, "features": 1000})
    found = np.sort(np.abs(words.train.read(np.array([1]))[0]))[-2:]
    assert found == pytest.approx([1 / 5**0.5, 2 / 5**0.5])


def test_texts_are_not_standardised_and_public_ones_have_the_same_characters(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), 5)) for _ in range(100)]
    write(tmp_path / "train.parquet", text=texts, label=np.arange(100) % 2)
    other = tmp_path / "other.parquet"
    write(other, text=["dcx"] * 20, label=[0, 1] * 10)
    settings = DataSettings(
        source=str(tmp_path / "train.parquet"), public={"size": 4, "source": str(other)}
    )
    data = build_federated_data(settings, num_clients=2, seed=0)
    assert (data.input_shape.kind, data.vocabulary) == ("text", 6)
    assert data.public_inputs.tolist() == [[5, 4, 1, 0, 0]] * 4
    assert set(np.unique(data.train_inputs)) == {2, 3, 4, 5}


@pytest.mark.parametrize("ngrams", [0, [3, 1], [1, 17], "2", [1, 2, 3]])
def test_sizes_of_grams_that_cannot_be_are_refused(ngrams):
    with pytest.raises(ValueError, match="must be a size from 1 to 16"):
        TextSettings(ngrams=ngrams)
