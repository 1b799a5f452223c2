"""wespeaker's training step with a fused projection: ``get_projection`` from another module, and one line of the executor.

The loop is that of ``wespeaker/utils/executor.py``, with points in the place of utterances. ``python examples/switch_wespeaker.py``;
wespeaker itself is not needed.
"""

from __future__ import annotations

import torch
from torch import nn

# from wespeaker.models.projections import get_projection           # before
from marginkernels.compat.wespeaker import get_projection  # after


class Accuracy:
    """As torchnet's ``ClassErrorMeter(accuracy=True)``, which wespeaker's executor uses."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def add(self, scores, targets) -> None:
        self.right += int((scores.argmax(1) == targets).sum())
        self.count += len(targets)


def main(speakers: int = 200, steps: int = 80, kind: str = "arc_margin_intertopk_subcenter") -> list[float]:
    """Train a small network with a margin that grows; the accuracies of the steps, margin included."""
    torch.manual_seed(0)
    voices = torch.randn(speakers, 64)
    conf = {"project_type": kind, "embed_dim": 32, "num_class": speakers, "scale": 32.0, "easy_margin": False}
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    model.add_module("projection", get_projection(conf))
    encoder = model[:3]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    accuracies = []
    for step in range(steps):
        if hasattr(model.projection, "update"):  # wespeaker's MarginScheduler
            model.projection.update(margin=0.2 * step / steps)
        targets = torch.randint(speakers, (128,))
        embeds = encoder(voices[targets] + 0.3 * torch.randn(128, 64))
        outputs = model.projection(embeds, targets)
        if isinstance(outputs, tuple):
            outputs, loss = outputs
        else:
            loss = criterion(outputs, targets)
        acc_meter = Accuracy()
        # acc_meter.add(outputs.cpu().detach().numpy(), targets.cpu().numpy())      # before; it works as it is, with N x C bytes on the CPU
        acc_meter.add(*outputs.right_or_not())  # after
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(acc_meter.right / acc_meter.count)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  margin {model.projection.margin:.2f}  loss {loss.item():.3f}  accuracy {accuracies[-1]:.2f}")
    return accuracies


if __name__ == "__main__":
    main()
