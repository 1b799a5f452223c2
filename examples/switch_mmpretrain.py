"""mmpretrain's ArcFace head, fused: one line of a config. ``pip install mmpretrain mmcv-lite``, then
``python examples/switch_mmpretrain.py``.

In a config::

    custom_imports = dict(imports=["marginkernels.compat.mmpretrain"], allow_failed_imports=False)       # added
    model = dict(..., head=dict(type="ArcFaceClsHead", num_classes=5000, in_channels=1024))              # as it was
"""

from __future__ import annotations

import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import marginkernels.compat.mmpretrain  # noqa: F401  # what custom_imports does


def main(classes: int = 200, steps: int = 60) -> list[float]:
    """Train a small network in the place of backbone and neck; the losses of the steps."""
    torch.manual_seed(0)
    centers = torch.randn(classes, 64)
    neck = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    kind = MODELS.get("ArcFaceClsHead")
    head = kind(num_classes=classes, in_channels=32, num_subcenters=3, scale=30.0, margins=0.2)
    optimizer = torch.optim.AdamW([*neck.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for step in range(steps):
        labels = torch.randint(classes, (128,))
        feats = (neck(centers[labels] + 0.3 * torch.randn(128, 64)),)
        loss = head.loss(feats, [DataSample().set_gt_label(label) for label in labels])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  fused {head.fused}")
    return losses


if __name__ == "__main__":
    main()
