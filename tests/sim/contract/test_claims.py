"""Every claim of the contract test notices an algorithm that does not keep to it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.contract import ContractError, check_strategy, sections_of
from sim.contract.claims import CLAIMS, BrokenError, Case
from sim.settings import SettingsError

HEAD = '''
import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
from fedkd.training import supervised
from my_method.method import Ensemble, MyMethod, Settings
from strategies.contract import StrategySettings, upload_logits

drawn = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Free(Predictions):
    kind = "free"

    @property
    def payload_bytes(self):
        return 0


class Broken(MyMethod):
    """Not what it should be."""

'''

BREAKS = {
    "a rule that is ignored": (
        """
    class Settings(Settings):
        aggregation: Literal["mean", "median"] = "mean"
""",
        "its_rules_of_aggregation_are_followed",
        "makes of the first answers what the mean makes of them",
    ),
    "settings that can be changed": (
        """
    class Settings(Settings):
        model_config = ConfigDict(frozen=False)
""",
        "its_settings_are_frozen_and_refuse_what_they_do_not_know",
        "they can be changed",
    ),
    "settings that take anything": (
        """
    class Settings(Settings):
        model_config = ConfigDict(extra="allow")
""",
        "its_settings_are_frozen_and_refuse_what_they_do_not_know",
        "an unknown one is taken",
    ),
    "settings that read back as others": (
        """
    class Settings(Settings):
        def model_post_init(self, _):
            object.__setattr__(self, "power", self.power + 1)
""",
        "its_settings_survive_the_way_through_a_file",
        "became .*power=3.0.*, were .*power=2.0",
    ),
    "no docstring": ("\n    __doc__ = ''\n", "it_says_whose_idea_it_is", "no docstring"),
    "nobody learns": (
        """
    def client(self, cohort, received, call):
        return upload_logits(cohort, call)
""",
        "mixed_architectures_learn_for_some_rounds",
        "the accuracy is .*, which is no better than chance",
    ),
    "draws that no seed decides": (
        """
    def aggregate(self, state, uploads, round, server):
        state = super().aggregate(state, uploads, round, server)
        if state.taught is None:
            return state
        mixed = state.taught.values[np.random.default_rng().permutation(20)]
        return Ensemble(replace(state.taught, values=mixed))
""",
        "the_same_seed_gives_the_same_bits_and_another_others",
        "the same seed gave other weights",
    ),
    "cohorts of one learn something else": (
        """
    def client(self, cohort, received, call):
        for _ in cohort.clients:
            answers = super().client(cohort, received, call)
        return answers
""",
        "loop_and_stack_agree",
        "client .* differs between loop and stack",
    ),
    "a loss that knows how many rows pad a step": (
        """
    def client(self, cohort, received, call):
        def objective(outputs, batch):
            rows = float(len(outputs.private))
            return {name: rows * loss for name, loss in supervised(outputs, batch).items()}
        cohort.fit(objective, private=call.local)
        return upload_logits(cohort, call)
""",
        "loop_and_stack_agree",
        "client .* differs between loop and stack",
    ),
    "no federation of one": (
        """
    def aggregate(self, state, uploads, round, server):
        if self.federation.num_clients == 1:
            raise RuntimeError("too few")
        return super().aggregate(state, uploads, round, server)
""",
        "a_federation_of_one_runs",
        "too few",
    ),
    "a kind that forgets its bytes": (
        """
    up = (Free,)

    def client(self, cohort, received, call):
        answers = super().client(cohort, received, call)
        return [Free(rows=answer.rows, values=answer.values) for answer in answers]

    def asks(self, state, client, round, server):
        return replace(super().asks(state, client, round, server), kind=Free)
""",
        "bytes_are_those_of_what_travels",
        "0 bytes were counted; its numbers alone are 108",
    ),
    "an aggregate that remembers who was there": (
        """
    def aggregate(self, state, uploads, round, server):
        uploads = list(uploads)
        self.seen = getattr(self, "seen", []) + [upload.client for upload in uploads]
        state = super().aggregate(state, uploads, round, server)
        values = state.taught.values + np.float32(1e-4 * (len(self.seen) > 3))
        return Ensemble(replace(state.taught, values=values))
""",
        "nothing_is_changed_in_place",
        "changed an attribute of the algorithm: what it remembers belongs into its State",
    ),
    "a state that is written into": (
        """
    def aggregate(self, state, uploads, round, server):
        after = super().aggregate(state, uploads, round, server)
        object.__setattr__(state, "taught", after.taught)
        return after
""",
        "nothing_is_changed_in_place",
        "changed the state that it was handed",
    ),
    "uploads that are written into": (
        """
    def aggregate(self, state, uploads, round, server):
        uploads = list(uploads)
        for upload in uploads:
            upload.payload.values.setflags(write=True)
            upload.payload.values[:] += 1
        return super().aggregate(state, uploads, round, server)
""",
        "nothing_is_changed_in_place",
        "changed an upload|read-only|WRITEABLE",
    ),
    "an aggregate that depends on how often it was called": (
        """
    def aggregate(self, state, uploads, round, server):
        state = super().aggregate(state, uploads, round, server)
        shifted = np.roll(state.taught.values, next(drawn), axis=1)
        return Ensemble(replace(state.taught, values=shifted))
""",
        "nothing_is_changed_in_place",
        "another state for the same state and uploads",
    ),
    "what is remembered beside the state": (
        """
    times = 0

    def aggregate(self, state, uploads, round, server):
        self.times += 1
        state = super().aggregate(state, uploads, round, server)
        shifted = np.roll(state.taught.values, self.times, axis=1)
        return Ensemble(replace(state.taught, values=shifted))
""",
        "its_state_is_all_that_is_needed_to_go_on",
        "other weights than the run that was not interrupted",
    ),
    "a client half that remembers": (
        """
    times = 0

    def client(self, cohort, received, call):
        self.times += 1
        for _ in range(1 + self.times % 2):
            answers = super().client(cohort, received, call)
        return answers
""",
        "the_client_half_uses_nothing_but_its_arguments",
        "the client half changed an attribute of the algorithm",
    ),
    "silence is not thought of": (
        """
    def aggregate(self, state, uploads, round, server):
        uploads = list(uploads)
        1 / len(uploads)
        return super().aggregate(state, iter(uploads), round, server)
""",
        "a_round_without_uploads_is_no_error",
        "division by zero",
    ),
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "lone_broken.py"
    sys.modules.pop("lone_broken", None)


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_noticed(what: str, broken: Path) -> None:
    code, claim, complaint = BREAKS[what]
    broken.write_text(HEAD + code)
    with pytest.raises((BrokenError, ArithmeticError, RuntimeError, ValueError), match=complaint):
        CLAIMS[claim](Case("lone_broken:Broken"))


def test_an_algorithm_that_cannot_be_found_is_told_first() -> None:
    with pytest.raises(SettingsError, match=r"strategy\.name 'nowhere_at_all:X': cannot import"):
        check_strategy("nowhere_at_all:X")
    with pytest.raises(SettingsError, match=r"unknown setting 'strategy.powr'.*strategy.power"):
        check_strategy("my_method:MyMethod", {"powr": 1})
    with pytest.raises(SettingsError, match="key=value"):
        check_strategy("local", words=["rounds"])


def test_what_breaks_everything_is_told_once(broken: Path) -> None:
    broken.write_text(f"{HEAD}\n    __doc__ = ''\n\n    def begin(self, server):\n        1 / 0\n")
    with pytest.raises(ContractError) as caught:
        check_strategy("lone_broken:Broken")
    assert isinstance(caught.value.__cause__, BrokenError | ZeroDivisionError)
    first, *lines = str(caught.value).splitlines()
    assert first == "lone_broken:Broken does not keep to the contract:"
    assert lines[0] == "  it says whose idea it is: the class has no docstring"
    assert lines[1].startswith("  mixed architectures learn for some rounds (and ")
    assert lines[1].endswith(" more claims): ZeroDivisionError: division by zero")
    assert len(lines) == 2


def test_what_an_algorithm_refuses_by_itself_is_told_first(broken: Path) -> None:
    check = """
    def check(self, input_shape):
        if len(set(self.federation.architectures)) > 1:
            raise ValueError("clients.models: one for all, got 2")
"""
    broken.write_text(HEAD + check)
    with pytest.raises(SettingsError, match=r"refuses the toy.*one for all, got 2; settings that"):
        check_strategy("lone_broken:Broken")


@pytest.mark.parametrize(
    "words",
    [
        ["exchange.up={kind: top_k, k: 2}", "exchange.view=sum"],
        ["exchange.up=own_stages:Changes", "exchange.down=own_stages:Changes"],
        ["privacy.mechanism=own_stages:Noise"],
        ["privacy.mechanism=own_stages:Noise", "privacy.where=server", "exchange.down=float16"],
    ],
    ids=" ".join,
)
def test_what_is_sent_may_pass_codecs_rules_and_views(words: list[str]) -> None:
    case = Case("dsfl", sections=sections_of(words))
    for claim in (
        "a_client_that_is_left_out_leaves_the_aggregate_of_the_rest",
        "the_server_half_answers_by_the_state_alone",
        "the_client_half_uses_nothing_but_its_arguments",
    ):
        CLAIMS[claim](case)


@pytest.mark.slow
def test_everything_holds_under_a_codec_that_remembers() -> None:
    check_strategy("dsfl", words=["exchange.up=own_stages:Changes"])


def test_a_slip_is_noticed_under_a_codec_as_well(broken: Path) -> None:
    code, claim, complaint = BREAKS["a client half that remembers"]
    broken.write_text(HEAD + code)
    case = Case("lone_broken:Broken", sections={"exchange": {"up": {"kind": "float16"}}})
    with pytest.raises(BrokenError, match=complaint):
        CLAIMS[claim](case)
