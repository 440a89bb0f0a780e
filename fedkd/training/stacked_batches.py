"""The batches of stacked members: padded to one width, with rows that count for nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkd.losses.reduction import RowKind, StepRows
from fedkd.models.dropout import step_keys
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training.cohort import TrainingData
from fedkd.training.common import Fit, blanked
from fedkd.training.feeds import Feed
from fedkd.training.objectives import Batch


class _Padded:
    """One kind of rows: every member's batches as one table ``[members, steps, width]``."""

    def __init__(self, batches: Sequence[Sequence[np.ndarray]], device: torch.device) -> None:
        steps = max(len(own) for own in batches)
        self.sizes = np.zeros((len(batches), steps), np.int64)
        for position, own in enumerate(batches):
            self.sizes[position, : len(own)] = [len(batch) for batch in own]
        # At least one: layers cannot be relied on to take a batch without rows.
        width = int(self.sizes.max(initial=1))
        table = np.zeros((len(batches), steps, width), np.int64)
        real = np.arange(width) < self.sizes[:, :, None]
        # Padding repeats row 0: any numbers do, for they count for nothing.
        table[real] = np.concatenate(
            [np.empty(0, np.int64), *(batch for own in batches for batch in own)]
        )
        self._table = as_tensor(table).to(device)
        self._device = device

    def take(self, step: int, active: int) -> tuple[Tensor, Tensor | None]:
        """Return a step's rows ``[active, width]``, and which count unless all do."""
        sizes = self.sizes[:active, step]
        widest = int(sizes.max(initial=1))
        rows = self._table[:active, step, :widest]
        if int(sizes.min()) == widest:
            return rows, None
        counted = np.arange(widest) < sizes[:, None]
        return rows, torch.from_numpy(counted.astype(np.float32)).to(self._device)


class StackedBatches:
    """The batches of neighbours in a stack, one step at a time.

    Args:
        data: the run's rows.
        feeds: which rows each member takes.
        fit: the fit.
        first: place of the first member in the stack.
        order: which members they are: their positions in the cohort.
        seeds: the members' seeds for torch in this fit.
        has_dropout: whether a model needs a key for each step.

    Attributes:
        first: place of the first member in the stack.
        counts: steps of each member, never rising.
        total: steps of the member that takes most.
        seed: of torch's global generators during the fit.
        apart: whether private and public rows go through the models one after the other.
        alone: whether these members have no public rows, though others have.
        targets: what tells the scale of the lesson's targets.
        private_rows: ids of all private rows of each member, in the order of its steps.
        order: which members they are.
        num_private, fewest: of the step last taken: private rows of its width, and rows of its
            smallest batch.
        fewest_of: the latter for private and public rows alone.
    """

    def __init__(
        self,
        data: TrainingData,
        feeds: Sequence[Feed],
        fit: Fit,
        first: int,
        order: Sequence[int],
        seeds: Sequence[int],
        has_dropout: bool,
    ) -> None:
        self.first, self.order = first, order
        self.counts = [feed.steps for feed in feeds]
        self.total = self.counts[0]
        self.seed = int(np.bitwise_xor.reduce(seeds))
        self.num_private = self.fewest = 0
        self.fewest_of: dict[str, int] = {}
        self._data = data
        self._device = device = data.train_inputs.device
        self._private = self._public = self._private_places = None
        own = [feed.private for feed in feeds if feed.private is not None]
        if own:
            self._private = _Padded(own, device)
        shared = [feed.public for feed in feeds if feed.public is not None]
        public = fit.public
        self.targets: Targets | None = None
        self._targets: _OfMembers | None = None
        self.apart = public is not None and public.apart and bool(own) and bool(shared)
        self.alone = public is not None and not shared
        if public is not None and shared:
            self._public = _Padded(shared, device)
            self._public_rows = _tensors_of_members(public.rows, order, device)
            if public.targets is not None:
                each = [own for own in map(public.targets_of, order) if own is not None]
                self.targets = each[0]
                rows_of_targets = [own.tensor for own in each]
                self._targets = _OfMembers(
                    rows_of_targets if public.has_own_targets else rows_of_targets[0], device
                )
        self._keys: Tensor | None = None
        if has_dropout:
            keys = np.stack([step_keys(seed, self.total) for seed in seeds], axis=1)
            self._keys = as_tensor(keys).to(device)
        self._tables: dict[str, tuple[str, _OfMembers]] = {}
        self._shared_tables: dict[str, Tensor] = {}
        for name, table in fit.tables.items():
            if table.of == "whole" and table.is_shared:
                self._shared_tables[name] = as_tensor(table.own(0)).to(device)
            elif table.of == "whole":
                own_tables = np.stack([table.own(at) for at in order])
                self._tables[name] = table.of, _OfMembers(as_tensor(own_tables), device)
            elif table.of == "private" or shared:
                self._tables[name] = table.of, _tensors_of_members(table.values, order, device)
        places = [feed.places for feed in feeds if feed.places is not None]
        if places and any(of == "private" for of, _ in self._tables.values()):
            self._private_places = _Padded(places, device)
        self._feeds = feeds

    @property
    def private_rows(self) -> list[np.ndarray]:
        """Ids of all private rows of each member, in the order of its steps."""
        return [
            np.concatenate([np.empty(0, np.int64), *(feed.private or [])]) for feed in self._feeds
        ]

    def private_sizes(self, step: int, active: int) -> np.ndarray:
        """Return how many private rows each member takes in a step."""
        if self._private is None:
            return np.zeros(active, np.int64)
        sizes: np.ndarray = self._private.sizes[:active, step]
        return sizes

    def tables_of(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what one member's step sees of the tables."""
        if not self._tables:
            return self._shared_tables
        own = {name: rows[f"table {name}"] for name in self._tables}
        return {**self._shared_tables, **own}

    def rows_of(self, rows: Mapping[str, Tensor]) -> StepRows:
        """Return how many rows of each kind a step has, and which count for one member."""
        sizes: dict[RowKind, int] = {}
        if "private_rows" in rows:
            sizes["private"] = len(rows["private_rows"])
        if "public_rows" in rows:
            sizes["public"] = len(rows["public_rows"])
        return StepRows(
            sizes, {kind: rows[f"{kind}_counted"] for kind in sizes if f"{kind}_counted" in rows}
        )

    def batch_of(self, rows: Mapping[str, Tensor]) -> Batch:
        """Return what one member's objective knows beside the outputs."""
        targets = None
        if self.targets is not None:
            targets = self.targets.of(blanked(rows["targets"], rows.get("public_counted")))
        return Batch(
            labels=rows.get("labels"),
            targets=targets,
            public_labels=rows.get("public_labels"),
            private_rows=rows.get("private_rows"),
            public_rows=rows.get("public_rows"),
            tables=self.tables_of(rows),
        )

    def sizes_of(self, step: int, active: int) -> list[dict[RowKind, int]]:
        """Return how many rows of each kind each member takes in a step."""
        tables: dict[RowKind, _Padded | None] = {"private": self._private, "public": self._public}
        return [
            {
                kind: int(table.sizes[at, step])
                for kind, table in tables.items()
                if table is not None
            }
            for at in range(active)
        ]

    def active(self, step: int) -> int:
        """Return how many members take this step; they come first."""
        return sum(count > step for count in self.counts)

    def take(self, step: int, active: int) -> dict[str, Tensor]:
        """Return a step's rows by what they are, each with the members as first dimension."""
        rows: dict[str, Tensor] = {}
        if self._keys is not None:
            rows["key"] = self._keys[step, :active]
        inputs: list[Tensor] = []
        counted: list[Tensor | None] = []
        sizes = np.zeros(active, np.int64)
        self.num_private = 0
        if self._private is not None:
            own, weights = self._private.take(step, active)
            inputs.append(_rows_of(self._data.train_inputs, own))
            rows["labels"] = _rows_of(self._data.train_labels, own)
            rows["private_rows"] = own
            counted.append(weights)
            self.num_private = own.shape[1]
            sizes += self._private.sizes[:active, step]
            self.fewest_of["private"] = int(self._private.sizes[:active, step].min())
            if weights is not None:
                rows["private_counted"] = weights
        if self._public is not None:
            positions, weights = self._public.take(step, active)
            shared = self._public_rows.take(positions)
            inputs.append(_rows_of(self._data.public_inputs, shared))
            rows["public_rows"] = shared
            counted.append(weights)
            sizes += self._public.sizes[:active, step]
            self.fewest_of["public"] = int(self._public.sizes[:active, step].min())
            if weights is not None:
                rows["public_counted"] = weights
            if self._targets is not None:
                rows["targets"] = self._targets.take(positions)
            if self._data.public_labels is not None:
                rows["public_labels"] = _rows_of(self._data.public_labels, shared)
        rows["inputs"] = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
        self.fewest = int(sizes.min())
        if any(weights is not None for weights in counted):
            every = torch.cat(
                [
                    torch.ones(part.shape[:2], device=part.device) if weights is None else weights
                    for part, weights in zip(inputs, counted, strict=True)
                ],
                dim=1,
            )
            rows["counted"] = every
            # A row's number among the rows that count: padding in front of it moves no mask.
            rows["numbers"] = every.cumsum(1).long() - 1
        for name, (of, values) in self._tables.items():
            if of == "whole":
                rows[f"table {name}"] = values.table[:active]
                continue
            padded = self._public if of == "public" else self._private_places
            assert padded is not None  # noqa: S101 (a table is of rows that the fit has)
            rows[f"table {name}"] = values.take(padded.take(step, active)[0])
        return rows


class _OfMembers:
    """Rows of all members below one another, or the same rows for all.

    Args:
        rows: the same for all, or those of each member.
        device: where they go.

    Attributes:
        table: the rows.
    """

    def __init__(self, rows: Tensor | Sequence[Tensor], device: torch.device) -> None:
        self._starts: Tensor | None = None
        if isinstance(rows, Tensor):
            self.table = rows.to(device)
            return
        self.table = torch.cat(list(rows)).to(device)
        starts = np.cumsum([0, *(len(own) for own in rows[:-1])])
        self._starts = as_tensor(starts).to(device)[:, None]

    def take(self, positions: Tensor) -> Tensor:
        """Return the entries at positions ``[members, width]`` among each member's own."""
        if self._starts is not None:
            positions = positions + self._starts[: len(positions)]
        return _rows_of(self.table, positions)


def _tensors_of_members(
    values: np.ndarray | Sequence[np.ndarray], order: Sequence[int], device: torch.device
) -> _OfMembers:
    """Return rows that are the same for all members, or those of each, in the order of a stack."""
    if isinstance(values, np.ndarray):
        return _OfMembers(as_tensor(values), device)
    return _OfMembers([as_tensor(values[at]) for at in order], device)


def _rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]``; one flat selection is several times as fast."""
    picked: Tensor = table.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
    return picked
