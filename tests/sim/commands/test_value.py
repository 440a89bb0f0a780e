"""`fedkd value`: what it prints and keeps."""

import json
from collections.abc import Callable
from pathlib import Path

from sim.commands.running import run
from sim.settings import load_settings

Fedkd = Callable[..., tuple[int, str, str]]

WORDS = (
    "rounds=2",
    "clients.count=3",
    "clients.models=[mlp]",
    "clients.local.epochs=1",
    "data.private_rows=60",
    "data.test_rows=60",
    "data.public.size=40",
    "data.partition.kind=iid",
    "engine.backend=inline",
)


def test_values_are_printed_and_kept(fedkd: Fedkd, tmp_path: Path) -> None:
    folder = run(load_settings(None, [*WORDS, f"output={tmp_path}"])).folder
    code, out, err = fedkd("value", folder)
    assert code == 0, err
    assert "Leave-one-out: by how much the others lose" in out
    assert "3/3 coalitions" in err
    code, out, _ = fedkd("value", folder, "--method", "shapley", "--permutations", "2", "--json")
    assert code == 0
    kept = json.loads((folder / "value.json").read_text())
    assert json.loads(out) == kept
    assert kept["asked"]["method"] == "shapley"
    code, out, err = fedkd(
        *("value", folder, "--method", "both", "--permutations", "2", "--truncate", "0.5"),
        "--report",
    )
    assert code == 0, err
    assert (folder / "report.html").is_file()
    code, _, err = fedkd("value", folder, "--method", "best")
    assert code == 2
    assert "--method must be one of loo, shapley, both" in err
    code, _, err = fedkd("value", tmp_path)
    assert code == 2
    assert "is not the folder of a run" in err
