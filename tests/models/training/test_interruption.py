"""Signal handling, with signals that the test process sends to itself."""

import os
import signal
import threading

import pytest

from vitrine.models.training.interruption import Interrupted, handle_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with handle_signals() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert signal.getsignal(number) is before


def test_it_is_raised_immediately_inside_the_block() -> None:
    with handle_signals() as interruption:
        with pytest.raises(Interrupted), interruption.immediate():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted), interruption.immediate():
            pytest.fail("an earlier request is raised immediately")


def test_a_second_interrupt_is_python_s_own() -> None:
    with handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_ignore_signals() -> None:
    seen = []

    def listen() -> None:
        with handle_signals() as interruption:
            seen.append(interruption.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [False]
