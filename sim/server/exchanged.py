"""What travelled in a round, as both sides see it: decoded, each distinct piece once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedkd.exchange.payload import Payload
from fedkd.exchange.values import Value
from fedkd.exchange.views import Upload


@dataclass(frozen=True)
class Exchanged(Value):
    """What travelled in one round.

    Attributes:
        round: 1-based.
        pieces: distinct payloads.
        up: which of them a client sent, as the server decoded it.
        down: which of them a client received, as it decoded it.
    """

    round: int
    pieces: tuple[Payload, ...]
    up: Mapping[int, int]
    down: Mapping[int, int]

    def sent(self, client: int) -> Payload | None:
        """Return what a client sent; None: nothing that could be used."""
        return self.pieces[self.up[client]] if client in self.up else None

    def received(self, client: int) -> Payload | None:
        """Return what a client received; None: nothing."""
        return self.pieces[self.down[client]] if client in self.down else None


class Noting:
    """Notes what travels in a round while it does.

    Args:
        round: 1-based.
    """

    def __init__(self, round: int) -> None:
        self._round = round
        self._pieces: list[Payload] = []
        self._places: dict[int, int] = {}
        self._up: dict[int, int] = {}
        self._down: dict[int, int] = {}

    def coming(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Pass answers on, and note them."""
        for upload in uploads:
            self._up[upload.client] = self._place(upload.payload)
            yield upload

    def going(self, client: int, payload: Payload) -> None:
        """Note what a client received; a second attempt takes the place of the first."""
        self._down[client] = self._place(payload)

    def exchanged(self) -> Exchanged:
        """Return what was noted."""
        return Exchanged(self._round, tuple(self._pieces), self._up, self._down)

    def _place(self, payload: Payload) -> int:
        # The pieces are held here, so that an id stays its own.
        if id(payload) not in self._places:
            self._places[id(payload)] = len(self._pieces)
            self._pieces.append(payload)
        return self._places[id(payload)]
