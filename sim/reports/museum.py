"""What faults of published code cost: pairs of arms over seeds, and a table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    HONEST,
    Difference,
    Estimate,
    difference_by_seed,
    estimate,
    holm,
    is_decided,
    values_by_seed,
)
from sim.reports.tables import p_text, percent
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Row
from strategies.contract import Fault


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One fault, and the two arms that show what it costs.

    Attributes:
        algorithm: that commits it.
        name: of the fault, as ``strategy.as_published`` has it.
        fault: what it is, and where it was read.
        right: the arm without it.
        published: the arm with it.
    """

    algorithm: str
    name: str
    fault: Fault
    right: str
    published: str

    def to_row(self) -> Row:
        """Return it as plain values."""
        return {
            "fault": self.name,
            "algorithm": self.algorithm,
            "does": self.fault.does,
            "read_in": self.fault.read_in,
            "right": self.fault.right,
            "shows_with": list(self.fault.shows_with),
            "stands_for": self.fault.stands_for,
        }

    def lines(self) -> list[str]:
        """Return it as sentences, one a line."""
        told = [
            ("does", self.fault.does),
            ("right", self.fault.right),
            ("read in", self.fault.read_in),
            ("shows with", " ".join(self.fault.shows_with)),
            ("stands for", self.fault.stands_for),
        ]
        title = f"{self.name} ({self.algorithm})"
        return [title, *(f"  {name:<11}{text}" for name, text in told if text)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one fault costs.

    Attributes:
        show: the fault.
        right, published: mean client accuracy at the last round, over seeds, of honest clients
            where some are dishonest; in [0, 1].
        cost: right - published, paired by seed; positive where the fault costs accuracy.
        server_cost: the same of the server's model, where there is one.
        p_holm: of ``cost``, corrected for the number of faults that are shown.
        bytes_ratio: bytes of a run as published over those of the right one; None without bytes.
        same_bits: whether every client ends with the same weights, so that the fault does not show.
    """

    show: Exhibit
    right: Estimate | None
    published: Estimate | None
    cost: Difference | None
    server_cost: Difference | None
    p_holm: float | None
    bytes_ratio: float | None
    same_bits: bool

    def to_row(self) -> Row:
        """Return it as plain values."""

        def ends(value: Estimate | Difference | None) -> Row | None:
            if value is None:
                return None
            return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}

        return {
            **self.show.to_row(),
            "right_accuracy": ends(self.right),
            "as_published_accuracy": ends(self.published),
            "cost": ends(self.cost),
            "cost_by_seed": [] if self.cost is None else list(self.cost.pairs),
            "server_cost": ends(self.server_cost),
            "p": None if self.cost is None else self.cost.p_value,
            "p_holm": self.p_holm,
            "bytes_ratio": self.bytes_ratio,
            "same_bits": self.same_bits,
        }


def findings(
    shown: Sequence[Exhibit], runs: Mapping[str, Sequence[RunRecord]]
) -> tuple[Finding, ...]:
    """Compare each fault with its right form; Holm's correction is over all of them.

    Args:
        shown: the faults.
        runs: by arm; an arm that was refused has none.
    """
    costs = [
        _difference(runs.get(show.right, ()), runs.get(show.published, ()), _key(runs, show))
        for show in shown
    ]
    corrected = holm(
        {place: None if cost is None else cost.p_value for place, cost in enumerate(costs)}
    )
    return tuple(
        Finding(
            show=show,
            right=_mean(runs.get(show.right, ()), _key(runs, show)),
            published=_mean(runs.get(show.published, ()), _key(runs, show)),
            cost=cost,
            server_cost=_difference(
                runs.get(show.right, ()), runs.get(show.published, ()), "server_accuracy"
            ),
            p_holm=corrected[place],
            bytes_ratio=_bytes_ratio(runs.get(show.right, ()), runs.get(show.published, ())),
            same_bits=_same_bits(runs.get(show.right, ()), runs.get(show.published, ())),
        )
        for place, (show, cost) in enumerate(zip(shown, costs, strict=True))
    )


def _key(runs: Mapping[str, Sequence[RunRecord]], show: Exhibit) -> str:
    return HONEST if values_by_seed(runs.get(show.right, ()), HONEST, "last") else "accuracy"


def _mean(runs: Sequence[RunRecord], key: str) -> Estimate | None:
    return estimate([*values_by_seed(runs, key, "last").values()], (0.0, 1.0))


def _difference(
    right: Sequence[RunRecord], published: Sequence[RunRecord], key: str
) -> Difference | None:
    return difference_by_seed(
        values_by_seed(published, key, "last"), values_by_seed(right, key, "last")
    )


def _bytes_ratio(right: Sequence[RunRecord], published: Sequence[RunRecord]) -> float | None:
    sums = [
        sum(sum(run.bytes_up.values()) + sum(run.bytes_down.values()) for run in runs)
        for runs in (right, published)
    ]
    return sums[1] / sums[0] if sums[0] else None


def _same_bits(right: Sequence[RunRecord], published: Sequence[RunRecord]) -> bool:
    digests = [
        {run.seed: run.result.get("weights_sha256") for run in runs} for runs in (right, published)
    ]
    return bool(digests[0]) and digests[0] == digests[1]


def museum_table(found: Sequence[Finding]) -> FittedTable:
    """Return the faults with what each costs, a line a fault, in their order."""
    few = any(each.cost is not None and each.cost.few for each in found)
    columns = [
        Column(title="right %", cells=[percent(each.right) for each in found], rank=1),
        Column(title="as published %", cells=[percent(each.published) for each in found], rank=2),
        Column(
            title="costs points",
            cells=[percent(each.cost, signed=True) for each in found],
            rank=0,
            emphasized=[
                place
                for place, each in enumerate(found)
                if each.cost is not None and is_decided(each.cost, each.p_holm)
            ],
        ),
        Column(title="p", cells=[_p(each) for each in found], rank=4),
        Column(title="p Holm", cells=[p_text(each.p_holm) for each in found], rank=3),
        Column(title="bytes", cells=[_bytes(each) for each in found], rank=5),
        Column(
            title="server costs",
            cells=[percent(each.server_cost, signed=True) for each in found],
            rank=6,
        ),
        Column(
            title="read in", cells=[str(each.show.to_row()["read_in"]) for each in found], rank=9
        ),
    ]
    caption = (
        "costs: right - as published, paired by seed, 95 % t-intervals; Holm over all rows; "
        "bytes: as published over right"
    )
    return FittedTable(
        label="fault",
        labels=[f"{each.show.algorithm} {each.show.name}" for each in found],
        columns=columns,
        caption=caption + ("; *: fewer than 6 seeds" if few else ""),
    )


def _p(found: Finding) -> str:
    return NOTHING if found.cost is None else p_text(found.cost.p_value, few=found.cost.few)


def _bytes(found: Finding) -> str:
    if found.same_bits:
        return "no effect"
    if found.bytes_ratio is None:
        return NOTHING
    return "same" if found.bytes_ratio == 1 else f"x {found.bytes_ratio:.3g}"


def museum_words(found: Sequence[Finding]) -> list[str]:
    """Say in sentences which faults cost something, which help, and which show nothing."""

    def named(chosen: Sequence[Finding]) -> str:
        return ", ".join(f"{each.show.name} ({each.show.algorithm})" for each in chosen)

    sure = [each for each in found if each.cost is not None and is_decided(each.cost, each.p_holm)]
    worst = sorted(sure, key=lambda each: -each.cost.mean if each.cost else 0.0)
    groups = [
        ("cost accuracy", [each for each in worst if each.cost and each.cost.mean > 0]),
        ("score better than what is right", [e for e in worst if e.cost and e.cost.mean < 0]),
        ("change no bit of any client here", [each for each in found if each.same_bits]),
    ]
    rest = len(found) - sum(len(chosen) for _, chosen in groups)
    told = [
        f"{len(chosen)} of {len(found)} {what}: {named(chosen)}"
        for what, chosen in groups
        if chosen
    ]
    if rest:
        told.append(f"{rest} of {len(found)} cannot be told from what is right by these seeds")
    return told
