"""Texts: a column of text -> numbers of its characters, or counts of hashed n-grams.

Characters are those of the training split, in the order of their code points, from number 2 on;
`fedkd.inputs.PADDING` (0) fills a text up at its end, `fedkd.inputs.UNKNOWN` (1) stands for any
other character. A longer text loses its beginning.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64

from fedkd.data.memory import check_room
from fedkd.data.settings import TextSettings
from fedkd.inputs import PADDING, UNKNOWN
from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from fedkd.data.tables import Table

MOST_CHARACTERS = 4096
"""Different characters that get a number of their own: the most frequent ones."""

LONGEST = 256
"""Characters of a text that are kept where nobody says how many."""


@dataclass(frozen=True, slots=True)
class Characters:
    """Texts as numbers of their characters.

    Attributes:
        known: the characters that have numbers of their own, in the order of their code points.
        length: tokens of a text.
    """

    known: str
    length: int

    @property
    def vocabulary(self) -> int:
        """The characters, what fills texts up, and what stands for all others."""
        return len(self.known) + UNKNOWN + 1

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "rows length"]:
        """Return the numbers of the last ``length`` characters of each text."""
        check_room(
            (len(texts), self.length),
            f"{len(texts):,} texts of {self.length} tokens",
            remedy="a smaller data.text.length, or ",
        )
        kept = [text[-self.length :] for text in texts]
        codes, known = _code_points("".join(kept)), _code_points(self.known)
        places = np.searchsorted(known, codes).clip(max=max(len(known) - 1, 0))
        found = known[places] == codes if len(known) else np.zeros(len(codes), np.bool_)
        numbers = np.where(found, places + UNKNOWN + 1, UNKNOWN)
        lengths = np.array([len(text) for text in kept], np.int64)
        encoded = np.full((len(kept), self.length), PADDING, np.float32)
        encoded[np.arange(self.length) < lengths[:, None]] = numbers
        return encoded


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@dataclass(frozen=True, slots=True)
class HashedGrams:
    """Texts as counts of their n-grams, each counted in a place that its hash says.

    The hash is MurmurHash3 of 32 bits, whose sign is that of the count, so that what collides
    cancels out on average; the counts of a text are scaled to length 1.

    Attributes:
        unit: whether n-grams are of characters or of words.
        sizes: the smallest and the largest n.
        places: how many there are.

    Source:
        Weinberger et al., 2009, Feature Hashing. https://arxiv.org/abs/0902.2206
        By scikit-learn's ``HashingVectorizer``.
    """

    unit: str
    sizes: tuple[int, int]
    places: int

    @property
    def vocabulary(self) -> None:
        """N-grams become features, not tokens."""

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "rows places"]:
        """Return the counts of each text."""
        from sklearn.feature_extraction.text import HashingVectorizer

        check_room(
            (len(texts), self.places),
            f"{len(texts):,} texts of {self.places} features",
            remedy="a smaller data.text.features, or ",
        )
        vectorizer = HashingVectorizer(
            analyzer="char" if self.unit == "characters" else "word",
            ngram_range=self.sizes,
            n_features=self.places,
            lowercase=False,
            # Words are what stands between blanks.
            token_pattern=r"\S+",  # noqa: S106 (no password)
        )
        counts: np.ndarray = vectorizer.transform(texts).toarray().astype(np.float32)
        return counts


TextEncoder = Characters | HashedGrams
"""Turns texts into arrays; its vocabulary is None where they become features."""


def plan_texts(tables: "Sequence[Table]", column: str, settings: TextSettings) -> TextEncoder:
    """Find out how texts are to be encoded.

    Args:
        tables: the files of the training split: characters that only occur in others are unknown.
        column: of the texts.
        settings: how.

    Raises:
        ValueError: if a file has no such column.
    """
    return plan_encoder((part for table in tables for part in _pieces(table, column)), settings)


def plan_encoder(parts: Iterable[Sequence[str]], settings: TextSettings) -> TextEncoder:
    """Find out how texts are to be encoded.

    Args:
        parts: the texts of the training split; not looked at for n-grams.
        settings: how.
    """
    if settings.form != "characters":
        unit = settings.form.removesuffix("_ngrams") + "s"
        return HashedGrams(unit, settings.ngrams, settings.features)
    counts: Counter[str] = Counter()
    longest = 1
    for texts in parts:
        counts.update("".join(texts))
        longest = max(longest, max(map(len, texts), default=0))
    known = sorted(character for character, _ in counts.most_common(MOST_CHARACTERS))
    return Characters("".join(known), settings.length or min(longest, LONGEST))


def _pieces(table: "Table", column: str) -> Iterator[list[str]]:
    for _, piece in table.pieces(column, np.arange(table.num_rows)):
        yield [text for text in _plain(piece).to_pylist() if text is not None]


def _plain(piece: "pa.Array") -> "pa.Array":
    import pyarrow as pa

    return piece.cast(piece.type.value_type) if pa.types.is_dictionary(piece.type) else piece


def read_texts(
    tables: "Sequence[Table]",
    column: str,
    encoder: TextEncoder,
    rows: Int64[np.ndarray, "rows"],
) -> Float32[np.ndarray, "rows width"]:
    """Return the encoded texts of rows, which need not be sorted.

    Args:
        tables: the files of one split, in order, as if they were one table.
        column: of the texts.
        encoder: as it was planned.
        rows: their numbers.

    Raises:
        ValueError: if a cell is empty; names the file and the row.
    """
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    texts: list[str] = [""] * len(rows)
    start = 0
    for table in tables:
        first, last = np.searchsorted(sorted_rows, (start, start + table.num_rows))
        own, places = sorted_rows[first:last] - start, order[first:last]
        for offset, piece in table.pieces(column, own) if len(own) else ():
            begin, end = np.searchsorted(own, (offset, offset + len(piece)))
            cells = _plain(piece)
            for row, place in zip(own[begin:end], places[begin:end], strict=True):
                text = cells[int(row) - offset].as_py()
                if text is None:
                    raise ValueError(
                        f"{table.where(int(row))}, column {printable(column)!r}: there is no text: "
                        "fill it in or leave the row out"
                    )
                texts[place] = text
        start += table.num_rows
    return encoder.encode(texts)
