"""The reference networks and the classifier module."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.data import DigitsDataModule
from lightning_prune.models import ArticleNet, Classifier, resnet20


def _trainer(**arguments: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_article_net_has_the_layers_of_the_article(channels: int, size: int) -> None:
    widths = (4, 5, 6, 7, 11)
    net = ArticleNet(channels, size, widths, num_classes=3)
    names = [type(m).__name__ for m in net.modules() if not list(m.children()) and not isinstance(m, nn.ReLU)]
    conv_conv_pool = ["Conv2d", "Conv2d", "MaxPool2d"]
    assert names == [*conv_conv_pool, *conv_conv_pool, "Flatten", "Dropout", "Linear", "Linear"]
    assert net(torch.randn(2, channels, size, size)).shape == (2, 3)
    expected = sum(a * b * 9 + b for a, b in ((channels, 4), (4, 5), (5, 6), (6, 7)))
    expected += 7 * (size // 4) ** 2 * 11 + 11 + 11 * 3 + 3
    assert sum(p.numel() for p in net.parameters()) == expected


def test_article_net_with_batch_norm_has_no_convolution_bias() -> None:
    net = ArticleNet(1, 8, (2, 2, 2, 2, 4), batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 4
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "arguments", [{"size": 10}, {"size": 0}, {"widths": (1, 2, 3)}, {"widths": (1, 2, 3, 4, 0)}]
)
def test_article_net_refuses_impossible_sizes(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"size|widths"):
        ArticleNet(**arguments)


def test_resnet20_has_the_published_parameter_count() -> None:
    """0.27 M at width 16 (He et al. 2016, table 6); 19 3x3 convolutions and 2 projections."""
    net = resnet20()
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 19
    assert sum(m.kernel_size == (1, 1) for m in convolutions) == 2
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 0.27
    small = resnet20(num_classes=4, in_channels=1, width=4)
    assert small(torch.randn(2, 1, 16, 16)).shape == (2, 4)


def test_classifier_forward_gives_the_logits_of_its_model() -> None:
    net = ArticleNet(1, 8, (2, 2, 2, 2, 4)).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(Classifier(net).eval()(x), net(x))


def test_classifier_learns_digits_and_logs_what_it_learnt() -> None:
    L.seed_everything(0, verbose=False)
    dm = DigitsDataModule(batch_size=32)
    lit = Classifier(ArticleNet(1, 8, (12, 12, 24, 24, 48)), lr=2e-3)
    trainer = _trainer(max_epochs=6)
    trainer.fit(lit, datamodule=dm)
    logged = dict(trainer.callback_metrics)
    assert {"train_loss", "train_acc", "val_loss", "val_acc"} <= set(logged)
    (tested,) = trainer.test(lit, datamodule=dm, verbose=False)
    assert tested["test_acc"] > 0.9

    data = dm.part("test")
    lit.eval()
    with torch.no_grad():
        logits = lit(data.inputs)
    assert tested["test_acc"] == pytest.approx(
        (logits.argmax(1) == data.labels).float().mean().item(), abs=1e-6
    )
    loss = (-logits.log_softmax(1)[torch.arange(len(data)), data.labels]).mean().item()
    assert tested["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_classifier_optimizer_and_schedule() -> None:
    constant = Classifier(nn.Linear(2, 2), lr=0.25, weight_decay=0.5).configure_optimizers()
    assert isinstance(constant, torch.optim.Adam)
    assert constant.defaults["lr"] == 0.25
    assert constant.defaults["weight_decay"] == 0.5
    decayed = Classifier(nn.Linear(2, 2), lr=0.25, total_steps=10).configure_optimizers()
    assert isinstance(decayed, dict)
    optimizer, scheduler = decayed["optimizer"], decayed["lr_scheduler"]["scheduler"]
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.5)) / 2)
    with pytest.raises(ValueError, match="lr must be positive"):
        Classifier(nn.Linear(2, 2), lr=0.0)
