"""Freed memory is kept for passes that repeat, and given back at their end."""

import ctypes
import os
import subprocess
import sys

import pytest

from tests.internals import internal

resource = pytest.importorskip("resource")
if not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")):
    pytest.skip("needs Linux with glibc", allow_module_level=True)

HEAP = internal("sensitivity._heap")
BLOCKS, BLOCK = 48, 1 << 21  # bytes; larger ones may come in huge pages
# in a Python that has made nothing else: what a heap holds at its top decides what is given back
COUNTED = f"""
import importlib.util, resource
import numpy as np

spec = importlib.util.spec_from_file_location("heap", {HEAP.__file__!r})
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones({BLOCK}, np.uint8) for _ in range({BLOCKS})]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

np.ones(1 << 24, np.uint8)  # freed: from here on blocks up to its size come from the heap
outside = [new_pages() for _ in range(3)]
before = resident()
try:
    with heap.pages_kept(), heap.pages_kept():
        with heap.pages_kept():
            new_pages()
        inside = [new_pages() for _ in range(3)]
        RAISES
except ZeroDivisionError:
    pass
left = resident() - before
print(max(inside), min(outside), left, min(new_pages() for _ in range(3)))
"""


@pytest.mark.parametrize("end", ["pass", "1 / 0"])
def test_passes_find_their_pages_again_and_leave_none(end):
    command = [sys.executable, "-c", COUNTED.replace("RAISES", end)]
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    inside, outside, left, again = map(int, done.stdout.split())
    pages = BLOCKS * BLOCK // os.sysconf("SC_PAGE_SIZE")
    assert outside > pages / 2 and inside < pages / 20
    assert left < pages / 4 and again > pages / 4


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}]
)
def test_thresholds_of_the_user_stay(monkeypatch, setting):
    assert HEAP._mallopt() is not None
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    HEAP._mallopt.cache_clear()
    try:
        assert HEAP._mallopt() is None
        with HEAP.pages_kept():
            assert not HEAP._INSIDE
    finally:
        HEAP._mallopt.cache_clear()
