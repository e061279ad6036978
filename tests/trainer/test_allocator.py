"""Test malloc settings in new processes, which they affect permanently."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from entrace.trainer.kernels.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.empty(1_000_000).fill_(1) for _ in range(25)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults(), page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_that_was_freed_is_there_the_second_time():
    found = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        found[how] = tuple(map(int, done.stdout.split()))
    first, second = found["keep"]
    assert second < first / 2
    first, second = found["give back"]
    assert second > first / 2, "the system is asked each time, else"
