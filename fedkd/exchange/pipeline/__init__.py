"""The exchange: what happens to a payload between the client that makes it and the server.

Client: ``adversary`` -> ``release`` -> ``encode``. Server: ``decode`` -> ``check`` -> ``adversary``
(one whose clients know the others' answers; ``check`` of what it sends) -> ``view``, or
``release`` of the mean where the server is trusted -> aggregate -> ``encode``, and the client
decodes what comes down. `Stages` says which.

At a client, once a call::

    turn = ClientTurn(stages, seed=seed, rounds=rounds, round=round, attempt=attempt,
                      clients={client: Standing(arrays, since), ...})
    received = turn.open({client: payload or None, ...})    # by client; equal objects stay equal
    ...                                                     # the algorithm's client half
    sent = turn.send({client: honest answer, ...})          # what leaves
    arrays = turn.kept()                                    # by client, for its state; often {}

At the server, once a round, `ExchangeState` being part of the run's boundary::

    turn = ServerTurn(stages, before, seed=seed, rounds=rounds, round=round)
    outgoing = turn.send(client, key, make, asked=asked, attempt=attempt)   # .payload, .since
    payload = turn.receive(client, sent, asked)             # raises BadPayloadError
    lies = turn.lies({client: payload, ...})                # where turn.gathers(clients)
    turn.check_lie(lie, asked)                              # raises BadPayloadError
    uploads = turn.view(uploads, sums=sums, group=group)    # for the aggregator
    after = turn.committed()                                # or turn.skipped()

To judge clients a new `ServerTurn` of ``turn.committed()`` sends without asking (``asked=None``);
its ``skipped()`` is the state after that. A `ClientTurn` that judges opens and keeps nothing.

What a codec remembers stays in step because the server's word is final. The server's memory of a
client moves when an answer of that client was decoded, checked and its round is complete; with it
goes the number of the round, ``since``. The client keeps what it had before its last call beside
what it has after it, and goes on from the one whose round the server names. So an answer that got
lost, a second attempt, a round that is left out and a client that was away leave both at the same
memory, also where a client's state cannot be taken back. A client that lost its state encodes from
nothing, and says so; one that cannot decode raises `MemoryLostError`: then `ServerTurn.forget` it.
"""

from fedkd.exchange.pipeline.client import ClientTurn
from fedkd.exchange.pipeline.memory import PREFIX, ExchangeState, Remembered, Standing
from fedkd.exchange.pipeline.server import Outgoing, Planned, ServerTurn
from fedkd.exchange.pipeline.stages import Stages
from fedkd.exchange.pipeline.turns import BadPayloadError, MemoryLostError

__all__ = [
    "PREFIX",
    "BadPayloadError",
    "ClientTurn",
    "ExchangeState",
    "MemoryLostError",
    "Outgoing",
    "Planned",
    "Remembered",
    "ServerTurn",
    "Stages",
    "Standing",
]
