"""Open Metric Learning's ArcFace loss, fused: one changed import. ``pip install open-metric-learning``, then
``python examples/switch_oml.py``."""

from __future__ import annotations

import torch

# from oml.losses import ArcFaceLoss                     # before
from marginkernels.compat.oml import ArcFaceLoss  # after


def main(classes: int = 200, steps: int = 60, dim: int = 32) -> list[float]:
    """Train a small network on points around ``classes`` centers; the accuracies of the steps."""
    torch.manual_seed(0)
    centers = torch.randn(classes, 64)
    extractor = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, dim))
    criterion = ArcFaceLoss(in_features=dim, num_classes=classes, m=0.2, s=30, smoothing_epsilon=0.1)
    optimizer = torch.optim.AdamW([*extractor.parameters(), *criterion.parameters()], lr=1e-2)
    accuracies = []
    for step in range(steps):
        labels = torch.randint(classes, (128,))
        loss = criterion(extractor(centers[labels] + 0.3 * torch.randn(128, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(float(criterion.last_logs["accuracy"]))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}  accuracy {accuracies[-1]:.2f}  fused {criterion.fused}")
    return accuracies


if __name__ == "__main__":
    main()
