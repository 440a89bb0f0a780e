"""Files become the inputs that the model was trained on; what cannot be read is named alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from fedkd.data.features import FeatureColumn
from fedkd.data.reading import Reading
from fedkd.data.texts import Characters, HashedGrams
from fedkd.models import ModelSettings
from fedkd.trained.files import LoadedModel, ModelInfo
from fedkd.trained.inputs import NoInputsError
from fedkd.trained.predicting import Prediction, predict_files

Make = Callable[..., LoadedModel]


def probabilities(predictions: Sequence[Prediction]) -> np.ndarray:
    return np.stack([each.probabilities for each in predictions if each.probabilities is not None])


def test_pictures_of_any_size_and_colour(make: Make, tmp_path: Path) -> None:
    loaded = make("mlp")
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(folder / "b.png")
    Image.fromarray(np.kron(grey, np.ones((2, 2), np.uint8))).save(folder / "deeper" / "c.bmp")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    found = list(predict_files(loaded, [folder, tmp_path / "nowhere.png"]))
    assert [each.file.name for each in found] == [
        *("a.png", "b.png", "broken.jpg", "c.bmp", "nowhere.png")
    ]
    expected = loaded.predict(grey[None, None].astype(np.float32) / 255)[0]
    a, b, c = probabilities(found)
    assert np.allclose(a, expected, atol=1e-6)
    assert np.allclose(b, expected, atol=1e-5)  # a grey picture in colours has its luma
    assert np.abs(c - expected).max() < 0.1  # twice the size, brought back
    assert {each.file.name: each.problem for each in found if each.problem} == {
        "broken.jpg": "the picture could not be read: no picture",
        "nowhere.png": "it does not exist",
    }
    assert found[0].class_name == loaded.class_names[int(expected.argmax())]


def test_rows_of_a_parquet_file_with_a_picture_that_is_none(make: Make, tmp_path: Path) -> None:
    loaded = make()
    picture = tmp_path / "p.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(picture)
    cells = [picture.read_bytes(), b"noise", picture.read_bytes()]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), file)
    found = list(predict_files(loaded, [file]))
    assert [(each.row, bool(each.problem)) for each in found] == [(0, 0), (1, 1), (2, 0)]
    assert found[1].problem.startswith("the picture could not be read")
    assert found[1].where == f"{file}, row 2 (counted from 1)"
    assert np.allclose(*probabilities(found))


COLUMNS = (FeatureColumn("age", 1), FeatureColumn("pet", 2, ("cat", "dog")))


def test_columns_are_those_of_training_whatever_their_order(make: Make, tmp_path: Path) -> None:
    loaded = make(
        input_shape=(3,),
        channel_mean=(40.0, 0.5, 0.5),
        channel_std=(10.0, 0.5, 0.5),
        reading=Reading(columns=COLUMNS),
    )
    file = tmp_path / "people.csv"
    file.write_text("pet,name,age\ndog,Ann,30\ncat,Bob,50\nfish,Cy,20\ncat,Di,\n")
    found = list(predict_files(loaded, [file]))
    expected = loaded.predict(np.array([[30, 0, 1], [50, 1, 0]], np.float32))
    assert np.allclose(probabilities(found), expected, atol=1e-6)
    assert found[2].problem.startswith(
        "column 'pet': holds 'fish', which is none of the categories"
    )
    assert found[3].problem.startswith("column 'age': the cell is empty")
    assert found[3].where == f"{file}, line 5"
    file.write_text("pet,name\ndog,Ann\n")
    (found_without,) = predict_files(loaded, [file])
    assert "lacks column age" in found_without.problem
    (picture,) = predict_files(loaded, [Path(__file__)])
    assert "the model takes 3 features" in picture.problem


def test_rows_of_a_table_are_predicted_as_a_file_of_them(make: Make, tmp_path: Path) -> None:
    loaded = make(
        input_shape=(3,),
        channel_mean=(40.0, 0.5, 0.5),
        channel_std=(10.0, 0.5, 0.5),
        reading=Reading(columns=COLUMNS),
    )
    expected = loaded.predict(np.array([[30, 0, 1], [50.5, 1, 0]], np.float32))
    rows = [{"pet": "dog", "name": "Ann", "age": 30}, {"age": 50.5, "pet": "cat"}]
    assert np.array_equal(loaded.predict(rows), expected)
    assert np.array_equal(loaded.predict({"pet": ["dog", "cat"], "age": (30, 50.5)}), expected)
    table = {"age": np.array([30, 50.5]), "pet": np.array(["dog", "cat"]), "other": [{}, None]}
    assert np.array_equal(loaded.predict(table), expected)
    # As `csv.DictReader` gives them: all cells are text.
    texts = [{"pet": "dog", "age": "30"}, {"pet": "cat", "age": "50.5"}]
    assert np.array_equal(loaded.predict(texts), expected)
    assert loaded.predict({"age": [], "pet": []}).shape == (0, 3)
    for given, told in (
        ([rows[0], {"pet": "emu", "age": 1}], r"row 1 \(counted from 0\), column 'pet': .*'emu'"),
        ([rows[0], {"pet": "cat"}], r"row 1 .*column 'age': the cell is empty"),
        ([{"pet": "cat"}], "lacks column age"),
        ({"age": [1, 2], "pet": ["cat"]}, "one length, got age: 2, pet: 1"),
        ({"age": [1, "x"], "pet": ["cat", "cat"]}, "'age' must hold values of one type"),
    ):
        with pytest.raises(ValueError, match=told):
            loaded.predict(given)
    with pytest.raises(ValueError, match="learnt from arrays, not from columns"):
        make(input_shape=(3,), channel_mean=(0.0,) * 3, channel_std=(1.0,) * 3).predict(rows)


@pytest.mark.parametrize("encoder", [Characters("abc ", 6), HashedGrams("characters", (1, 2), 6)])
def test_texts_are_encoded_as_in_training(
    make: Make, tmp_path: Path, encoder: Characters | HashedGrams
) -> None:
    tokens = encoder.vocabulary is not None
    loaded = make(
        "gru" if tokens else "mlp",
        input_shape=(6,),
        vocabulary=encoder.vocabulary,
        channel_mean=(0.0,) if tokens else (0.1,) * 6,
        channel_std=(1.0,) if tokens else (0.5,) * 6,
        reading=Reading("said", encoder=encoder),
    )
    texts = ["abca", "a cab on a bank"]
    expected = loaded.predict(encoder.encode(texts))
    assert np.allclose(loaded.predict(texts), expected)
    assert np.allclose(loaded.predict([{"said": text} for text in texts]), expected)
    file = tmp_path / "said.csv"
    file.write_text("said\n" + "\n".join(texts) + "\n")
    assert np.allclose(probabilities(list(predict_files(loaded, [file]))), expected, atol=1e-6)
    np.savez(tmp_path / "said.npz", texts=np.array(texts))
    in_arrays = list(predict_files(loaded, [tmp_path / "said.npz"]))
    assert np.allclose(probabilities(in_arrays), expected, atol=1e-6)


def test_arrays_of_pictures(make: Make, tmp_path: Path) -> None:
    loaded = make()
    pixels = np.random.default_rng(1).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_test=pixels, y_test=np.zeros(300, np.int64))
    found = list(predict_files(loaded, [tmp_path / "x.npz"]))
    expected = loaded.predict(pixels[:, None].astype(np.float32) / 255)
    assert [each.row for each in found] == list(range(300))
    assert np.allclose(probabilities(found), expected, atol=1e-6)


def test_a_folder_without_anything_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputsError, match="holds no picture files, and no pictures in"):
        list(predict_files(make(), [tmp_path / "empty"]))


def test_columns_that_give_other_inputs_are_refused() -> None:
    fields = {
        "model": ModelSettings(name="mlp"),
        "input_shape": (4,),
        "class_names": ("yes", "no"),
        "channel_mean": (0.0,) * 4,
        "channel_std": (1.0,) * 4,
    }
    with pytest.raises(ValidationError, match="reading gives inputs of 3, the model takes 4 feat"):
        ModelInfo(**fields, reading=Reading(columns=COLUMNS))  # type: ignore[arg-type]
    wrong = (FeatureColumn("age", 1), FeatureColumn("pet", 3, ("cat", "dog")))
    with pytest.raises(ValidationError, match="column 'pet' has no width of its own"):
        ModelInfo(**fields, reading=Reading(columns=wrong))  # type: ignore[arg-type]
