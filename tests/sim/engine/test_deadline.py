import math
import signal
import time

import pytest

from sim.engine.deadline import DeadlineError, deadline


def test_work_that_takes_too_long_is_interrupted_by_name() -> None:
    with pytest.raises(DeadlineError) as raised, deadline(0.01, 7.0):
        time.sleep(5)
    assert str(raised.value) == "no answer within engine.deadline_s = 7"


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 1e300, -1.0])
def test_a_time_that_is_none_leaves_no_handler_behind(seconds: float) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises((OverflowError, ValueError, OSError)), deadline(seconds):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
