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

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.training import Architecture, Arrays, Cohort, ComposedObjective, Learner
from strategies.base import DistillationStrategy, Step, StrategySettings
from strategies.fedavg import WeightedMean
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Parameters
from strategies.memory import Memory
from strategies.plan import Federation, RoundPlan
from strategies.server import Server, ServerModel

PRIVATE, MEME = "private", "meme"
"""A client's models by name; the private one is judged."""

HALF_AND_HALF = Objective.model_validate(
    {"ce": 0.5, "kd": {"weight": 0.5, "temperature": 1.0}},
)


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


class FML(DistillationStrategy[FMLSettings]):
    """Memes down, mutual learning at home, memes up, mean of the memes."""

    Settings: ClassVar[type[StrategySettings]] = FMLSettings
    uploads = "parameters"

    def __init__(self, settings: FMLSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        self._meme: ServerModel | None = None

    def architecture(self, client: int) -> Architecture:
        """A private model and a meme."""
        return {PRIVATE: self.federation.models[client], MEME: self.settings.meme}

    @property
    def learns_alone(self) -> bool:
        """Whether a private model never learns from its meme; the meme may from it."""
        terms = self.settings.objective.terms.values()
        return all(self.federation.never(t.weight) for t in terms if t.needs != ("labels",))

    def composed(self) -> ComposedObjective:
        """Both models' objectives, each with the other model as its teacher."""
        return self._mutual(0.0)

    def _mutual(self, progress: float) -> ComposedObjective:
        settings, in_force = self.settings, self.federation.in_force
        return ComposedObjective(
            learners={
                PRIVATE: Learner(
                    objective=in_force(settings.objective),
                    teacher=MEME,
                    setting="strategy.objective",
                ),
                MEME: Learner(
                    objective=in_force(settings.meme_objective),
                    teacher=PRIVATE,
                    setting="strategy.meme_objective",
                ),
            },
            progress=progress,
        )

    def smallest_steps(self) -> Iterator[Step]:
        """A client's meme learns in every step, too."""
        yield from super().smallest_steps()
        for client in range(self.federation.num_clients):
            yield from self.private_steps("strategy.meme", self.settings.meme, client)

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Take the global meme, learn with it and from it, and send what it has become."""
        if isinstance(received, Parameters):
            cohort.load_weights(received.arrays, model=MEME)
        cohort.reset_optimizers(model=MEME)
        cohort.fit(self._mutual(plan.progress), private=plan.local)
        return [Parameters(arrays) for arrays in cohort.weights(model=MEME)]

    def prepare(self, server: Server) -> Broadcast:
        """Let all memes start alike."""
        self._meme = server.model(self.settings.meme)
        return Broadcast(Parameters(self._meme.weights()))

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Average the memes; without any the global one stays as it is."""
        mean, count = WeightedMean(), 0
        for upload in uploads:
            if not isinstance(upload.knowledge, Parameters):
                raise TypeError(f"expected parameters from client {upload.client}")
            weight = upload.num_examples if self.settings.weighting == "examples" else 1
            mean.add(upload.knowledge.arrays, weight)
            count += 1
        meme = self._global
        if count:
            meme.load_weights(mean.mean())
        return Broadcast(Parameters(meme.weights()))

    @property
    def _global(self) -> ServerModel:
        if self._meme is None:
            raise RuntimeError("the server half was not prepared")
        return self._meme

    def uploaded_weights(self, client: int, server: Server) -> Arrays:
        """A meme, whatever the client's own model is."""
        return self._global.weights()

    def server_model(self) -> ServerModel | None:
        """The mean meme: the global model."""
        return self._meme

    def memory(self) -> Memory:
        """Remember the global meme."""
        arrays = {} if self._meme is None else self._meme.to_arrays()
        return Memory(arrays, {"meme": self._meme is not None})

    def recall(self, memory: Memory, server: Server) -> None:
        """Take the global meme back."""
        self._meme = None
        if memory.values["meme"]:
            self._meme = server.model_from(self.settings.meme, memory.arrays)
