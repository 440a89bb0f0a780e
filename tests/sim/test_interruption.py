import signal
import threading

import pytest

from sim.interruption import Interruption, interruptible, uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_interrupt_and_have_an_exit_code(number: signal.Signals, code: int) -> None:
    with pytest.raises(KeyboardInterrupt) as stop, interruptible():
        signal.raise_signal(number)
    assert isinstance(stop.value, Interruption)
    assert stop.value.exit_code == code


def test_a_block_that_must_not_be_interrupted_is_done_first() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append("first half")
            signal.raise_signal(signal.SIGTERM)
            done.append("second half")
        done.append("afterwards")

    with interruptible(), pytest.raises(Interruption):
        work()
    assert done == ["first half", "second half"]


def test_an_error_in_such_a_block_is_not_lost_to_the_signal() -> None:
    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("broken")

    with interruptible(), pytest.raises(Interruption) as stop:
        work()
    assert isinstance(stop.value.__context__, ValueError)


def test_other_threads_are_left_alone() -> None:
    outcomes = []

    def work() -> None:
        with interruptible(), uninterrupted():
            outcomes.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes == ["done"]


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before
        inside = signal.getsignal(signal.SIGTERM)
        with uninterrupted():
            assert signal.getsignal(signal.SIGTERM) is not inside
        assert signal.getsignal(signal.SIGTERM) is inside
    assert signal.getsignal(signal.SIGTERM) is before
