"""Local: every client learns alone. The baseline that an exchange has to beat."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from fedkd.exchange.payload import Payload
from fedkd.training import Cohort, supervised
from strategies.contract import (
    Call,
    Card,
    Nothing,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
)


class LocalSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: local``: none."""

    name: Literal["local"] = "local"


class Local(Strategy[LocalSettings, Nothing]):
    """Train on private rows; send nothing, receive nothing."""

    card = Card(
        learns="nobody",
        up="nothing",
        down="nothing",
        equation="CE on private rows",
    )
    Settings: ClassVar[type[StrategySettings]] = LocalSettings
    takes_views = True

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """One round of private training."""
        cohort.fit(supervised, private=call.local)
        return ()

    def aggregate(
        self, state: Nothing, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Nothing:
        """Nothing arrives, nothing goes out."""
        return state
