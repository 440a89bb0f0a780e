"""Unusual states pass the contract test, and planted slips fail it; see ``tests/own``."""

import pytest

from sim.contract.claims import CLAIMS, BrokenError, Case
from sim.server.validation import AuthorError

OF_STATES = (
    "its_state_is_all_that_is_needed_to_go_on",
    "its_state_is_frozen",
    "nothing_is_changed_in_place",
    "the_server_half_answers_by_the_state_alone",
    "the_client_half_uses_nothing_but_its_arguments",
    "everything_that_travels_survives_it_bit_for_bit",
    "bytes_are_those_of_what_travels",
    "mixed_architectures_learn_for_some_rounds",
    "results_do_not_depend_on_how_cohorts_are_cut",
    "loop_and_stack_agree",
)

GOOD = {
    "a coefficient matrix": "own_planted:Personal",
    "a cache": "own_ballots:Ballots",
    "a server's momentum": "own_planted:ServerMomentum",
}


@pytest.mark.parametrize("claim", OF_STATES)
@pytest.mark.parametrize("name", GOOD.values(), ids=GOOD.keys())
def test_any_state_of_arrays_and_plain_values_keeps_to_the_contract(name, claim):
    CLAIMS[claim](Case(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD.values(), ids=GOOD.keys())
def test_they_keep_to_all_of_it(name):
    for claim in CLAIMS.values():
        claim(Case(name))


@pytest.mark.parametrize(
    ("slip", "claim", "told"),
    [
        ("InPlace", "nothing_is_changed_in_place", "read-only"),
        ("InPlace", "mixed_architectures_learn_for_some_rounds", "read-only"),
        ("OneRoundOff", "nothing_is_changed_in_place", "belongs into its State"),
        (
            "OneRoundOff",
            "its_state_is_all_that_is_needed_to_go_on",
            "other weights than the run that was not interrupted",
        ),
        ("AveragesPadding", "loop_and_stack_agree", "differs between loop and stack"),
        (
            "SoftAsLogits",
            "mixed_architectures_learn_for_some_rounds",
            "scale='probabilities'",
        ),
        ("ForgetsBytes", "bytes_are_those_of_what_travels", "0 bytes were counted"),
        (
            "WritesIntoWhatItReceives",
            "the_client_half_uses_nothing_but_its_arguments",
            "changed what it received",
        ),
        (
            "RemembersAtHome",
            "the_client_half_uses_nothing_but_its_arguments",
            "the client half changed an attribute",
        ),
        ("TellsByChance", "the_server_half_answers_by_the_state_alone", "answer differently"),
        ("NotFrozen", "its_state_is_frozen", r"write @dataclass\(frozen=True\)"),
    ],
)
def test_a_planted_slip_is_found(slip, claim, told):
    with pytest.raises((BrokenError, AuthorError), match=told):
        CLAIMS[claim](Case(f"own_planted:{slip}"))
