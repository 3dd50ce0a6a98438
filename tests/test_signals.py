import os
import signal
import time

import pytest

from mlxlora.files import atomic_directory
from mlxlora.verbs.signals import ending_cleanly


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_half_written_goes_when_the_terminal_does(number, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), ending_cleanly(), atomic_directory(tmp_path / "x") as d:
        (d / "half").write_text("")
        os.kill(os.getpid(), number)
        for _ in range(1000):  # the signal may come to another thread first
            time.sleep(0.01)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_cleanly():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
