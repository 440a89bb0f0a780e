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
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import Weighting
from fedkd.inputs import Shape
from fedkd.losses.response import hard_label_rows
from fedkd.losses.rows import t2_factor
from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.objectives.basic import HardLabels, SoftTargets
from fedkd.training import Batch, Cohort, ComposedObjective, Losses, Outputs, PerRow
from strategies.contract import (
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    StrategySettings,
    Upload,
)
from strategies.shared.as_published import kl_of_both, over_classes, with_old_buffers
from strategies.shared.means import mean_weights, received_weights
from strategies.two_models.pairs import AS_IN_LOCAL, HALF_AND_HALF, PRIVATE, Pair, each_other

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


FAULTS = {
    "kl_mean": Fault(
        does="divides both divergences by the number of classes as well as by the rows",
        read_in="TsingZ0/HtFLlib and PFLlib, clients/clientfml.py: nn.KLDivLoss()",
        right="the mean over rows of the sum over classes",
    ),
    "no_detach": Fault(
        does="lets each model receive the gradient of the other's loss as well",
        read_in="TsingZ0/HtFLlib and PFLlib, clients/clientfml.py: backward(retain_graph=True)",
        right="each model's predictions are constants for the other",
    ),
    "no_kl": Fault(
        does="gives the divergence a weight of 0, which alpha and beta of 1 by default come to",
        read_in="TsingZ0/HtFLlib, main.py: defaults of --alpha and --beta",
        right="half of each loss is the divergence",
    ),
    "buffers_accumulate": Fault(
        does="adds the memes' BatchNorm statistics to the old ones before it divides by N",
        read_in="ZJU-DAI/Federated-Mutual-Learning b547bbf, Node.py: Global_Node.merge",
        right="statistics are averaged as parameters are",
        shows_with=("strategy.meme={name: cnn, options: {norm: batch}}",),
    ),
    "nothing_exchanged": Fault(
        does="exchanges nothing: what hands out and averages the memes is commented out",
        read_in="ZJU-DAI/Federated-Mutual-Learning b547bbf, main.py",
        right="the mean meme comes down, what it has become goes up",
    ),
}


def undetached(
    outputs: Mapping[str, Outputs],
    batch: Batch,
    *,
    objectives: Mapping[str, Objective],
    progress: float,
) -> Losses:
    """Return both models' losses as the fault ``no_detach`` has them: no constants among them."""
    assert batch.labels is not None  # noqa: S101
    losses: dict[str, PerRow] = {}
    for name, other in ((PRIVATE, MEME), (MEME, PRIVATE)):
        own, theirs = outputs[name].private, outputs[other].private
        assert own is not None and theirs is not None  # noqa: S101, PT018
        for called, term in objectives[name].terms.items():
            if isinstance(term, SoftTargets):
                softer = term.temperature.at(progress)
                rows = t2_factor(softer, term.scale_by_t2) * kl_of_both(
                    own / softer, theirs / softer
                )
            else:
                rows = hard_label_rows(own, batch.labels)
            told = called if name == PRIVATE else f"{name}/{called}"
            losses[told] = term.weight.at(progress) * PerRow(rows, of="private")
    return losses


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

    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def sums(self) -> Weighting | None:
        """The server needs the mean only."""
        return None if self.commits("buffers_accumulate") else self.settings.weighting

    def check(self, input_shape: Shape) -> None:
        """Refuse objectives that the fault ``no_detach`` is not known for."""
        super().check(input_shape)
        if not self.commits("no_detach"):
            return
        for setting, objective in zip(
            ("objective", "meme_objective"), self._objectives.values(), strict=True
        ):
            odd = [
                name
                for name, term in objective.terms.items()
                if not isinstance(term, HardLabels | SoftTargets)
            ]
            if odd:
                raise ValueError(
                    f"strategy.as_published no_detach of fml is known for the terms ce and kd, "
                    f"got strategy.{setting} with {odd[0]}"
                )

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Take the global meme, learn with it and from it, and send what it has become."""
        if received:
            cohort.load_weights(received_weights(received), model=MEME)
        cohort.reset_optimizers(model=MEME)
        if self.commits("no_detach"):
            objectives = self._in_force(call.progress)
            learn = partial(undetached, objectives=objectives, progress=call.progress)
            cohort.fit(learn, private=call.local, models=[PRIVATE, MEME])
        else:
            cohort.fit(self.mutual(call.progress), private=call.local)
        if self.commits("nothing_exchanged"):
            return ()
        return [Weights(arrays=arrays) for arrays in cohort.weights(model=MEME)]

    def mutual(self, progress: float) -> ComposedObjective:
        """Both models' objectives at a moment of the run."""
        return each_other(self._in_force(progress), federation=self.federation, progress=progress)

    def _in_force(self, progress: float) -> dict[str, Objective]:
        """Return both objectives, with the weights of a fault where one is asked for."""
        if not self.commits("kl_mean"):
            return self._objectives
        classes = self.federation.num_classes
        return {
            name: over_classes(objective, classes, progress)
            for name, objective in self._objectives.items()
        }

    @property
    def _objectives(self) -> dict[str, Objective]:
        objectives = super()._objectives
        return dict.fromkeys(objectives, AS_IN_LOCAL) if self.commits("no_kl") else objectives

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The global meme."""
        return {MEME: ServerModelSettings(self.settings.meme)}

    def begin(self, server: ServerTools) -> Meme:
        """Let all memes start alike."""
        return Meme(server.new(MEME))

    def receives(self, state: Meme, client: int, round: Round) -> str | None:
        """The global meme, for everybody."""
        return None if self.commits("nothing_exchanged") else MEME

    def payload(self, state: Meme, key: str) -> Weights:
        """The global meme."""
        return Weights(arrays=state.model.weights)

    def asks(self, state: Meme, client: int, round: Round, server: ServerTools) -> Asked | None:
        """A meme, whatever the client's own model is."""
        if self.commits("nothing_exchanged"):
            return None
        return server.asked_weights(self.settings.meme)

    def aggregate(
        self, state: Meme, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Meme:
        """Average the memes; without any the global one stays as it is."""
        if self.commits("buffers_accumulate"):
            uploads = list(uploads)
        means = mean_weights(uploads, self.settings.weighting)
        if not means:
            return state
        mean = means[None].arrays
        if self.commits("buffers_accumulate"):
            mean = with_old_buffers(state.model.weights, mean, memes=len(list(uploads)))
        return Meme(server.with_weights(state.model, mean))

    def judged_models(self, state: Meme) -> Mapping[str, ServerModel]:
        """The mean meme: the global model."""
        return {MEME: state.model}
