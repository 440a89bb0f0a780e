"""Public rows of another source: drawn there, and matched to what the clients' inputs are.

The private rows decide: public pictures are brought to their size and channels. Classes are those
of the private source. Where labelled public rows have others (FedMD learns from them before the
first round), these follow behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from fedkd.data.feature_shift import LUMA
from fedkd.data.images import Pixels, resize_pixels
from fedkd.data.settings import COLUMNS, DataSettings
from fedkd.data.sources import Read, Source, open_source, source_digests, source_files
from fedkd.data.splits import stratified_rows
from fedkd.inputs import Kind
from fedkd.randomness import Purpose, generator_for

MOST_REPEATED = 0.1
"""Share of the public rows that may show the very picture of a private or test row."""


@dataclass(frozen=True, eq=False, slots=True)
class PublicRows:
    """Rows that were drawn for the public set.

    Attributes:
        rows: ids of rows of the other source, in random order.
        labels: their classes, as numbers into ``class_names``.
        class_names: of the run: those of the private source first, then those that only public
            rows have.
        read: row ids -> inputs.
        kind: what these are.
        notes: on what was left aside.
    """

    rows: Int64[np.ndarray, "public_rows"]
    labels: Int64[np.ndarray, "public_rows"]
    class_names: tuple[str, ...]
    read: Read
    kind: Kind
    notes: tuple[str, ...] = ()

    def inputs(
        self, like: Float32[np.ndarray, "_rows *shape"], kind: Kind
    ) -> Float32[np.ndarray, "public_rows *shape"]:
        """Read the rows; pictures are brought to the size and the channels of private ones.

        Args:
            like: private rows.
            kind: what these are.

        Raises:
            ValueError: if public rows are of another kind, or have another number of features.
        """
        if self.kind != kind:
            raise ValueError(
                f"data.public.source must hold {kind} as data.source does, got {self.kind}"
            )
        found = self.read(self.rows)
        if kind == "pictures":
            return matched(found, channels=like.shape[1], size=like.shape[2:])
        if found.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"data.public.source must have the {like.shape[1]} "
                f"{'tokens a text' if kind == 'text' else 'features'} of data.source, in the same "
                f"order, got {found.shape[1]}"
            )
        return found


def source_settings(settings: DataSettings) -> DataSettings:
    """Return the settings that ``data.public.source`` is read with."""
    public = settings.public
    return settings.model_copy(
        update={
            "source": public.source,
            "config": public.config,
            "options": {},
            **{name: getattr(public, name) for name in COLUMNS},
        }
    )


def public_source_files(settings: DataSettings) -> tuple[Path, ...]:
    """List the files of ``data.public.source``, as `fedkd.data.source_files` does for the other.

    Raises:
        ValueError: if the source cannot be found; says what would work.
    """
    if settings.public.source is None:
        return ()
    try:
        return source_files(source_settings(settings))
    except ValueError as error:
        raise ValueError(_renamed(str(error))) from error


def public_source_digests(settings: DataSettings) -> dict[str, str]:
    """Do as `fedkd.data.source_digests` does, for ``data.public.source``.

    Raises:
        ValueError: if the function fails.
    """
    if settings.public.source is None:
        return {}
    try:
        return source_digests(source_settings(settings))
    except ValueError as error:
        raise ValueError(_renamed(str(error))) from error


def draw_public_rows(settings: DataSettings, private: Source, *, seed: int) -> PublicRows:
    """Draw ``data.public.size`` training rows of ``data.public.source``, stratified by its classes.

    Of a source without labels all rows are alike.

    Args:
        settings: the table ``data``, with a source of public rows.
        private: the opened ``data.source``.
        seed: in force for the split.

    Raises:
        ValueError: if the source cannot be read or has too few rows; names the setting.
    """
    public = settings.public
    try:
        source = open_source(
            source_settings(settings), private.encoder, needs_labels=public.labelled
        )
    except ValueError as error:
        raise ValueError(_renamed(str(error))) from error
    if public.size > len(source.train.labels):
        raise ValueError(
            f"data.public.size must be at most {len(source.train.labels)}, the training rows of "
            f"data.public.source {public.source!r}, got {public.size}"
        )
    rows = stratified_rows(source.train.labels, public.size, generator_for(seed, Purpose.SPLIT, 1))
    if source.vocabulary != private.vocabulary and source.kind == private.kind:
        raise ValueError(
            f"data.public.source must have texts of the {private.vocabulary} tokens of "
            f"data.source, got {source.vocabulary}"
        )
    labels, class_names = source.train.labels[rows], private.class_names
    if public.labelled:
        numbers, class_names = numbered(
            source.class_names, private.class_names, apart=public.classes == "apart"
        )
        labels = numbers[labels]
    notes = tuple(_renamed(note) for note in source.notes)
    return PublicRows(rows, labels, class_names, partial(_read, source), source.kind, notes)


def _read(source: Source, rows: np.ndarray) -> Float32[np.ndarray, "rows *shape"]:
    try:
        return source.train.read(rows)
    except ValueError as error:
        named = _renamed(str(error))
        raise ValueError(
            named if named.startswith("data.") else f"data.public.source: {named}"
        ) from error


def _renamed(text: str) -> str:
    """Let a sentence on a source speak of ``data.public.source``."""
    for name in ("source", "config", *COLUMNS):
        text = text.replace(f"data.{name}", f"data.public.{name}")
    return text


def numbered(
    public: Sequence[str], private: Sequence[str], *, apart: bool
) -> tuple[Int64[np.ndarray, "public_classes"], tuple[str, ...]]:
    """Give the classes of public rows numbers among those of private rows, or behind them.

    Args:
        public: names of the classes of the public source.
        private: those of the private source, whose numbers stay what they are.
        apart: take classes of equal names for different ones, as where both are mere numbers.

    Returns:
        For each public class its number, and the names of all classes by number.
    """
    names = [f"public {name}" for name in public] if apart else list(public)
    together = [*private, *(name for name in names if name not in set(private))]
    place = {name: number for number, name in enumerate(together)}
    return np.array([place[name] for name in names], dtype=np.int64), tuple(together)


def matched(
    pixels: Pixels, *, channels: int, size: tuple[int, ...]
) -> Float32[np.ndarray, "rows channels height width"]:
    """Bring pictures to a size, and to a number of channels.

    Height and width are resized as by ``data.resize`` (bilinear; pixels are averaged where a
    picture shrinks). Grey is repeated for each colour; colours become grey by their luma (ITU-R
    BT.601).
    """
    height, width = size
    pixels = resize_pixels(pixels, (height, width))
    if pixels.shape[1] == channels:
        return pixels
    if pixels.shape[1] == 1:
        return np.repeat(pixels, channels, axis=1)
    grey: np.ndarray = np.einsum("rchw,c->rhw", pixels, LUMA)[:, None]
    return grey


def check_apart(
    public: Float32[np.ndarray, "public_rows *shape"],
    others: Float32[np.ndarray, "rows *shape"],
    settings: DataSettings,
) -> None:
    """Refuse a source of public rows whose rows are the private or the test rows.

    Raises:
        ValueError: if more than `MOST_REPEATED` of the public rows have the very content of one.
    """
    known = {row.tobytes() for row in others}
    count = sum(row.tobytes() in known for row in public)
    if count > MOST_REPEATED * len(public):
        raise ValueError(
            f"data.public.source {settings.public.source!r}: {count} of {len(public)} public rows "
            f"have the very content of private, validation or test rows of data.source "
            f"{settings.source!r}: name another source, or leave it out to divide one source"
        )
