import numpy as np

from fedkd.exchange.ledger import Charge, Cost, Ledger, OpenLedger
from fedkd.exchange.values import digest, flatten, unflatten

CHEAP = Cost("gaussian", {"noise_multiplier": 2.0})
DEAR = Cost("gaussian", {"noise_multiplier": 0.5})


def test_releases_of_one_round_and_cost_are_one_charge():
    open_ledger = OpenLedger(Ledger())
    for client in (4, 1):
        open_ledger.charge_client(3, client, 1, CHEAP)
    open_ledger.charge_client(3, 1, 2, CHEAP)
    open_ledger.charge_client(3, 2, 1, DEAR)
    ledger = open_ledger.closed()
    assert [(c.clients.tolist(), c.attempts.tolist()) for c in ledger.charges] == [
        ([4, 1, 1], [1, 1, 2]),
        ([2], [1]),
    ]
    assert ledger.of_client(1) == [(3, CHEAP), (3, CHEAP)]
    assert ledger.of_client(2) == [(3, DEAR)]
    assert ledger.of_client(3) == []
    assert ledger.rows() == [
        {
            "of_round": 3,
            "by": "client",
            "mechanism": "gaussian",
            "figures": {"noise_multiplier": 2.0},
            "clients": [4, 1, 1],
            "attempts": [1, 1, 2],
        },
        {
            "of_round": 3,
            "by": "client",
            "mechanism": "gaussian",
            "figures": {"noise_multiplier": 0.5},
            "clients": [2],
            "attempts": [1],
        },
    ]
    assert ledger.rows(since=1) == ledger.rows()[1:]


def test_a_servers_release_costs_all_clients_whose_answers_are_in_it():
    opened = OpenLedger(Ledger())
    opened.charge_server(2, "mean", [1, 4], CHEAP)
    opened.charge_server(2, "sum", [4], CHEAP)
    ledger = opened.closed()
    assert ledger.of_client(1) == [(2, CHEAP)]
    assert ledger.of_client(4) == [(2, CHEAP), (2, CHEAP)]
    assert ledger.rows()[0] == {
        "of_round": 2,
        "by": "server",
        "mechanism": "gaussian",
        "figures": {"noise_multiplier": 2.0},
        "clients": [1, 4],
        "sent": "mean",
    }
    assert OpenLedger(ledger).closed() is ledger


def test_a_ledger_is_a_value():
    charge = Charge(1, "client", CHEAP, np.array([3]), np.array([1]))
    ledger = Ledger((charge,))
    assert digest(unflatten(*flatten(ledger))) == digest(ledger)
    assert OpenLedger(ledger).closed() is ledger
