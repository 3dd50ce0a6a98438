import mmap

import mlx.core as mx
import pytest

from mlxlora import memory
from mlxlora.errors import ConfigError
from mlxlora.memory import Footprint, cache_limit, footprint, limits, parse_size


def current_limits() -> tuple[int, int]:
    found = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 30)
    mx.set_memory_limit(found[0])
    mx.set_cache_limit(found[1])
    return found


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16_000_000_000),
        ("16GiB", 16 << 30),
        ("512MB", 512_000_000),
        ("1.5 gib", 3 << 29),
        ("800k", 800_000),
        ("4096", 4096),
    ],
)
def test_a_size_is_read(text, size):
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "16 apples", "0GB", "3i", "9" * 40 + "GB"])
def test_what_is_no_size_is_one_message(text):
    with pytest.raises(ConfigError, match=r"--memory .*write a size such as 16GB"):
        parse_size(text, "--memory")


def test_limits_are_set_from_what_is_needed_and_undone():
    before = current_limits()
    with limits(1 << 30, 1 << 29):
        assert current_limits()[0] == int(memory.HEADROOM * (1 << 30))
    assert current_limits() == before
    with pytest.raises(ZeroDivisionError), limits(1 << 30, 1 << 29):
        raise ZeroDivisionError
    assert current_limits() == before


def test_limits_are_never_above_what_the_machine_offers():
    with limits(1 << 60, 1 << 60):
        assert current_limits()[0] <= memory.offered_memory() * 1.1


def test_a_limit_that_is_too_low_fails_nothing():
    with limits(1, 1):
        x = mx.random.normal((512, 512), key=mx.random.key(0))
        for _ in range(20):
            x = mx.tanh(x @ x)
        assert mx.isfinite(x.sum()).item()


def test_a_gpu_s_cache_is_a_fraction_of_the_budget(monkeypatch):
    assert cache_limit(16 << 30) == memory.CPU_CACHE
    monkeypatch.setattr(memory, "on_cpu", lambda: False)
    assert cache_limit(16 << 30) == 1 << 30
    before = current_limits()
    with limits(1 << 30, 1 << 29):
        assert current_limits()[1] == cache_limit(memory.memory_budget())
    assert current_limits() == before


def test_weights_and_a_margin_are_wired_on_metal_alone(monkeypatch):
    wired = []

    def wire(size):
        wired.append(size)
        return 7

    monkeypatch.setattr(mx, "set_wired_limit", wire)
    with limits(8 << 30, 4 << 30):
        pass
    assert wired == []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(memory, "offered_memory", lambda: 12 << 30)
    with limits(8 << 30, 4 << 30):
        pass
    assert wired == [(4 << 30) + memory.WIRED_MARGIN, 7]


def test_a_system_that_does_not_wire_is_no_error(monkeypatch):
    def refuse(size):
        raise RuntimeError("macOS 15 or later is needed")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with limits(8 << 30, 4 << 30):
        pass


def test_the_footprint_grows_with_what_is_held():
    before = footprint()
    if before == Footprint(0, 0):
        pytest.skip("this system does not tell")
    held = mmap.mmap(-1, 64 << 20)  # fresh pages, none that the C library kept
    held.write(b"x" * (64 << 20))
    after = footprint()
    assert after.now - before.now > (56 << 20)
    assert after.most >= after.now
    held.close()


def test_the_mac_s_structure_has_its_size():
    # sizeof(struct rusage_info_v4): 16 bytes, then 35 numbers of 8.
    assert memory._RusageInfo.phys_footprint.offset == 16 + 7 * 8
    assert memory._RusageInfo.lifetime_max_phys_footprint.offset == 16 + 28 * 8
