"""What a source need not import it does not: these packages take seconds."""

import subprocess
import sys

import numpy as np
import pytest

SLOW = ("datasets", "pandas", "matplotlib", "sklearn")


def imported_while_reading(source):
    program = (
        "import sys; from fedkd.data import DataSettings, build_federated_data;"
        f"build_federated_data(DataSettings(source={str(source)!r}, public={{'size': 5}},"
        " partition={'kind': 'iid'}), num_clients=2, seed=0);"
        f"print(*[name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


@pytest.mark.parametrize("source", ["digits", "parquet"])
def test_reading_imports_nothing_that_takes_seconds(tmp_path, write_pictures, numbered, source):
    write_pictures(tmp_path, "train", numbered(60), np.arange(60) % 2)
    assert imported_while_reading(tmp_path if source == "parquet" else source) == []
