"""Pictures in folders that are named after their class: ``train/cat/1.png`` or ``cat/1.png``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from fedkd.data.images import Pixels, open_image, stack_images
from fedkd.data.labels import UNLABELLED, LabelColumn
from fedkd.data.natural_ids import NaturalIds, ids_from_names
from fedkd.names import printable

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "folder"
"""What ``data.partition.column`` calls the folder above that of a picture's class."""


class PictureFolder:
    """The picture files of one split; the folder that a file lies in names its class."""

    def __init__(
        self,
        files: Sequence[Path],
        root: Path,
        *,
        depth: int,
        resize: tuple[int, int] | None,
        needs_labels: bool = True,
    ) -> None:
        """Check that all files lie equally deep.

        Args:
            files: pictures below ``root``.
            root: the folder of the source.
            depth: how many folders below it say which split it is.
            resize: height and width that pictures are brought to.
            needs_labels: else pictures may lie anywhere; then they have no labels.

        Raises:
            ValueError: if not, or if they lie in no folder of a class: it would be a guess which.
        """
        self._files = files
        self._root = root
        self._depth = depth
        self._resize = resize
        deep = {len(path.relative_to(root).parts): path for path in reversed(files)}
        self._has_labels = len(deep) == 1 and min(deep) >= depth + 2
        if not needs_labels:
            return
        if len(deep) > 1:
            first, second = (self._name(path) for path in list(deep.values())[:2])
            raise ValueError(
                f"{first} and {second} lie in folders of different depth: each picture has to lie "
                "in a folder named after its class"
            )
        if min(deep) < depth + 2:
            raise ValueError(
                f"{self._name(files[0])} lies in no folder that is named after its class"
            )

    def labels(self) -> LabelColumn:
        """Return the classes: the names of the folders, in alphabetical order."""
        if not self._has_labels:
            return LabelColumn(
                self._name(self._files[0].parent), np.full(len(self._files), UNLABELLED)
            )
        folders = [path.parent.name for path in self._files]
        names, numbers = np.unique(folders, return_inverse=True)
        return LabelColumn(
            self._name(self._files[0].parent), numbers.astype(np.int64), tuple(map(str, names))
        )

    def ids(self, column: str) -> NaturalIds:
        """Return whose each picture is: the folder above that of its class.

        Args:
            column: how settings call it, `FOLDER`.

        Raises:
            ValueError: if it is called anything else, or there is no such folder.
        """
        if column != FOLDER:
            raise ValueError(
                f"data.partition.column must be {FOLDER!r} for a folder of pictures, the one above "
                f"those of the classes, got {column!r}"
            )
        above = [path.relative_to(self._root).parts[self._depth : -2] for path in self._files]
        if not above[0]:
            raise ValueError(
                f"data.partition.column {FOLDER!r}: {self._name(self._files[0])} lies in a folder "
                "of its class, and in none above that says whose it is (such as ann/cat/1.png)"
            )
        return ids_from_names([printable("/".join(parts)) for parts in above])

    def read(self, rows: Int64[np.ndarray, "rows"]) -> Pixels:
        """Decode the pictures of ``rows``.

        Raises:
            ValueError: if one cannot be read; names its file.
        """
        return stack_images(
            self._pictures(rows),
            positions=np.arange(len(rows)),
            resize=self._resize,
            name=lambda index: self._name(self._files[rows[index]]),
        )

    def _pictures(self, rows: Int64[np.ndarray, "rows"]) -> "Iterator[Image]":
        for row in rows:
            path = self._files[row]
            try:
                yield open_image(path)
            except ValueError as error:
                raise ValueError(f"{self._name(path)}: {error}") from error

    def _name(self, path: Path) -> str:
        return printable(str(path.relative_to(self._root)))
