"""ResNet-20 for 32×32 images, as He et al. (2016) have it, with shortcuts of 1×1 convolutions.

convsim train --arch tests.benchmarks.resnet20:resnet20        # from the root of a clone
"""

from __future__ import annotations

from torch import Tensor, nn

BLOCKS = 3  # per stage
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3×3 convolutions, and a shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        return self.relu(inner + self.downsample(images))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Return the network (272,474 parameters with 10 classes), initialized as torch does."""
    blocks, channels = [], WIDTHS[0]
    for width in WIDTHS:
        for number in range(BLOCKS):
            blocks.append(Block(channels, width, 2 if number == 0 and width > channels else 1))
            channels = width
    stem = [nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
