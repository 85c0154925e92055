"""The paper's networks (Table 4) and ResNet-18 for 32×32 images."""

from __future__ import annotations

from torch import nn


def cnn(width: int, classes: int) -> nn.Sequential:
    """Return a network of Table 4, whose `Conv2d(in, out, 3, 2)` reads kernel 3, padding 2, stride 1.

    Takes `[B, 3, 32, 32]`; the last maps are 3×3. width: filters of each of the four convolutions, ≥ 1.
    """
    # Pooling stands before LeakyReLU, not after it as in the table: the maximum of a rising function is the function of
    # the maximum, to the bit, and a quarter of the values is left to go through it.
    layers: list[nn.Module] = []
    for channels in (3, width, width, width):
        convolution = nn.Conv2d(channels, width, 3, padding=2)
        layers += [convolution, nn.BatchNorm2d(width), nn.MaxPool2d(2, 2), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, classes))


def resnet18(classes: int) -> nn.Module:
    """Return ResNet-18 for 32×32 images: a 3×3 first convolution of stride 1 and no pooling after it."""
    from torchvision.models import resnet18 as resnet18_for_imagenet

    model: nn.Module = resnet18_for_imagenet(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
