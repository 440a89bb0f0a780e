"""What travelled in a round, as both sides see it: decoded, each distinct piece once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
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
        return self._said(self.up, client)

    def received(self, client: int) -> Payload | None:
        """Return what a client received; None: nothing."""
        return self._said(self.down, client)

    def _said(self, places: Mapping[int, int], client: int) -> Payload | None:
        piece = self.pieces[places[client]] if client in places else None
        # Who has nothing new to say of any row sends predictions of none.
        return None if isinstance(piece, Predictions) and not len(piece.rows) else piece


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
            self.came(upload.client, upload.payload)
            yield upload

    def came(self, client: int, payload: Payload) -> None:
        """Note what a client sent."""
        self._up[client] = self._place(payload)

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
