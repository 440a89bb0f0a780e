"""Objectives: what one client minimises in one step, as pure functions of outputs and batch.

An objective is written for a single client and knows nothing of cohorts, devices or rounds;
whoever trains (a loop, or a vectorised cohort) applies it and takes the means. It returns named
losses, already weighted, whose sum is minimised; the names appear in the metrics.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.reduction import Loss, PerRow, RowKind
from fedkd.losses.response import hard_label_loss, hard_label_rows, soft_target_rows
from fedkd.objectives import Parts
from fedkd.objectives.view import NO_FEATURES
from fedkd.targets import Targets


def _no_part(name: str, *_: Tensor) -> Tensor:
    raise ValueError(f"no part {name!r} is trained here: name it in fit(..., parts={{...}})")


def _no_head(_: Tensor) -> Tensor:
    raise ValueError(
        "outputs.head needs fit(..., heads=True), and is of a model that learns in the fit"
    )


NO_PARTS = Parts(_no_part)


class Batch(NamedTuple):
    """What a step knows besides the model's outputs.

    Attributes:
        labels: classes of the private rows, or None in a step without private rows.
        targets: what to learn about the public rows; asked for logits, or for probabilities at a
            temperature. None in a step without.
        public_labels: classes of the public rows where the public set is labelled, or None.
        private_rows: ids of the private rows: where they are among all clients' training rows.
        public_rows: ids of the public rows: their positions in the public set.
        tables: what was handed to the fit beside its rows, by name; see `Table`.
        parts: what is trained beside the models: ``parts.call(name, *inputs)`` runs one.
    """

    labels: Int[Tensor, " private"] | None = None
    targets: Targets | None = None
    public_labels: Int[Tensor, " public"] | None = None
    private_rows: Int[Tensor, " private"] | None = None
    public_rows: Int[Tensor, " public"] | None = None
    tables: Mapping[str, Tensor] = NO_FEATURES
    parts: Parts = NO_PARTS


class Outputs(NamedTuple):
    """What a model says about the rows of a step.

    Attributes:
        private: its logits for the private rows, None in a step without any.
        public: the same for the public rows.
        features: what its tapped layers put out, by layer, for all rows, private ones first.
        head: makes logits ``[any, classes]`` of embeddings ``[any, width]`` that are given, by the
            model's last linear layer as it is in this step; its weights learn from them. There in
            a fit with ``heads``, for models that learn.
    """

    private: Float[Tensor, "private classes"] | None = None
    public: Float[Tensor, "public classes"] | None = None
    features: Mapping[str, Tensor] = NO_FEATURES
    head: Callable[[Tensor], Tensor] = _no_head

    @classmethod
    def split(
        cls,
        logits: Float[Tensor, "rows classes"],
        num_private: int,
        features: Mapping[str, Tensor],
    ) -> "Outputs":
        """Tell the private rows, which come first, from the public ones."""
        return cls(
            private=logits[:num_private] if num_private else None,
            public=logits[num_private:] if num_private < len(logits) else None,
            features=features,
        )

    def beside_public(self, whole: "Outputs", num_private: int) -> "Outputs":
        """Return these private rows beside the public ones of a whole step, as constants.

        Args:
            whole: what the same model put out for the step.
            num_private: how many private rows the step has.
        """
        features = {
            name: torch.cat([own, whole.features[name][num_private:].detach()])
            for name, own in self.features.items()
        }
        public = None if whole.public is None else whole.public.detach()
        return Outputs(self.private, public, features, self.head)

    def with_first(self, num_private: int) -> "Outputs":
        """Return the first private row beside the public ones.

        Args:
            num_private: how many private rows the step has.
        """
        features = {
            name: torch.cat([each[:1], each[num_private:]]) for name, each in self.features.items()
        }
        private = None if self.private is None else self.private[:1]
        return self._replace(private=private, features=features)

    @classmethod
    def of_passes(
        cls,
        private: tuple[Float[Tensor, "private classes"], Mapping[str, Tensor]],
        public: tuple[Float[Tensor, "public classes"], Mapping[str, Tensor]],
    ) -> "Outputs":
        """Join two forward passes: the logits of each, and what the tapped layers put out."""
        features = {
            name: torch.cat([tensor, public[1][name]]) for name, tensor in private[1].items()
        }
        return cls(private=private[0], public=public[0], features=features)


Losses = Mapping[str, Loss]
"""Named losses, already weighted: of each row, or of the step as a whole."""

ObjectiveFunction = Callable[[Outputs, Batch], Losses]
"""What a client minimises, from a model's outputs and the step's rows."""
JointObjective = Callable[[Mapping[str, Outputs], Batch], Losses]
"""What a client minimises that trains several models in one step: outputs by model name."""


def supervised(outputs: Outputs, batch: Batch, *, weight: float = 1.0) -> Losses:
    """``weight`` times the cross-entropy on the client's own labelled rows."""
    if outputs.private is None or batch.labels is None:
        raise ValueError("supervised learning needs private rows with labels")
    return {"ce": weight * _cross_entropy(outputs.private, batch.labels, "private")}


def supervised_public(outputs: Outputs, batch: Batch) -> Losses:
    """Cross-entropy on a labelled public set."""
    if outputs.public is None or batch.public_labels is None:
        raise ValueError("supervised learning on public rows needs data.public.labelled: true")
    return {"ce_public": _cross_entropy(outputs.public, batch.public_labels, "public")}


def _cross_entropy(
    logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], of: RowKind
) -> PerRow:
    rows, mean = partial(hard_label_rows, logits, labels), partial(hard_label_loss, logits, labels)
    return PerRow(rows, of=of, mean=mean)


def towards_targets(outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Losses:
    """``temperature**2 * KL(targets || model)`` on public rows, in nats."""
    if outputs.public is None or batch.targets is None:
        raise ValueError("learning from targets needs public rows with targets")
    target = batch.targets.probabilities(temperature)
    rows = soft_target_rows(outputs.public, target, temperature=temperature)
    return {"kd": temperature**2 * PerRow(rows, of="public")}
