"""Memory is kept while a model is quantized, where the process asked for it, and given back afterwards."""

import ctypes
import platform
import subprocess
import sys
from unittest import mock

import pytest

import hdrq
from hdrq.methods.reconstruct.memory import kept_memory

SCRIPT = """
import resource, sys
import torch
from hdrq.methods.reconstruct.memory import keep_freed_memory, kept_memory

def faults(size=1 << 24, times=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(size)  # 64 MiB: more than glibc ever takes from its heap by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

outside, before = faults(), resident()
with keep_freed_memory(), kept_memory():
    inside, kept = faults(), resident()
after = resident()
again = faults(1 << 26, 5)  # as much in blocks that fit no hole of the heap
print(outside, inside, again, kept - before, after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept_and_then_given_back():
    run = [sys.executable, "-c", SCRIPT]
    figures = subprocess.run(run, capture_output=True, text=True, check=True, env={}).stdout.split()
    outside, inside, again, kept, after = map(int, figures)
    assert inside < 0.2 * outside and again > 0.8 * outside  # 20 times the pages of a block, or once
    assert kept >= 60 and after < 8  # MiB
    own = {"MALLOC_ARENA_MAX": "2"}  # the environment's settings stand
    figures = subprocess.run(run, capture_output=True, text=True, check=True, env=own).stdout.split()
    assert int(figures[1]) > 0.8 * int(figures[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_the_allocator_is_left_alone_unless_the_process_asks(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    libc = mock.Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)

    @kept_memory()
    def loop():
        return libc.mallopt.call_count

    assert loop() == 0
    with hdrq.keep_freed_memory():
        assert loop() > 0
        with hdrq.keep_freed_memory():
            pass
        libc.reset_mock()
        assert loop() > 0  # an inner context does not end the outer
    assert libc.malloc_trim.called
    libc.reset_mock()
    with pytest.raises(KeyError), hdrq.keep_freed_memory():
        raise KeyError
    assert loop() == 0 and not libc.method_calls
