import signal
import subprocess
import sys
import threading
import time

import pytest

from sim.commands.interruption import (
    CalledOff,
    Interruption,
    call_off,
    interruptible,
    keeping_handlers,
    signals_waiting,
    uninterrupted,
)


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


class BrokenError(Exception):
    pass


def test_another_thread_can_call_the_main_one_off_where_it_waits() -> None:
    caller = threading.Timer(0.05, call_off, [BrokenError("gone")])
    caller.start()
    with pytest.raises(BrokenError, match="gone"), interruptible():
        time.sleep(60)
    caller.join()


def test_nobody_takes_it_for_an_error_of_their_own() -> None:
    def careless() -> None:
        call_off(BrokenError("gone"))
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("was taken for an error")

    with pytest.raises(BrokenError), interruptible():
        careless()


def test_being_called_off_waits_like_a_signal_and_does_not_outlive_its_block() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            call_off(BrokenError("gone"))
            done.append("all of it")

    with pytest.raises(BrokenError), interruptible():
        work()
    assert done == ["all of it"]
    call_off(BrokenError("too late"))
    with interruptible():
        pass


@pytest.mark.parametrize("stop", [CalledOff(BrokenError("gone")), Interruption(signal.SIGTERM)])
def test_what_c_code_makes_of_a_signal_is_undone(stop: BaseException) -> None:
    with pytest.raises((BrokenError, Interruption)) as raised, interruptible():
        raise SystemError("returned a result with an exception set") from stop
    assert raised.value in (stop, getattr(stop, "error", None))
    with pytest.raises(SystemError), interruptible():
        raise SystemError("of another kind")


def test_a_library_s_handlers_are_replaced_and_its_exit_is_an_interruption() -> None:
    def library() -> None:
        def leave(number: int, _: object) -> None:
            raise SystemExit(number)

        signal.signal(signal.SIGTERM, leave)

    with interruptible():
        before = signal.getsignal(signal.SIGTERM)
        with keeping_handlers():
            library()
        assert signal.getsignal(signal.SIGTERM) is before

    def leaves() -> None:
        with keeping_handlers():
            library()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interruption) as stop, interruptible():
        leaves()
    assert stop.value.exit_code == 143


def test_a_signal_that_waits_comes_afterwards() -> None:
    done = []

    def work() -> None:
        with signals_waiting():
            signal.raise_signal(signal.SIGTERM)
            done.append("first")
        done.append("afterwards")

    with interruptible(), pytest.raises(Interruption):
        work()
    assert done == ["first"]


def test_processes_that_are_forked_meanwhile_do_not_wait() -> None:
    program = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"

    def blocked() -> str:
        # As Ray starts its processes: with something to do between fork and exec.
        command = [sys.executable, "-c", program]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=int).stdout

    before = blocked()
    with signals_waiting():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert blocked() == before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
