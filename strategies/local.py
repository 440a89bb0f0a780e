"""Local: every client learns alone. The baseline that an exchange has to beat."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from fedkd.training import Cohort, supervised
from strategies.base import DistillationStrategy, StrategySettings
from strategies.knowledge import Broadcast, ClientUpload, Knowledge
from strategies.plan import RoundPlan
from strategies.server import Server


class LocalSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: local``: none."""

    name: Literal["local"] = "local"


class Local(DistillationStrategy[LocalSettings]):
    """Train on private rows; send nothing, receive nothing."""

    Settings: ClassVar[type[StrategySettings]] = LocalSettings

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """One round of private training."""
        cohort.fit(supervised, private=plan.local)
        return ()

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Nothing arrives, nothing goes out."""
        return Broadcast()
