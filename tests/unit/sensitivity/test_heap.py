"""Freed memory is kept for passes that repeat, and given back at their end."""

import ctypes
import os
import sys

import pytest
import torch

from hawq_lightning.sensitivity import pages_kept
from tests.console import python
from tests.internals import internal

resource = pytest.importorskip("resource")
if not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")):
    pytest.skip("needs Linux with glibc", allow_module_level=True)

MIB, BLOCKS = 1 << 20, 24
COUNTED = f"""
import contextlib, resource, torch
from hawq_lightning.sensitivity import pages_kept

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones({MIB}) for _ in range({BLOCKS})]  # 4 MiB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

torch.ones(16 * {MIB})  # freed: from here on blocks up to its size come from the heap
outside = [new_pages() for _ in range(3)]
before = resident()
with pages_kept(), pages_kept():
    with pages_kept():
        new_pages()
    inside = [new_pages() for _ in range(3)]
print(max(inside), min(outside), resident() - before)
"""


def counted(tmp_path, **environment):
    done = python(COUNTED, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def test_passes_find_their_pages_again_and_leave_none(tmp_path):
    inside, outside, left = counted(tmp_path)
    assert outside > BLOCKS * 4 * MIB // os.sysconf("SC_PAGE_SIZE") // 2
    assert inside < outside / 20
    assert left < outside / 4


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}]
)
def test_thresholds_of_the_user_stay(monkeypatch, setting):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    mallopt = internal("sensitivity._heap")._mallopt
    mallopt.cache_clear()
    try:
        assert mallopt() is None
        with pages_kept():
            assert float(torch.ones(3).sum()) == 3
    finally:
        mallopt.cache_clear()


def test_an_error_inside_ends_it(tmp_path):
    raising = COUNTED.replace(
        "outside =", "\ntry:\n    with pages_kept():\n        1 / 0\nexcept ZeroDivisionError:\n    pass\noutside =", 1
    )
    done = python(raising, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    inside, outside, _ = map(int, done.stdout.split())
    assert outside > BLOCKS * 4 * MIB // os.sysconf("SC_PAGE_SIZE") // 2
    assert inside < outside / 20
