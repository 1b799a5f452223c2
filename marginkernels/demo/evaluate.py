"""Open-set verification: do two images show the same identity? The identities are not among those of the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli._progress import tqdm

#: Bins of the histograms of cosines over [-1, 1], so that thresholds are exact to 1e-4.
BINS = 20_000
FARS = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Verification:
    """The cosines of all pairs of a set of images.

    Attributes:
        genuine, impostor: (BINS,) float64 histograms of the cosines of pairs of the same identity and of different identities.
        rank1: share of the images whose nearest other image shows the same identity.
    """

    genuine: Tensor
    impostor: Tensor
    rank1: float

    def roc(self) -> tuple[Tensor, Tensor]:
        """False and true accept rates, (BINS,) each, by decreasing threshold."""
        far, tar = (h.flip(0).cumsum(0) / h.sum().clamp_min(1) for h in (self.impostor, self.genuine))
        return far, tar

    def tar(self, far: float) -> float:
        """True accept rate at the lowest threshold where the false accept rate is at most ``far``."""
        false, true = self.roc()
        within = int((false <= far).sum())
        return float(true[within - 1]) if within else 0.0


def bins_of(cos: Tensor) -> Tensor:
    """The bin of each cosine, int64."""
    return ((cos + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)


@torch.no_grad()
def verify_pairs(embeddings: Tensor, identities: Tensor, *, block: int = 1024) -> Verification:
    """Compare every image with every other one, ``block`` rows at a time.

    Args:
        embeddings: (M, D), of any norm.
        identities: (M,) int64; at least one identity must have two images.
    """
    unit = torch.nn.functional.normalize(embeddings.float())
    counts = torch.zeros(2 * BINS, dtype=torch.float64, device=unit.device)
    hits = 0
    for start in tqdm(range(0, len(unit), block), desc="verify", unit="block", leave=False):
        rows = slice(start, start + block)
        cos = unit[rows] @ unit.T
        same = identities[rows, None] == identities
        here = torch.arange(len(cos), device=unit.device)
        other = torch.ones_like(same)
        other[here, here + start] = False
        best = cos.masked_fill(~other, -2).argmax(1)
        hits += int(same[here, best].sum())
        bins = bins_of(cos) + BINS * same
        counts += torch.bincount(bins[other], minlength=2 * BINS)
    impostor, genuine = counts.cpu().view(2, BINS)
    return Verification(genuine, impostor, hits / len(unit))
