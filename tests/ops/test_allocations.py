"""Calls allocate their output and nothing else: scratch memory is kept from call to call."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lightning_prune import ops

pytestmark = [
    pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of Linux"),
]

# Any block of 32 KB and more is mapped afresh (and faults page by page), whoever allocates it; outputs are smaller, so that 40
# calls without a block of scratch memory have no faults. torch's profiler lists what its allocator gives out.
SCRIPT = """
import json, resource, sys, torch
from lightning_prune import ops
from lightning_prune.inference.optimize import _segmented
from lightning_prune.inference.symbolic import SymbolicBlueprint
from lightning_prune.models import resnet20

def count(make):
    # Anew a few times: where the output comes to lie, the system may take its pages away after every call.
    return min((counted(make()) for _ in range(4)), key=lambda found: found["faults"])

def counted(call):
    for _ in range(20):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        y = call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    given = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    return {"faults": faults, "given": given, "output": y.numel() * y.element_size()}

def convolution(algorithm, kernel, stride, size, inputs, outputs, groups=1, dtype=torch.float32, last=True):
    x = torch.randn(1, inputs, size, size).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    weight = torch.randn(outputs, inputs // groups, kernel, kernel)
    packed, shape = ops.pack_conv2d_weight(weight, groups, algorithm), list(weight.shape)
    arguments = (None, None, None, None, shape, stride, kernel // 2, 1, groups, "relu")
    return lambda: ops.compact_conv2d(x, packed, *arguments)

calls = {
    "direct 1x1": lambda: convolution("direct", 1, 1, 14, 64, 24),
    "direct 3x3": lambda: convolution("direct", 3, 1, 14, 64, 24),
    "direct 3x3, contiguous": lambda: convolution("direct", 3, 1, 14, 64, 24, last=False),
    "direct 3x3, stride 2": lambda: convolution("direct", 3, 2, 28, 64, 24),
    "planes": lambda: convolution("direct", 3, 1, 28, 3, 4),
    "depthwise": lambda: convolution("direct", 3, 1, 14, 31, 31, 31),
    "grouped": lambda: convolution("direct", 3, 1, 14, 64, 24, 2),
    "winograd2": lambda: convolution("winograd2", 3, 1, 14, 64, 24),
    "winograd4": lambda: convolution("winograd4", 3, 1, 14, 64, 24),
    "winograd4, contiguous": lambda: convolution("winograd4", 3, 1, 14, 64, 24, last=False),
    "winograd2 of 5x5": lambda: convolution("winograd2", 5, 1, 14, 64, 24),
    "winograd4_stride2": lambda: convolution("winograd4_stride2", 3, 2, 28, 64, 24),
    "winograd3_stride2": lambda: convolution("winograd3_stride2", 7, 2, 28, 3, 24),
    "strassen": lambda: convolution("strassen", 1, 1, 9, 300, 64),
    "bfloat16": lambda: convolution("winograd4", 3, 1, 14, 64, 24, dtype=torch.bfloat16),
}
torch.manual_seed(0)
x = torch.randn(1, 3, 32, 32)
blueprint = SymbolicBlueprint(resnet20().eval(), x)
network = _segmented(blueprint, blueprint.sites, None)[0].eval()
calls["a network in one segment"] = lambda: lambda: network(x)
torch.set_num_threads(int(sys.argv[1]))
with torch.no_grad():
    print(json.dumps({name: count(make) for name, make in calls.items()}))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_allocate_their_output_only(threads: int) -> None:
    # what is smaller comes from a heap that keeps its pages
    keep = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(16 << 20)}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(32 << 10), **keep}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(threads)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.strip().splitlines()[-1])
    for name, found in counted.items():
        assert found["output"] < 32 << 10, name
        assert found["given"] == [found["output"]], name
        # a few: the allocator's own books, a thread that wakes up for the first time
        assert found["faults"] < 20, (name, found["faults"])
