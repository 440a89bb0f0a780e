from dataclasses import replace

import pytest

from sim.reports.html.clients import MOST_PAGES, client_pages, size_table, split_table

SPLIT = {
    "sizes": {"private": 100, "public": 10, "validation": 5, "test": 20},
    "rows": [60, 40],
    "classes": ["cat", "a dog with a long name"],
    "counts": [[60, 0], [10, 30]],
}


@pytest.fixture
def run(make_run):
    return replace(make_run(), split=SPLIT)


def test_sizes_stand_once_for_arms_that_share_them(run):
    other = replace(run, split={**SPLIT, "sizes": {**SPLIT["sizes"], "private": 1200}})
    assert size_table({"a": [run], "b": [run]}).rows == [["every arm", "100", "10", "5", "20"]]
    assert [row[:2] for row in size_table({"a": [run], "b": [run], "c": [other]}).rows] == [
        ["a, b", "100"],
        ["c", "1,200"],
    ]
    assert size_table({"a": [replace(run, split={})]}) is None


def test_who_holds_what_is_drawn_in_shades(run):
    table = split_table(run)
    assert table.header == ["client", "cat", "a dog with a …"]
    assert table.rows == [["0 (mlp)", "60", "0"], ["1 (gru)", "10", "30"]]
    assert table.shade(1, 2) == 50
    # Of a large split only sums are kept, and what is damaged is not believed.
    assert split_table(replace(run, split={"rows": [60, 40]})) is None
    assert split_table(replace(run, split={**SPLIT, "counts": [[60, 0]]})) is None


def test_a_client_has_its_mix_its_model_and_its_history_in_every_arm(run):
    other = replace(run, arm="local")
    first, second = client_pages({"dml": [run], "local": [other]})
    assert (first.anchor, first.title) == ("client-0", "Client 0")
    assert first.words == "Model: mlp. 60 private rows of 1 of 2 classes."
    assert second.mix.rows == [["rows", "10", "30"]]
    assert [row[0] for row in second.history.rows] == ["dml", "local"]
    # 0.1 above 50 and 60 %; 1000 bytes up and 3000 down in each of two rounds.
    assert second.history.rows[0][1].endswith(" 60.0 → 70.0")
    assert second.history.rows[0][-2:] == ["2.0", "6.0"]


def test_arms_that_deal_rows_of_their_own_have_no_common_mix(run):
    other = replace(run, split={**SPLIT, "counts": [[0, 60], [30, 10]]})
    assert all(page.mix is None for page in client_pages({"a": [run], "b": [other]}))


def test_so_many_clients_have_no_pages(run):
    many = dict.fromkeys(range(MOST_PAGES + 1), 0)
    assert client_pages({"a": [replace(run, bytes_up=many)]}) == []
