"""What tests of commands share."""

import signal
import sys
from collections.abc import Callable

import pytest

from sim.commands import cli


@pytest.fixture
def fedkd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process; return its exit code and both outputs."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedkd", *map(str, words)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
