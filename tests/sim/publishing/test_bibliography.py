import re

import pytest

from sim.publishing.bibliography import (
    REFERENCES_FILE,
    bibtex,
    keys_of,
    links_of,
    plain_text,
    references,
)
from sim.settings import SettingsError
from strategies import STRATEGIES
from strategies.contract.card import description_of

SOURCED = [name for name in STRATEGIES if description_of(STRATEGIES[name]).source]


@pytest.mark.parametrize("name", SOURCED)
def test_every_source_of_an_algorithm_has_an_entry_that_agrees_with_it(name):
    source = description_of(STRATEGIES[name]).source
    [key] = keys_of(name)
    fields = references()[key].fields
    first = re.split(r",| and ", fields["author"].replace("{", ""))[0].strip()
    # "the baseline of Zhu, Hong, ..." names somebody's baseline.
    assert source.removeprefix("the baseline of ").startswith(first)
    assert re.search(rf"\b{fields['year']}\b", source)


def test_other_names_that_a_source_gives_are_in_its_entry():
    source = description_of(STRATEGIES["proxyfl"]).source
    names = source.partition(", 2023")[0].split(", ")
    assert all(name in references()["kalra2023proxyfl"].fields["author"] for name in names)


def test_what_has_no_source_is_cited_by_the_links_of_its_docstring_or_not_at_all():
    assert keys_of("one_way") == ["hinton2015distilling", "lin2020feddf"]
    assert keys_of("local") == []


def test_every_entry_is_read_and_has_what_bibtex_needs():
    text = REFERENCES_FILE.read_text()
    assert len(references()) == text.count("\n@")
    for key, entry in references().items():
        assert {"author", "title", "year"} <= set(entry.fields), key
        assert entry.fields["year"] in key
        assert entry.text.count("{") == entry.text.count("}")
        # Every line of an entry is a field that was understood.
        assert entry.text.count("\n") == len(entry.fields) + 2


def test_entries_come_once_each_in_both_formats():
    text = bibtex(["zhang2018dml", "zhang2018dml", "hinton2015distilling"])
    assert text.count("@") == 2
    line = plain_text(["mcmahan2017fedavg"])
    assert line.startswith("[mcmahan2017fedavg] McMahan, H. Brendan; Moore, Eider;")
    assert "Agüera y Arcas" in line
    assert "{" not in line
    assert plain_text(["shen2020fml"]).startswith("[shen2020fml] Shen, Tao et al., 2020.")


def test_an_unknown_algorithm_is_answered_with_the_nearest():
    with pytest.raises(SettingsError, match=r"unknown algorithm 'dlm'.*dml"):
        links_of("dlm")
