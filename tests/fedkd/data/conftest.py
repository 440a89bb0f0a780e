import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def encode(pixels: np.ndarray, picture_format: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=picture_format)
    return stream.getvalue()


def write_split(
    folder: Path,
    split: str,
    pictures: Sequence[np.ndarray],
    labels: Sequence[int],
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = ("cat", "dog"),
    picture_format: str = "PNG",
    files: int = 1,
    row_group_size: int | None = None,
) -> Path:
    """Write uint8 pictures as Parquet files in the Hugging Face image layout."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encode(p, picture_format), "path": None} for p in pictures]
    storage = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            image_column: pa.array(cells, storage),
            label_column: pa.array(list(labels), pa.int64()),
        }
    )
    if class_names is not None:
        features = {
            image_column: {"_type": "Image"},
            label_column: {"_type": "ClassLabel", "names": list(class_names)},
        }
        note = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": note})
    for number, rows in enumerate(np.array_split(np.arange(len(table)), files)):
        path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table.take(rows), path, row_group_size=row_group_size)
    return folder


def numbered_pictures(count: int, start: int = 0) -> list[np.ndarray]:
    """Grey 3x2 pictures whose first two pixels spell their number in base 256."""
    pictures = []
    for number in range(start, start + count):
        picture = np.zeros((3, 2), dtype=np.uint8)
        picture[0] = divmod(number, 256)
        picture[1:] = 200
        pictures.append(picture)
    return pictures


@pytest.fixture
def write_pictures() -> Callable[..., Path]:
    return write_split


@pytest.fixture
def numbered() -> Callable[..., list[np.ndarray]]:
    return numbered_pictures


@pytest.fixture
def numbered_folder(tmp_path: Path) -> Path:
    """300 training and 60 test rows of two classes; every picture says which row it is."""
    folder = tmp_path / "pictures"
    write_split(
        folder, "train", numbered_pictures(300), np.arange(300) % 2, files=3, row_group_size=40
    )
    return write_split(folder, "test", numbered_pictures(60, start=1000), np.arange(60) % 2)
