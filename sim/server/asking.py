"""Whether stages of the exchange can take what clients are to answer, before anybody answers."""

from typing import Any

from fedkd.data import FederatedData
from fedkd.exchange.codecs import Float32
from fedkd.exchange.pipeline import Stages
from fedkd.exchange.release import NoRelease
from fedkd.exchange.values import Value
from fedkd.exchange.views import All
from sim.engine.runtime import build_strategy, federation_of, server_tools
from sim.server.validation import authors_code
from sim.settings import Settings, SettingsError
from strategies.contract import ServerTools, Strategy

WHERE = "before round 1, the server's half"


def check_asked(
    stages: Stages, strategy: Strategy[Any, Any], state: Value, server: ServerTools
) -> None:
    """Refuse stages that cannot take what clients answer first: its parts are known by now.

    Args:
        stages: of the run.
        strategy: its algorithm.
        state: before the first round.
        server: of the algorithm.

    Raises:
        SettingsError: names the stage's setting.
    """
    if _take_anything(stages):
        return
    federation = strategy.federation
    round = federation.round(1)
    for client in federation.first_clients.values():
        with authors_code(WHERE):
            asked = strategy.asks(state, client, round, server)
        try:
            if asked is not None:
                stages.check_asked(asked)
        except ValueError as error:
            raise SettingsError(str(error)) from error


def check_first_answers(settings: Settings, data: FederatedData) -> None:
    """The same of a run that has not begun; nothing is made where its stages take anything.

    Raises:
        SettingsError: names the stage's setting.
        AuthorError: an algorithm's own code is wrong.
    """
    if _take_anything(settings.stages):
        return
    strategy = build_strategy(settings, federation_of(settings, data))
    server = server_tools(settings, strategy, data)
    with authors_code(WHERE):
        state = strategy.begin(server)
    check_asked(settings.stages, strategy, state, server)


def _take_anything(stages: Stages) -> bool:
    plain = isinstance(stages.up, Float32) and isinstance(stages.view, All)
    return plain and isinstance(stages.release, NoRelease) and not stages.adversary.lies
