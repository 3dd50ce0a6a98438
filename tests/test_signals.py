import os
import signal
import time

import pytest

from mlxlora.files import atomic_directory
from mlxlora.verbs.signals import ending_cleanly


@pytest.fixture
def handled():
    """Sets how a signal is handled, for the length of a test; these may run under nohup."""
    before = {}

    def handle(number, how):
        before.setdefault(number, signal.signal(number, how))

    yield handle
    for number, how in before.items():
        signal.signal(number, how)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_half_written_goes_when_the_terminal_does(handled, number, tmp_path):
    handled(number, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), ending_cleanly(), atomic_directory(tmp_path / "x") as d:
        (d / "half").write_text("")
        os.kill(os.getpid(), number)
        for _ in range(1000):  # the signal may come to another thread first
            time.sleep(0.01)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_respected(handled):
    handled(signal.SIGHUP, signal.SIG_IGN)
    with ending_cleanly():
        os.kill(os.getpid(), signal.SIGHUP)
