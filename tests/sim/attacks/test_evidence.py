"""What travels is kept as both sides see it; what was not kept is made again, bit for bit."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import digest
from sim.attacks.evidence import Evidence, attacked_data, evidence_of
from sim.attacks.running import attack
from sim.commands.running import load_data, run
from sim.keeping.exchange import ExchangeFolder, read_clients, read_exchange
from sim.keeping.parts import DamagedFileError
from sim.keeping.records import read_result, sealed
from sim.server.exchanged import Exchanged
from sim.settings import SettingsError


def evidence(result, settings):
    told = []
    return evidence_of(result.folder, settings, attacked_data(settings), told.append), told


def test_what_was_not_kept_is_repeated_from_the_seed_and_kept_then(attacked):
    kept_settings = attacked("exchange.keep=true")
    kept = run(kept_settings)
    there, told = evidence(kept, kept_settings)
    assert told == []
    bare_settings = attacked()
    bare = run(bare_settings)
    assert not (bare.folder / "exchange").exists()
    assert bare.weights_sha256 == kept.weights_sha256
    again, told = evidence(bare, bare_settings)
    assert told[-1] == "run again, round 2 of 2"
    assert [digest(each) for each in again.rounds] == [digest(each) for each in there.rounds]
    for client in range(4):
        for name, array in there.models[client].items():
            np.testing.assert_array_equal(again.models[client][name], array)
    _, told = evidence(bare, bare_settings)
    assert told == []


def test_a_run_that_ends_otherwise_when_it_is_repeated_is_not_attacked(attacked):
    settings = attacked()
    result = run(settings)
    path = result.folder / "result.json"
    row = {**read_result(result.folder), "weights_sha256": "0" * 64}
    path.write_text(json.dumps(sealed(row)))
    with pytest.raises(SettingsError, match=r"ends with other weights.*exchange\.keep=true"):
        evidence(result, settings)
    assert not (result.folder / "exchange").exists()


def test_both_sides_see_what_the_codec_left(attacked):
    settings = attacked("exchange.keep=true", "exchange.up=int8", "exchange.down=float16")
    result = run(settings)
    first, second = read_exchange(result.folder)
    assert first.received(0) is None
    sent, received = first.sent(1).values, second.received(1).values
    # At most 256 levels a row; and numbers that float16 can hold.
    assert max(len(np.unique(row)) for row in sent) <= 256
    np.testing.assert_array_equal(received, received.astype(np.float16).astype(np.float32))


def test_pieces_that_many_receive_are_kept_once(attacked):
    settings = attacked("strategy.name=fedmd", "exchange.keep=true")
    last = list(read_exchange(run(settings).folder))[-1]
    assert len(set(last.down.values())) == 1
    assert len(last.pieces) == 5


def test_a_resumed_run_keeps_the_rounds_of_its_last_try(attacked):
    settings = attacked("exchange.keep=true")
    result = run(settings)
    writer = ExchangeFolder(result.folder)
    writer.returned(1)
    assert [each.round for each in read_exchange(result.folder)] == [1]


def test_a_run_that_kept_its_last_rounds_alone_is_repeated(attacked):
    """As one is that was told to keep what travels when it was resumed."""
    settings = attacked("exchange.keep=true")
    result = run(settings)
    (result.folder / "exchange" / "round-000001.safetensors").unlink()
    found, told = evidence(result, settings)
    assert told[-1] == "run again, round 2 of 2"
    assert [each.round for each in found.rounds] == [1, 2]


def test_predictions_of_no_row_say_nothing():
    rows = np.arange(2)
    said = Predictions(rows=rows, values=np.zeros((2, 3), np.float32))
    silent = Predictions(rows=rows[:0], values=np.zeros((0, 3), np.float32))
    first = Exchanged(1, (said,), up={0: 0}, down={0: 0})
    second = Exchanged(2, (silent,), up={0: 0, 1: 0}, down={0: 0})
    assert second.sent(0) is None
    found = Evidence([first, second], {})
    assert found.last_sent(0) is said
    assert found.last_received(0) is said
    assert found.last_sent(1) is None
    assert found.last_sent(2) is None


def test_the_last_of_a_run_is_enough_of_it():
    pieces = [
        Predictions(rows=np.arange(1), values=np.full((1, 3), number, np.float32))
        for number in range(3)
    ]
    rounds = [
        Exchanged(1, tuple(pieces[:2]), up={0: 0, 1: 1}, down={2: 1}),
        Exchanged(2, tuple(pieces[2:]), up={0: 0}, down={0: 0}),
    ]
    whole, last = Evidence(rounds, {}), Evidence(rounds, {}).last()
    assert len(last.rounds) == 1
    for client in range(4):
        assert last.last_sent(client) is whole.last_sent(client)
        assert last.last_received(client) is whole.last_received(client)


def test_files_that_were_changed_are_named(attacked):
    settings = attacked("exchange.keep=true")
    folder = run(settings).folder
    assert sorted(read_clients(folder)) == [0, 1, 2, 3]
    path = folder / "exchange" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match="round-000002"):
        list(read_exchange(folder))


def test_models_that_are_of_nobody_or_others_are_named(attacked):
    settings = attacked("exchange.keep=true", "attacks.kinds=labels")
    folder = run(settings).folder
    path = folder / "exchange" / "clients.safetensors"
    arrays = load_file(path)
    save_file({name: array[:1] for name, array in arrays.items()}, path)
    with pytest.raises(DamagedFileError, match=r"clients\.safetensors.*client 0 has weights"):
        attack(folder, settings, settings.attacks)
    save_file({name.replace("0/", "none/"): array for name, array in arrays.items()}, path)
    with pytest.raises(DamagedFileError, match=r"clients\.safetensors.*of no client"):
        read_clients(folder)


def test_keeping_changes_no_number_and_not_the_run(attacked):
    from sim.keeping.identity import fingerprint

    assert fingerprint(attacked()) == fingerprint(
        attacked("exchange.keep=true", "attacks.kinds=all")
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [(["data.feature_shift.shifts=[{kind: none},{kind: noise}]"], r"data\.feature_shift")],
)
def test_what_would_tell_members_apart_by_itself_is_refused(attacked, words, named):
    with pytest.raises(SettingsError, match=named):
        attacked_data(attacked(*words))


@pytest.mark.parametrize("word", ["exchange.keep=true", "attacks.kinds=all"])
def test_nodes_keep_their_models_so_that_nothing_is_kept_of_them(attacked, word):
    with pytest.raises(SettingsError, match=r"needs fedkd run"):
        load_data(attacked(word), nodes=True)
