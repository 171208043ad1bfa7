"""A forked child: OpenMP's threads stay in the parent, and nothing may wait for them."""

import os
import subprocess
import sys

import pytest

import hdrq

FORKS = """
import os, time
import torch, hdrq

x, scale = torch.arange(1 << 20) / 1e4, torch.tensor([0.1])
torch.set_num_threads(2)
want = hdrq.ops.fake_quantize(x, scale, -8, 7)
child = os.fork()
if child == 0:
    same = hdrq.ops.fake_quantize(x, scale, -8, 7).numpy() == want.numpy()  # torch's own comparison would hang
    os._exit(0 if same.all() else 1)
deadline = time.monotonic() + 30
while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
    if time.monotonic() > deadline:
        os.kill(child, 9)
        raise SystemExit("the child hangs")
    time.sleep(0.05)
raise SystemExit(os.waitstatus_to_exitcode(done[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(hdrq.available_backends()["cpp"] is not None, reason="needs the extension")
def test_large_ops_run_in_a_forked_child():
    found = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
