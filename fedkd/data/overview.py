"""Who holds what: the split as a table and as a picture."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from fedkd.data.federated import FederatedData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this many cells numbers inside the heat map would be too small to read.
MOST_NUMBERED_CELLS = 240

LONGEST_NAME = 24
MOST_NAMED_CLIENTS = 60
"""More lines of text than this do not fit beside the heat map."""


def split_table(data: FederatedData) -> list[dict[str, int | float | str]]:
    """One row per client, ready to print.

    Keys, in this order: ``client``; ``view`` (what its inputs are of, where clients differ in
    that); ``id`` where clients have natural ids; ``rows`` (private rows held); ``wrong_labels``
    (how many of their labels are wrong) with ``data.label_noise``; ``shift`` (how the client sees
    inputs) with ``data.feature_shift``; ``classes`` (how many classes they show);
    ``label_entropy`` (nats, of the class shares: 0 for one class, ln(classes) for equal shares);
    then the rows of each class, as they are labelled, as ``class <name>``.
    """
    counts, wrong, shifts = data.label_counts(), data.wrong_counts(), data.client_shifts
    return [
        {
            "client": client,
            **({"view": data.of_client(client).name} if data.views else {}),
            **({"id": data.client_names[client]} if data.client_names else {}),
            "rows": int(row.sum()),
            **({"wrong_labels": int(wrong[client])} if data.wrong_labels is not None else {}),
            **({"shift": shifts.labels[shifts.of_client[client]]} if shifts is not None else {}),
            "classes": int(np.count_nonzero(row)),
            "label_entropy": float(entropy),
            **{f"class {name}": int(n) for name, n in zip(data.class_names, row, strict=True)},
        }
        for client, (row, entropy) in enumerate(zip(counts, label_entropy(counts), strict=True))
    ]


def split_sizes(data: FederatedData) -> dict[str, int]:
    """Return the rows of the private, public, validation and test sets, of all views together."""
    every = (data, *data.views)
    return {
        "private": sum(len(each.train_labels) for each in every),
        "public": len(data.public_inputs),
        "validation": sum(len(each.validation_labels) for each in every),
        "test": sum(len(each.test_labels) for each in every),
    }


def label_entropy(counts: Int64[np.ndarray, "clients classes"]) -> Float64[np.ndarray, "clients"]:
    """Return the entropy of each client's class shares in nats; 0 for a client without rows."""
    from scipy.special import entr  # imported late: no run needs it

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropies: np.ndarray = entr(shares).sum(axis=1)
    return entropies


def plot_split(data: FederatedData) -> "Figure":
    """Draw a heat map of each client's rows per class, with its total beside it.

    One colour scale from light to dark reads the same with every kind of colour vision, and in
    print, for any number of classes. The figure belongs to no ``pyplot`` state.
    """
    from matplotlib.figure import Figure

    counts = data.label_counts()
    height = float(np.clip(1.6 + 0.3 * data.num_clients, 3.0, 14.0))
    width = float(np.clip(4.4 + 0.5 * data.num_classes, 6.5, 14.0))
    figure = Figure(figsize=(width, height), layout="constrained")
    cells, totals = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    _draw_cells(cells, counts, data.class_names, _lines(data))
    _draw_totals(totals, counts.sum(axis=1), data.wrong_counts())
    figure.colorbar(cells.images[0], ax=totals, label="rows of this class", fraction=0.2)
    title = (
        f"{shortened(data.name, 60)}: {counts.sum():,} private rows on {data.num_clients} clients"
    )
    if data.num_unassigned_rows:
        title += f" ({data.num_unassigned_rows:,} unassigned)"
    # A name such as a$b is no formula.
    figure.suptitle(title, fontsize="medium", fontweight="bold", parse_math=False)
    return figure


def _lines(data: FederatedData) -> list[str]:
    """Name clients by their ids and how they see inputs; nothing where they have neither."""
    named, shifts = data.client_names, data.client_shifts
    if shifts is None:
        return [shortened(name, LONGEST_NAME) for name in named]
    seen = [shortened(shifts.labels[place], LONGEST_NAME) for place in shifts.of_client]
    first = [shortened(name, LONGEST_NAME) for name in named] or list(map(str, range(len(seen))))
    return [f"{name}: {label}" for name, label in zip(first, seen, strict=True)]


def shortened(name: str, longest: int) -> str:
    """Return a name, or its beginning where it is longer."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _draw_cells(
    axes: "Axes",
    counts: Int64[np.ndarray, "clients classes"],
    class_names: tuple[str, ...],
    client_names: list[str],
) -> None:
    from matplotlib.ticker import MaxNLocator

    num_clients, num_classes = counts.shape
    held = np.ma.masked_equal(counts, 0)  # a class that a client lacks shows the background
    axes.imshow(held, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#f3f3f1")
    axes.set(xlabel="class", ylabel="client")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if num_classes <= 30:
        names_are_long = max(map(len, class_names)) > 3
        axes.set_xticks(
            range(num_classes),
            [shortened(name, LONGEST_NAME) for name in class_names],
            parse_math=False,
            rotation=40 if names_are_long else 0,
            ha="right" if names_are_long else "center",
        )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if client_names and num_clients <= MOST_NAMED_CLIENTS:
        axes.set_yticks(range(num_clients), client_names, parse_math=False)
    elif counts.size <= MOST_NUMBERED_CELLS:
        axes.set_yticks(range(num_clients))
    if counts.size <= MOST_NUMBERED_CELLS:
        for (client, label), count in np.ndenumerate(counts):
            if count:
                ink = "white" if count > 0.55 * counts.max() else "black"
                axes.text(
                    label, client, str(count), ha="center", va="center", color=ink, fontsize="small"
                )


def _draw_totals(
    axes: "Axes", totals: Int64[np.ndarray, "clients"], wrong: Int64[np.ndarray, "clients"]
) -> None:
    from matplotlib.ticker import MaxNLocator

    bars = axes.barh(np.arange(len(totals)), totals, color="#2c7fb8", height=0.7)
    if len(totals) <= 30:
        axes.bar_label(bars, padding=3, fontsize="small")
        axes.margins(x=0.3)
    if wrong.any():
        axes.barh(np.arange(len(wrong)), wrong, color="#d95f0e", height=0.7)
    axes.set(xlabel="rows; orange: wrong labels" if wrong.any() else "rows in total")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
