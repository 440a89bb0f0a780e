"""Federated Mutual Learning: a private model and a shared one learn from each other at home.

Source: Shen et al., 2020, Federated Mutual Learning. https://arxiv.org/abs/2006.16765
Each client has a private model of its own architecture, which never leaves it, and a copy of the
global model, called meme. In every step both learn from the same batch of private rows: from the
labels, and from the other's predictions. Only memes travel; the server averages them.

``objective`` and ``meme_objective`` hold the paper's losses, alpha * CE + (1 - alpha) * KL(meme ||
private) and beta * CE + (1 - beta) * KL(private || meme) at temperature 1, as weights; 0.5 for
each is what later comparisons use, while the authors' published code gives both terms weight 1.
As there, each model's predictions are constants for the other, both are updated from the same
forward pass, and a meme begins every round without momentum.
Differs from the paper: the objectives may hold any other term, layers included.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import Weighting
from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.training import Cohort
from strategies.contract import (
    Call,
    Card,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    StrategySettings,
    Upload,
)
from strategies.shared.means import mean_weights, received_weights
from strategies.two_models.pairs import HALF_AND_HALF, PRIVATE, Pair

MEME = "meme"
"""The model that travels."""


class FMLSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fml``.

    Attributes:
        meme: the model that all clients share; their private ones are ``clients.models``.
        objective: what a private model minimises on private rows; the client's meme is its
            teacher.
        meme_objective: what a meme minimises on the same rows; the client's private model is its
            teacher.
        weighting: ``equal`` counts every client's meme once, as the published code does;
            ``examples`` weights it by the client's private rows.
    """

    name: Literal["fml"] = "fml"
    meme: ModelSettings = ModelSettings(name="mlp")
    objective: Objective = Field(HALF_AND_HALF)
    meme_objective: Objective = Field(HALF_AND_HALF)
    weighting: Literal["equal", "examples"] = "equal"


@dataclass(frozen=True)
class Meme(Value):
    """What the server remembers.

    Attributes:
        model: the global meme.
    """

    model: ServerModel


class FML(Pair[FMLSettings, Meme]):
    """Memes down, mutual learning at home, memes up, mean of the memes."""

    card = Card(
        learns="a client's private model and its meme from each other; memes are averaged",
        up="P of the meme",
        down="P of the meme",
        equation=(
            "private: a CE + (1-a) KL(meme || private); meme: b CE + (1-b) KL(private || meme)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FMLSettings
    State: ClassVar[type[Value]] = Meme
    up = (Weights,)
    down = (Weights,)
    travels = MEME
    directions: ClassVar[Mapping[str, str]] = {
        PRIVATE: "from the meme",
        MEME: "from the private model",
    }

    @property
    def sums(self) -> Weighting:
        """The server needs the mean only."""
        return self.settings.weighting

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Take the global meme, learn with it and from it, and send what it has become."""
        if received:
            cohort.load_weights(received_weights(received), model=MEME)
        cohort.reset_optimizers(model=MEME)
        cohort.fit(self.mutual(call.progress), private=call.local)
        return [Weights(arrays=arrays) for arrays in cohort.weights(model=MEME)]

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The global meme."""
        return {MEME: ServerModelSettings(self.settings.meme)}

    def begin(self, server: ServerTools) -> Meme:
        """Let all memes start alike."""
        return Meme(server.new(MEME))

    def receives(self, state: Meme, client: int, round: Round) -> str:
        """The global meme, for everybody."""
        return MEME

    def payload(self, state: Meme, key: str) -> Weights:
        """The global meme."""
        return Weights(arrays=state.model.weights)

    def asks(self, state: Meme, client: int, round: Round, server: ServerTools) -> Asked:
        """A meme, whatever the client's own model is."""
        return server.asked_weights(self.settings.meme)

    def aggregate(
        self, state: Meme, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Meme:
        """Average the memes; without any the global one stays as it is."""
        means = mean_weights(uploads, self.settings.weighting)
        if not means:
            return state
        return Meme(server.with_weights(state.model, means[None].arrays))

    def judged_models(self, state: Meme) -> Mapping[str, ServerModel]:
        """The mean meme: the global model."""
        return {MEME: state.model}
