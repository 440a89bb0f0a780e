"""The rows of a run are loaded once for all runs that learn from the same, and for no other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sim.engine.data import MOST_KEPT, data_of
from sim.settings import Settings

Small = Callable[..., Settings]


def test_runs_on_the_same_rows_share_them_and_others_do_not(small: Small) -> None:
    first = data_of(small("seed=1"))
    assert data_of(small("seed=1", "strategy.name=dml", "rounds=7")) is first
    of_another_seed = data_of(small("seed=2"))
    assert of_another_seed is not first
    dealt = [np.concatenate(data.client_rows).tolist() for data in (first, of_another_seed)]
    assert dealt[0] != dealt[1]
    assert len(data_of(small("seed=1", "clients.count=2")).client_rows) == 2


def test_only_the_last_few_are_kept(small: Small) -> None:
    first = data_of(small("seed=1"))
    for seed in range(2, 2 + MOST_KEPT):
        data_of(small(f"seed={seed}"))
    again = data_of(small("seed=1"))
    assert again is not first
    assert all(map(np.array_equal, again.client_rows, first.client_rows))


def test_a_file_that_was_written_anew_is_read_anew(small: Small, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"

    def written(first_label: str) -> Settings:
        rows = [f"{row / 300},{row % 7},{'ab'[row % 2]}" for row in range(300)]
        table.write_text("\n".join(["x,y,label", *rows[1:], f"0,0,{first_label}"]) + "\n")
        return small(f"data.source={table}", "clients.models=[mlp]", "data.public.size=50")

    assert data_of(written("a")).class_names == ("a", "b")
    # One letter more: what tells files apart is not only the time.
    assert data_of(written("cc")).class_names == ("a", "b", "cc")
