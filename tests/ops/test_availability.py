"""What can run here, the reasons when it cannot, the choice of CPU level, and the pure-torch fallback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_prune import ops
from lightning_prune.ops import _loading, availability
from tests.ops.conv_cases import LEVELS

X, WEIGHT = torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 1, 1)
FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lightning_prune import ops
    import lightning_prune.nn as pnn
import torch
assert len(caught) == 1 and "without its compiled kernels" in str(caught[0].message), caught
assert not ops.extension_available()
answer = ops.can_run_masked_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 1, 1))
assert not answer and "LIGHTNING_PRUNE_DISABLE_EXT" in answer.reason
conv = torch.nn.Conv2d(3, 5, 3, padding=1)
x = torch.randn(2, 3, 6, 6)
masked = pnn.MaskedConv2d.from_conv(conv)
masked.set_live(None, torch.tensor([1, 4]))
y = masked(x)
assert torch.allclose(y[:, [1, 4]], conv(x)[:, [1, 4]], atol=1e-6) and not y[:, [0, 2, 3]].any()
y.sum().backward()
assert conv.weight.grad is not None and not conv.weight.grad[0].any()
grads = ops.masked_conv2d_backward(torch.ones_like(y), None, x, conv.weight, conv.bias, padding=1)
assert torch.allclose(grads[2], torch.full((5,), 72.0)) and grads[3] is None
with torch.no_grad():
    assert torch.allclose(pnn.CompactConv2d.from_conv(conv, activation="relu")(x), conv(x).relu(), atol=1e-5)
try:
    ops.masked_conv2d(x, conv.weight, live_in=torch.tensor([2, 1]))
    raise SystemExit("an unsorted index was accepted")
except ValueError as error:
    assert "sorted" in str(error)
print("fallback ok")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_the_fallback_computes_the_same_and_warns_once() -> None:
    done = run_python(FALLBACK, LIGHTNING_PRUNE_DISABLE_EXT="1")
    assert "fallback ok" in done.stdout, done.stderr


def test_a_library_that_does_not_load_gives_built_for_and_you_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_loading, "library_path", lambda: broken)
    reason = _loading._load()
    assert reason is not None
    assert "built for torch" in reason
    assert f"you have torch {torch.__version__}" in reason
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert "upgrade torch" in (_loading._load() or "")
    monkeypatch.setattr(_loading, "library_path", lambda: None)
    assert "pure Python" in (_loading._load() or "")


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_can_run_explains_each_refusal() -> None:
    assert ops.can_run_masked_conv2d(X, WEIGHT) == (True, None)
    refusals = {
        "float32, float64; x is float16": ops.can_run_masked_conv2d(X.half(), WEIGHT.half()),
        "weight must have x's dtype": ops.can_run_masked_conv2d(X, WEIGHT.double()),
        "runs on cpu and cuda; x is on meta": ops.can_run_masked_conv2d(X.to("meta"), WEIGHT),
        "4-D input": ops.can_run_compact_conv2d(X[0]),
        "x is int64": ops.can_run_compact_conv2d(X.long()),
        "no gradient": ops.can_run_compact_conv2d(X.clone().requires_grad_()),
    }
    for words, answer in refusals.items():
        assert not answer
        assert answer.reason is not None
        assert words in answer.reason


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_cpu_level_is_capped_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the table says that the operators run, and by what the library without torch says."""
    build = _loading.build_info()
    assert build is not None
    for level in LEVELS:
        for spelling in (level, level.upper()):
            monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", spelling)
            assert (availability.cpu_kernels(), build.cpu_level()) == (level, level)
    for cap in (None, "", "avx512"):  # a cap above what the CPU has does not raise the level
        if cap is None:
            monkeypatch.delenv("LIGHTNING_PRUNE_CPU_LEVEL")
        else:
            monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", cap)
        assert (availability.cpu_kernels(), build.cpu_level()) == (LEVELS[-1], LEVELS[-1])


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_every_cpu_level_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = {"portable": 4, "avx2": 8, "avx512": 16}
    for level in LEVELS:
        monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", level)
        assert torch.ops.lightning_prune.kernel_table() == (level, lanes[level])


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
@pytest.mark.parametrize("level", ["avx-2", "avx", "avx5120", "sse", "1"])
def test_a_misspelt_cpu_level_is_refused(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = ops.pack_conv2d_weight(WEIGHT)
    build = _loading.build_info()
    assert build is not None
    monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", level)
    calls: list[Callable[[], object]] = [
        availability.cpu_kernels,
        build.cpu_level,
        lambda: ops.compact_conv2d(X, packed, None, None, None, None, WEIGHT.shape),
        lambda: ops.masked_conv2d(X, WEIGHT),
    ]
    for call in calls:
        with pytest.raises(
            RuntimeError, match=f"must be one of portable, avx2, avx512 or unset; got '{level}'"
        ):
            call()


def test_cpu_features_are_those_of_this_cpu() -> None:
    build = _loading.build_info()
    if build is None or not os.path.exists("/proc/cpuinfo"):
        pytest.skip("no build information or no /proc/cpuinfo")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = build.cpu_features()
    assert features["avx2"] == ("avx2" in flags and "fma" in flags)
    assert features["avx512"] == (
        features["avx2"] and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)
    )


def test_warning_only_without_the_extension(recwarn: pytest.WarningsRecorder) -> None:
    availability.warn_if_unavailable()
    assert bool(recwarn.list) == (not ops.extension_available())
