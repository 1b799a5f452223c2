"""speechbrain's speaker recipe with a fused head: two lines of its YAML. ``pip install speechbrain``, then
``python examples/switch_speechbrain.py``.

In ``recipes/VoxCeleb/SpeakerRec/hparams/train_ecapa_tdnn.yaml``::

    classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier           # before
    classifier: !new:marginkernels.compat.speechbrain.Classifier              # after
    compute_cost: !new:speechbrain.nnet.losses.LogSoftmaxWrapper              # before
    compute_cost: !new:marginkernels.compat.speechbrain.LogSoftmaxWrapper     # after
        loss_fn: !new:speechbrain.nnet.losses.AdditiveAngularMargin
            margin: 0.2
            scale: 30
"""

from __future__ import annotations

import torch
from speechbrain.nnet.losses import AdditiveAngularMargin

from marginkernels.compat.speechbrain import Classifier, LogSoftmaxWrapper


def main(speakers: int = 200, steps: int = 60) -> list[float]:
    """Train a small network in the place of the encoder; the losses of the steps, and last the error rate of an evaluation."""
    torch.manual_seed(0)
    voices = torch.randn(speakers, 64)
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 192))
    classifier = Classifier(input_size=192, out_neurons=speakers)
    compute_cost = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))
    optimizer = torch.optim.Adam([*encoder.parameters(), *classifier.parameters()], lr=1e-3)
    losses = []
    for step in range(steps):
        spkid = torch.randint(speakers, (128, 1))
        embeddings = encoder(voices[spkid] + 0.3 * torch.randn(128, 1, 64))
        loss = compute_cost(classifier(embeddings), spkid, torch.ones(128))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  fused {compute_cost.fused}")
    classifier.eval()  # cosines (N, 1, C), for the recipe's error rate
    with torch.no_grad():
        predictions = classifier(encoder(voices.unsqueeze(1)))
    error = float((predictions.argmax(2)[:, 0] != torch.arange(speakers)).float().mean())
    print(f"error rate {error:.2f}")
    return [*losses, error]


if __name__ == "__main__":
    main()
