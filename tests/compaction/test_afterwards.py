"""A compact network is an ordinary module: it exports, compiles, copies, and goes on training."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import prune_channels
from lightning_prune.models import resnet20
from tests.channels.networks import build, image

EXPORTED = ["Plain", "Residual", "Dense", "Depthwise", "Grouped", "Transposed", "FlattenLinear", "SqueezeExcite", "Shuffle",
            "PixelShuffle", "PadShortcut", "SpaceToDepth"]  # fmt: skip


def compacted(name: str) -> tuple[nn.Module, Tensor]:
    model, x = build(name).eval(), image()
    return prune_channels(model, x, target=0.6, method="random", prune_streams=True, seed=1).model.eval(), x


@pytest.mark.parametrize("name", EXPORTED)
def test_torch_export(name: str) -> None:
    model, x = compacted(name)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["Residual", "Dense", "Depthwise", "Shuffle", "SqueezeExcite", "PixelShuffle"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the exported file is checked with onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model, x = compacted(name)
    path = tmp_path / "net.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
    assert float(error) <= 1e-4


@pytest.mark.parametrize("name", ["Residual", "Shuffle", "Dense"])
def test_torch_compile(name: str) -> None:
    model, x = compacted(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_deepcopy_and_further_training() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 16, 16), torch.arange(64) % 4
    smaller = prune_channels(resnet20(num_classes=4), x[:2], target=0.5).model
    twin = copy.deepcopy(smaller)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in smaller.parameters()}
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.05, momentum=0.9)
    before = {k: v.clone() for k, v in smaller.state_dict().items()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in smaller.state_dict().items())
