"""What to type where a source has too few rows for what is asked of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from fedkd.data.settings import DataSettings
from fedkd.inputs import Kind

NO_WORDS: Mapping[str, str] = MappingProxyType({})


class FewRowsError(ValueError):
    """A source has too few rows for what is asked of it.

    Attributes:
        problem: what is wrong, without what would work.
        words: settings under which the rows are enough, by name; none where that was not looked
            for, or not found.
        kind: what the source's inputs are; ``None`` where that is not known.
    """

    def __init__(
        self, problem: str, words: Mapping[str, str] = NO_WORDS, kind: Kind | None = None
    ) -> None:
        typed = " ".join(f"{name}={value}" for name, value in words.items())
        super().__init__(f"{problem}; add to what you typed: {typed}" if words else problem)
        self.problem = problem
        self.words = words
        self.kind = kind


def words_that_fit(
    settings: DataSettings,
    *,
    num_clients: int,
    sizes: Sequence[int],
    works: Callable[[DataSettings, int], bool],
) -> dict[str, str]:
    """Look for a size of the public set and a number of clients that a source is large enough for.

    Args:
        settings: the table ``data``.
        num_clients: that are asked for; of a size as many as work are taken.
        sizes: of the public set, the one liked best first.
        works: tells for settings and a number of clients whether the rows can be dealt.

    Returns:
        Those of the two settings that have to change; nothing where no try works.
    """
    asked = {"data.public.size": str(settings.public.size), "clients.count": str(num_clients)}
    for size in sizes:
        for clients in _fewer(num_clients):
            public = settings.public.model_copy(update={"size": size})
            if works(settings.model_copy(update={"public": public}), clients):
                words = {"data.public.size": str(size), "clients.count": str(clients)}
                return {name: word for name, word in words.items() if word != asked[name]}
    return {}


def _fewer(clients: int) -> Iterator[int]:
    """Yield a number of clients and smaller ones: few tries, since each deals all rows anew."""
    while clients >= 2:
        yield clients
        clients = clients // 2 if clients > 20 else min(clients - 1, clients * 3 // 4)


def public_sizes(asked: int, rows: int) -> list[int]:
    """Return sizes of the public set to try: what is asked for, a third and a tenth of the rows.

    What is asked for is left out where it is more than half of the rows: few would be private.

    Args:
        asked: the setting.
        rows: that are not for testing.
    """
    smaller = [_round(rows // share) for share in (3, 10)]
    kept = [asked] if 2 * asked <= rows else []
    return [*kept, *(size for size in smaller if 0 < size < asked)]


def _round(size: int) -> int:
    # Easier to type, and nobody needs 157 rows and not 150.
    return size if size < 20 else size // 10 * 10
