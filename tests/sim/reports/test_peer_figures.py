from dataclasses import replace

import pytest

from sim.reports.html.alternatives import alternative, number_tables
from sim.reports.peer_figures import (
    MOST_PANELS,
    agreement_by_arm,
    draw_peers,
    reliability_by_arm,
    reliability_of,
)

EMPTY = [0] * 12


@pytest.fixture
def compared(make_run):
    """Return runs of two seeds that say what three clients answered, 400 rows each."""

    def of_seed(seed):
        reliability = {
            "rows": [*EMPTY, 300, 99, 1],
            "correct": [*EMPTY, 150, 90, 1],
            "confidence": [*EMPTY, 250.0, 89.0, 0.95],
        }
        agreement = [[1.0, 0.25, 0.5], [0.25, 1.0, 0.75], [0.5, 0.75, 1.0]]
        peers = {"clients": [0, 2, 5], "agreement": agreement, "reliability": reliability}
        return replace(make_run(seed=seed), peers=peers)

    return [of_seed(0), of_seed(1)]


def test_intervals_are_those_of_all_seeds_and_rare_ones_are_left_out(compared):
    assert reliability_of(compared).counts.tolist() == [*EMPTY, 600, 198, 2]
    figure = reliability_by_arm({"dml": compared})
    [line, _] = figure.axes[0].lines
    assert line.get_xdata().tolist() == pytest.approx([100 * 250 / 300, 100 * 89 / 99])
    assert line.get_ydata().tolist() == pytest.approx([50.0, 100 * 90 / 99])
    [table] = number_tables(figure)
    assert len(table.rows) == 2


def test_pairs_are_cells_with_numbers_and_words(compared):
    figure = agreement_by_arm({"dml": compared, "local": compared[1:]})
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "dml",
        "local",
    ]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["25", "50", "25", "75", "50", "75"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "2", "5"]
    assert "clients" not in str(figure.get_suptitle()).partition("\n")[2]
    large = [replace(run, peers={**run.peers, "judged": 60}) for run in compared]
    told = str(agreement_by_arm({"dml": large}).get_suptitle())
    assert told.endswith("the first 3 of 60 clients")
    assert "dml: from 25 to 75, on average 50.0; local:" in alternative(figure, "Agreement")


def test_what_was_not_recorded_or_is_too_much_is_not_drawn(compared, make_run):
    assert draw_peers({"dml": [make_run()]}) == {}
    one = replace(make_run(), peers={"clients": [0], "agreement": [[1.0]]})
    assert agreement_by_arm({"dml": [one]}) is None
    other = {"rows": [1], "correct": [1], "confidence": [1.0]}
    assert reliability_of([replace(make_run(), peers={"reliability": other})]) is None
    many = {f"arm{place}": compared for place in range(MOST_PANELS + 1)}
    assert list(draw_peers(many)) == ["reliability_by_arm"]
