"""What embeddings of unseen identities are worth: verification, identification, with intervals over identities.

An interval is a bootstrap over identities, not over pairs: identities are drawn again with replacement, and each pair counts as often as
both of its identities were drawn. The threshold of a false accept rate is found anew in every draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marginkernels.demo.evaluate import BINS, Verification, bins_of, verify_pairs

FARS = (1e-2, 1e-3, 1e-4, 1e-5)
#: Ranks of the CMC curve that are kept.
RANKS = (1, 2, 3, 5, 10, 20, 50, 100)
#: Added to the gallery: so many identities, and all that there are.
DISTRACTORS = (1_000, 10_000)
#: False accept rates of the curve that is kept.
CURVE = tuple(10 ** (-5 + k / 6) for k in range(31))
DRAWS = 200
#: Of the middle of the draws, so much lies in the interval.
COVERED = 0.95


@dataclass(frozen=True)
class Tail:
    """The pairs that decide: all of the same identity, and those of different ones with the highest cosines. Each pair once.

    Attributes:
        lowest: bin from which on there are pairs of different identities.
        genuine_bins, genuine: (G,) bins of the cosines, and the identities.
        impostor_bins, first, second: (P,) bins of the cosines, and both identities.
    """

    lowest: int
    genuine_bins: Tensor
    genuine: Tensor
    impostor_bins: Tensor
    first: Tensor
    second: Tensor


def tail_of(unit: Tensor, identities: Tensor, lowest: int, block: int = 1024) -> Tail:
    """The pairs of rows of ``unit`` (M, D), of norm 1; those of different identities from bin ``lowest`` on."""
    genuine, impostor = [], []
    for start in range(0, len(unit), block):
        rows = slice(start, start + block)
        bins = bins_of(unit[rows] @ unit[start:].T)
        pair = torch.ones_like(bins, dtype=torch.bool).triu(1)
        same = identities[rows, None] == identities[None, start:]
        i, j = (same & pair).nonzero(as_tuple=True)
        genuine.append((bins[i, j], identities[start + i]))
        i, j = (~same & pair & (bins >= lowest)).nonzero(as_tuple=True)
        impostor.append((bins[i, j], identities[start + i], identities[start + j]))
    return Tail(lowest, *map(torch.cat, zip(*genuine, strict=True)), *map(torch.cat, zip(*impostor, strict=True)))


def drawn_again(tail: Tail, counts: Tensor, times: Tensor) -> Verification:
    """The histograms where identity k counts ``times[k]`` times: (K,) float64. ``counts`` (K,) is the images of each.

    Pairs of different identities below the tail are all in the bin below it. Two copies of one identity make no pair.
    """
    genuine = torch.bincount(tail.genuine_bins, times[tail.genuine], minlength=BINS)
    impostor = torch.bincount(tail.impostor_bins, times[tail.first] * times[tail.second], minlength=BINS)
    images = times * counts
    impostor[max(tail.lowest - 1, 0)] += (images.sum() ** 2 - (images**2).sum()) / 2 - impostor.sum()
    return Verification(genuine, impostor, float("nan"))


def interval(values: Tensor) -> list[float]:
    """The ends of the middle ``COVERED`` of the draws."""
    edge = (1 - COVERED) / 2
    return [float(v) for v in torch.quantile(values.double(), torch.tensor([edge, 1 - edge], dtype=torch.float64))]


def verification(embeddings: Tensor, identities: Tensor, seed: int = 0) -> dict[str, Any]:
    """True accept rates at ``FARS`` with their intervals, and the curve at ``CURVE``.

    Args:
        embeddings: (M, D), of any norm.
        identities: (M,) int64 in [0, K), each with at least two images.
    """
    unit = F.normalize(embeddings.float())
    found = verify_pairs(unit, identities)
    false, _ = found.roc()
    # A draw's threshold can lie lower than that of all identities: the tail has twice as many pairs.
    lowest = max(0, BINS - int((false <= 2 * max(FARS)).sum()) - 1)
    tail = tail_of(unit, identities, lowest)
    counts = torch.bincount(identities).double()
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(DRAWS):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        again = drawn_again(tail, counts, torch.bincount(drawn, minlength=len(counts)).double())
        draws.append([again.tar(far) for far in FARS])
    return {
        "tar": {f"{far:g}": _figure(found.tar(far), torch.tensor(draws)[:, k]) for k, far in enumerate(FARS)},
        "curve": [round(found.tar(far), 5) for far in CURVE],
        "pairs": {"genuine": len(tail.genuine), "impostor": int(found.impostor.sum()) // 2},
    }


def identification(embeddings: Tensor, identities: Tensor, others: Tensor, seed: int = 0) -> dict[str, Any]:
    """The CMC curve of a gallery with one image of each identity, drawn at random, and rank 1 among distractors.

    Args:
        embeddings, identities: as in :func:`verification`; images that are not in the gallery are the probes.
        others: (P, D) images of other identities, one of each.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(identities), generator=generator)
    by_identity = order[torch.argsort(identities[order], stable=True)]
    sorted_identities = identities[by_identity]
    first = torch.ones(len(identities), dtype=torch.bool)
    first[1:] = sorted_identities[1:] != sorted_identities[:-1]
    gallery, probes = by_identity[first], by_identity[~first]
    unit, others = F.normalize(embeddings.float()), F.normalize(others.float())[torch.randperm(len(others), generator=generator)]
    sizes = [n for n in DISTRACTORS if n < len(others)] + [len(others)]
    owner = identities[probes]
    ahead, closest = [], []
    for part in torch.split(probes, 1024):
        cos = unit[part] @ unit[gallery].T
        own = cos.gather(1, identities[part][:, None])
        ahead.append((cos > own).sum(1))
        far = unit[part] @ others.T
        closest.append(torch.stack([(far[:, :n] > own).any(1) for n in sizes], 1) if len(others) else far.new_zeros(len(part), 1).bool())
    rank, beaten = torch.cat(ahead) + 1, torch.cat(closest)
    weights = torch.stack([torch.bincount(torch.randint(len(gallery), (len(gallery),), generator=generator), minlength=len(gallery))
                           for _ in range(DRAWS)])[:, owner].double()  # fmt: skip

    def share(hit: Tensor) -> list[float]:
        return _figure(float(hit.double().mean()), weights @ hit.double() / weights.sum(1))

    return {
        "gallery": len(gallery),
        "probes": len(probes),
        "cmc": {str(r): round(float((rank <= r).double().mean()), 5) for r in RANKS},
        "rank1": {"0": share(rank == 1)} | {str(n): share((rank == 1) & ~beaten[:, k]) for k, n in enumerate(sizes) if n},
    }


def _figure(value: float, draws: Tensor) -> list[float]:
    """The value and the ends of its interval."""
    return [round(v, 5) for v in (value, *interval(draws))]


def histogram(degrees: Tensor, width: float) -> list[int]:
    """Counts of angles (M,) in bins of ``width`` degrees over [0, 180]."""
    return torch.histc(degrees.float(), round(180 / width), 0, 180).long().tolist()
