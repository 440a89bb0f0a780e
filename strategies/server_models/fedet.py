"""Fed-ET: small clients of any architecture teach one large server model, and share its last layer.

Source: Cho, Manoel, Joshi, Sim, Dimitriadis, 2022, Heterogeneous Ensemble Knowledge Transfer for
Training Large Models in Federated Learning. https://arxiv.org/abs/2204.12703
On unlabelled public rows clients' logits are averaged, each by its variance over the classes; the
class that wins is the label that the server learns. Those who say otherwise are averaged by the
same rule, and the server is drawn a little to what they say, too.

Differs from the port: where nobody disagrees it draws the server to the uniform distribution; here
that term is 0. Clients whose last layer has another shape than the server's keep their own. (The
rule is that of an independent port: the paper was not read, and its authors published no code.)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.bounds import Count, Weight
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import RunningMean
from fedkd.inputs import Shape
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives.taps import head_layer
from fedkd.targets import PredictionSpool, mean_by_row, soften
from fedkd.training import (
    Arrays,
    Batch,
    Cohort,
    Losses,
    OptimizerSettings,
    Outputs,
    Passes,
    PublicLesson,
    Table,
    supervised,
)
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import (
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.robust import CheckedSettings, kept_places

SERVER = "server"
"""The name of the server's model."""

CONSENSUS, DISSENT = "consensus", "dissent"
"""What the server's objective calls the logits of all clients, and of those who say otherwise."""


class FedETSettings(AveragingSettings, CheckedSettings):
    """Settings under ``strategy:`` when ``name: fedet``.

    Attributes:
        model: the server's; the paper's is much larger than those of the clients.
        share_head: whether the server's model begins a round with the mean of the clients' last
            layers, and clients begin theirs with what became of it. Architectures whose last layer
            has another shape than the server's keep their own.
        diversity_weight: weight of what those say who disagree with the consensus, lambda in the
            paper.
        optimizer: of the server's model; it begins every round without memory.
        server_steps: steps that it takes in a round.
    """

    name: Literal["fedet"] = "fedet"
    model: ModelSettings = ModelSettings(name="cnn")
    share_head: bool = True
    diversity_weight: Weight = 0.05
    optimizer: OptimizerSettings = OptimizerSettings(name="adam", lr=1e-3)
    server_steps: Count = 128


@dataclass(frozen=True)
class Transfer(GlobalModels):
    """What the server remembers: the averages of the architectures, and its own model.

    Attributes:
        server: the model; None in no state that a run has.
    """

    server: ServerModel | None = None


# -- arithmetic ----------------------------------------------------------------------------------


def shares_by_variance(
    logits: Float[Tensor, "clients rows classes"],
) -> Float[Tensor, "clients rows"]:
    """Return how much each client counts in each row: its variance over the classes.

    Only their ratios within a row count. Clients that all tell no class from another count alike.
    """
    variance = logits.double().var(-1, correction=0)
    return torch.where((variance > 0).any(0), variance, 1.0)


def consensus_of(logits: Float[Tensor, "clients rows classes"]) -> Float[Tensor, "rows classes"]:
    """Return the mean logits by `shares_by_variance`."""
    return mean_by_row(logits, shares_by_variance(logits))


def dissent_of(logits: Float[Tensor, "clients rows classes"]) -> Float[Tensor, "rows classes"]:
    """Return the mean logits of the clients whose class is not that of `consensus_of`.

    A row of NaN where nobody disagrees: 0 would be a distribution, the uniform one.
    """
    others = logits.argmax(-1) != consensus_of(logits).argmax(-1)
    shares = shares_by_variance(logits) * others
    mean = mean_by_row(logits, shares)
    return torch.where((shares > 0).any(0)[:, None], mean, torch.nan)


def diverse_losses(
    logits: Float[Tensor, "rows classes"],
    consensus: Float[Tensor, "rows classes"],
    dissent: Float[Tensor, "rows classes"],
    *,
    diversity_weight: float,
    uniform_pull: bool = False,
) -> Losses:
    """Learn the class of the consensus, and a little of those who disagree, where anybody does.

    With ``uniform_pull`` where nobody does, too: what is not there says that all are as likely.
    """
    known = ~dissent.isnan().any(-1)
    said = soften(torch.where(known[:, None], dissent, 0.0), temperature=1.0)
    counted = torch.ones_like(known) if uniform_pull else known
    divergence = counted * soft_target_rows(logits, said, temperature=1.0)
    return {
        "consensus": PerRow(hard_label_rows(logits, consensus.argmax(-1)), of="public"),
        "diversity": diversity_weight * PerRow(divergence, of="public"),
    }


@lru_cache(maxsize=256)
def head_arrays(
    model: ModelSettings, input_shape: Shape, num_classes: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the arrays of a model's last layer: of ``weight`` and ``bias`` the name and shape.

    Empty where the model does not end in a linear layer.
    """
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    try:
        path = head_layer(module, torch.zeros(2, *input_shape), whose=model.label)
    except ValueError:
        return {}
    arrays = module.get_submodule(path).state_dict()
    return {part: (f"{path}.{part}", tuple(array.shape)) for part, array in arrays.items()}


FAULTS = {
    "uniform_pull": Fault(
        does="draws the server to the uniform distribution in rows that nobody disagrees about",
        read_in="an independent port of Fed-ET: s_div of 0 goes through a softmax",
        right="such rows have no second term",
        shows_with=("clients.models=[mlp]", "strategy.model=mlp"),
    ),
}


class FedET(Averaging[FedETSettings, Transfer]):
    """Weights up, a server model taught by all of them, averages with its last layer down."""

    card = Card(
        learns="the server from all clients' models; clients from their mean and its last layer",
        up="P",
        down="P",
        equation=(
            "s = sum_k a_k z_k, a_k = Var_c z_k / sum_l Var_c z_l; server CE(z, argmax s) + lambda "
            "KL(the same mean over those with another argmax || server); clients CE"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FedETSettings
    State: ClassVar[type[Value]] = Transfer
    needs_public = True
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def sums(self) -> None:
        """The server looks at each model."""
        return

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows."""
        cohort.fit(supervised, private=call.local)

    # -- server half ---------------------------------------------------------------------

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model."""
        return {SERVER: ServerModelSettings(self.settings.model, self.settings.optimizer)}

    def judged_models(self, state: Transfer) -> Mapping[str, ServerModel]:
        """The server's model."""
        return {SERVER: _model_of(state)}

    def begin(self, server: ServerTools) -> Transfer:
        """First weights of each architecture and of the server's model."""
        return Transfer(super().begin(server).models, server.new(SERVER))

    def aggregate(
        self, state: Transfer, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Transfer:
        """Average each architecture, let all clients teach the server, and share its last layer."""
        averages: dict[str, RunningMean[Weights]] = {}
        head = RunningMean[Weights]()
        with PredictionSpool() as spool:
            for upload, sent in payloads_of(uploads, Weights):
                model, weight = (
                    self.federation.models[upload.client],
                    upload.weight(self.settings.weighting),
                )
                logits = server.predict_with(model, sent.arrays, round.public_rows)
                # Huge weights are numbers, and what they make of a picture need not be one.
                if not np.isfinite(logits).all():
                    continue
                averages.setdefault(model.key, RunningMean()).add(sent, weight)
                spool.add(logits)
                names = self._shared(model)
                if names:
                    last = {part: sent.arrays[name] for part, name in names.items()}
                    head.add(Weights(arrays=last), weight)
            if not spool.count:
                return state
            kept = kept_places(self.settings, spool, range(spool.count))
            tables = {
                CONSENSUS: Table(spool.reduce(consensus_of, only=kept).numpy(), of="public"),
                DISSENT: Table(spool.reduce(dissent_of, only=kept).numpy(), of="public"),
            }
        own = self._shared(self.settings.model)
        shared = head.mean().arrays if head.weight else {}
        begun = {own[part]: array for part, array in shared.items()}
        taught = self._taught({**_model_of(state).weights, **begun}, tables, round, server)
        learnt = {part: taught.weights[name] for part, name in own.items()}
        means = {key: mean.mean() for key, mean in averages.items()}
        models = {
            key: Weights(arrays={**weights.arrays, **self._renamed(learnt, key)})
            for key, weights in {**state.models, **means}.items()
        }
        return Transfer(models, taught)

    def _taught(
        self, start: Arrays, tables: Mapping[str, Table], round: Round, server: ServerTools
    ) -> ServerModel:
        """Return the server's model after it has learnt from the clients'."""
        passes = Passes(batch_size=round.local.batch_size, steps=self.settings.server_steps)
        lesson = PublicLesson(rows=round.public_rows, targets=None, passes=passes)
        learn = partial(
            _learn,
            diversity_weight=self.settings.diversity_weight,
            uniform_pull=self.commits("uniform_pull"),
        )
        student = server.new(SERVER, start)
        return server.fit(student, learn, round=round, public=lesson, tables=tables).model

    def _shared(self, model: ModelSettings) -> dict[str, str]:
        """Return the names of a model's last layer by its parts; empty where it is its own."""
        federation = self.federation
        own, theirs = (
            head_arrays(each, federation.input_shape, federation.num_classes)
            for each in (model, self.settings.model)
        )
        fits = {part: shape for part, (_, shape) in own.items()} == {
            part: shape for part, (_, shape) in theirs.items()
        }
        if not (self.settings.share_head and fits):
            return {}
        return {part: name for part, (name, _) in own.items()}

    def _renamed(self, head: Mapping[str, np.ndarray], architecture: str) -> Arrays:
        """Return the server's last layer as an architecture calls it; nothing if it has its own."""
        model = self.federation.models[self.federation.first_clients[architecture]]
        return {name: head[part] for part, name in self._shared(model).items()}

    def smallest_steps(self) -> Iterator[Step]:
        """The server learns from public rows alone."""
        yield from super().smallest_steps()
        rows = self.federation.rows_per_round
        yield from self.public_steps("strategy.model", self.settings.model, rows)


def _learn(
    outputs: Outputs, batch: Batch, *, diversity_weight: float, uniform_pull: bool = False
) -> Losses:
    assert outputs.public is not None  # noqa: S101
    tables: Mapping[str, Any] = batch.tables
    return diverse_losses(
        outputs.public,
        tables[CONSENSUS],
        tables[DISSENT],
        diversity_weight=diversity_weight,
        uniform_pull=uniform_pull,
    )


def _model_of(state: Transfer) -> ServerModel:
    assert state.server is not None  # noqa: S101 (`begin` makes one)
    return state.server
