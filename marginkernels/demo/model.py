"""A convolutional network small enough for two CPU cores."""

from __future__ import annotations

from torch import Tensor, nn

from .data import SIZE


def block(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution, batch normalization, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class GlyphNet(nn.Module):
    """Images (N, 1, SIZE, SIZE) in [0, 1] to embeddings (N, dim): five convolutions, then a linear layer over all positions.

    The last batch normalization gives embeddings an initial norm near sqrt(dim), for heads that do not normalize them.
    """

    def __init__(self, dim: int = 128, width: int = 16):
        super().__init__()
        self.features = nn.Sequential(
            block(1, width),
            nn.MaxPool2d(2),
            block(width, 2 * width),
            nn.MaxPool2d(2),
            block(2 * width, 4 * width),
            block(4 * width, 4 * width),
            nn.MaxPool2d(2),
            block(4 * width, 8 * width),
            nn.Flatten(),
        )
        self.embedding = nn.Sequential(nn.Linear(8 * width * (SIZE // 8) ** 2, dim, bias=False), nn.BatchNorm1d(dim))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.embedding(self.features(images))
        return embeddings
