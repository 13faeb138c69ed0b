"""Small reference networks and a LightningModule around any classifier; nothing here knows about pruning."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class ArticleNet(nn.Module):
    """Conv, Conv, Pool, Conv, Conv, Pool, Flatten, Dropout, Dense, Dense: the network of the source article.

    Each convolution (3x3, padding 1) and the first dense layer is followed by ReLU, and is where a pruning method puts
    a mask; the network itself has none. Source: "Channel pruning by variational optimisation", Habr 413939 (2018).

    Args:
        in_channels: of the input.
        size: edge length of the square input in pixels; a multiple of 4.
        widths: output channels of the four convolutions and of the first dense layer.
        num_classes: number of logits.
        dropout: probability before the first dense layer.
        batch_norm: put a batch normalisation between each convolution and its ReLU (the article has none).

    Shape:
        input float (n, in_channels, size, size), output float (n, num_classes).

    Raises:
        ValueError: ``size`` is not a positive multiple of 4, or ``widths`` are not five positive numbers.
    """

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 32,
        widths: Sequence[int] = (32, 32, 64, 64, 128),
        num_classes: int = 10,
        dropout: float = 0.5,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if size < 4 or size % 4:
            raise ValueError(f"size must be a positive multiple of 4 (two poolings by 2), got {size}")
        if len(widths) != 5 or min(widths) < 1:
            raise ValueError(
                f"widths must be five positive numbers (four convolutions, one dense), got {widths}"
            )
        c1, c2, c3, c4, dense = widths

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm)]
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            return [*layers, nn.ReLU()]

        self.features = nn.Sequential(
            *block(in_channels, c1),
            *block(c1, c2),
            nn.MaxPool2d(2),
            *block(c2, c3),
            *block(c3, c4),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(c4 * (size // 4) ** 2, dense),
            nn.ReLU(),
            nn.Linear(dense, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (a strided 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network for small images: a stem, three stages of basic blocks, global average pooling, one dense layer.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2, with projection shortcuts.

    Args:
        blocks: basic blocks per stage (3 gives 20 layers, 9 gives 56).
        num_classes: number of logits.
        in_channels: of the input.
        width: channels of the first stage; the next stages have twice and four times as many.

    Shape:
        input float (n, in_channels, h, w), output float (n, num_classes).
    """

    def __init__(self, blocks: int = 3, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if blocks < 1 or width < 1:
            raise ValueError(f"blocks and width must be positive, got blocks={blocks}, width={width}")
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stages.append(_BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes)."""
        out = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(out.mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """The 20-layer residual network for small images (He et al. 2016): 0.27 M parameters at width 16."""
    return CifarResNet(3, num_classes, in_channels, width)


class Classifier(L.LightningModule):
    """Cross-entropy training of any ``nn.Module`` that maps inputs to logits.

    Logs ``train_loss``, ``train_acc``, ``val_loss``, ``val_acc``, ``test_loss``, ``test_acc`` (per epoch; accuracy is
    the share of correct samples).

    Args:
        model: inputs -> logits of shape (n, num_classes).
        lr: learning rate of Adam.
        num_classes: number of classes.
        weight_decay: of Adam (L2 on all parameters).
        total_steps: optimizer steps of the whole fit, for a cosine decay of the learning rate to zero; None keeps it
            constant.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.5e-3,
        num_classes: int = 10,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.total_steps = total_steps
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes)."""
        logits: Tensor = self.model(x)
        return logits

    def _step(self, batch: tuple[Tensor, Tensor], part: str, accuracy: MulticlassAccuracy) -> Tensor:
        inputs, labels = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{part}_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log(f"{part}_acc", accuracy, on_step=False, on_epoch=True, prog_bar=part != "test")
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of (inputs, labels)."""
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._step(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._step(batch, "test", self.test_acc)

    def configure_optimizers(self) -> dict[str, object] | torch.optim.Optimizer:  # type: ignore[override]
        """Adam, with a cosine decay if ``total_steps`` is given."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self.total_steps is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
