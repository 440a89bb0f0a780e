"""The rows of a distillation: what the student may see the labels of, and what it may not."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.data import DataSettings, build_federated_data
from fedkd.data.federated import FederatedData
from fedkd.data.reading import AS_IT_IS, Reading
from fedkd.inputs import InputShape, per_channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Everything that teacher and student learn from and are measured on, on one device.

    A row's id is its position in ``inputs``; whatever is stored about a row is stored under it.

    Attributes:
        inputs: the transfer rows: labelled ones first, then those without labels.
        labels: classes of all transfer rows. Only the first ``labelled`` are the student's to
            see; a teacher that was trained elsewhere may know them all.
        labelled: how many rows have labels for the student.
        validation_inputs, validation_labels: decide when to stop and which setting is best.
        test_inputs, test_labels: read when a finished model is measured, never before.
        num_classes: width of the logits.
        class_names: their names.
        mean, std: of each channel or feature; ``inputs * std + mean`` are pixels in [0, 1], or
            features as they were. 0 and 1 for texts.
        vocabulary: tokens of texts; None for all other inputs.
        reading: how rows of tables became inputs.
    """

    inputs: Float[Tensor, "rows *shape"]
    labels: Int[Tensor, " rows"]
    labelled: int
    validation_inputs: Float[Tensor, "validation *shape"]
    validation_labels: Int[Tensor, " validation"]
    test_inputs: Float[Tensor, "test *shape"]
    test_labels: Int[Tensor, " test"]
    num_classes: int
    class_names: tuple[str, ...]
    mean: Float[Tensor, "channels *ones"]
    std: Float[Tensor, "channels *ones"]
    vocabulary: int | None = None
    reading: Reading = AS_IT_IS

    @property
    def input_shape(self) -> InputShape:
        """Shape of one row."""
        return InputShape(tuple(self.inputs.shape[1:]), self.vocabulary)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.inputs.device

    def all_labelled(self) -> "Rows":
        """Return the same where every row has a label, as for a teacher trained elsewhere."""
        return replace(self, labelled=len(self.inputs))

    def only_labelled(self) -> "Rows":
        """Return the same without the rows that have no labels for the student."""
        return replace(
            self, inputs=self.inputs[: self.labelled], labels=self.labels[: self.labelled]
        )


def load_rows(settings: DataSettings, *, seed: int, device: torch.device) -> Rows:
    """Load and split a source: ``data.private_rows`` have labels, ``data.public.size`` have none.

    Raises:
        ValueError: if the source cannot be read or has too few rows; names the setting.
    """
    # The labels of the public rows are loaded for the teacher; the student's code never sees
    # them, because it only gets the first rows' labels.
    public = settings.public.model_copy(update={"labelled": True})
    data = build_federated_data(
        settings.model_copy(update={"public": public}), num_clients=1, seed=seed
    )
    rows = rows_of(data, device)
    if settings.private_rows is not None and rows.labelled < settings.private_rows:
        raise ValueError(
            f"data.private_rows must be at most {rows.labelled}, got {settings.private_rows}: "
            f"data.source {settings.source!r} has no more rows beside {settings.public.size} "
            "public ones, the validation rows and the test rows"
        )
    return rows


def rows_of(data: FederatedData, device: torch.device) -> Rows:
    """Put the rows of one client and the public rows side by side."""
    own = data.client_rows[0]
    inputs, labels = [data.train_inputs[own]], [data.train_labels[own]]
    if data.public_labels is not None:
        inputs.append(data.public_inputs)
        labels.append(data.public_labels)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Rows(
        inputs=tensor(np.concatenate(inputs)),
        labels=tensor(np.concatenate(labels)),
        labelled=len(own),
        validation_inputs=tensor(data.validation_inputs),
        validation_labels=tensor(data.validation_labels),
        test_inputs=tensor(data.test_inputs),
        test_labels=tensor(data.test_labels),
        num_classes=data.num_classes,
        class_names=data.class_names,
        mean=per_channel(tensor(data.channel_mean), len(data.input_shape)),
        std=per_channel(tensor(data.channel_std), len(data.input_shape)),
        vocabulary=data.vocabulary,
        reading=data.reading,
    )
