"""Benchmarks of the fused margin heads beside their peers: ``python -m benchmarks --help``.

How a figure comes about:

- One process per case (head, N, D, C, dtype). In it every provider (ours and the peers) first runs the case once, and its loss and
  gradients are compared with a float64 reference; one that fails has no figure.
- Then the providers run in turn, round after round, the order rotating, so that a disturbance of the machine meets all of them.
  Percentiles over the rounds are recorded. On a GPU the L2 cache is overwritten before every call.
- ``forward`` is the loss with gradients required, ``step`` is forward and backward, ``train`` adds one SGD-momentum step of the class
  centres. Gradient buffers are released before each call, so every provider allocates its own.
- ``bf16`` is mixed precision as trained: embeddings and products bfloat16, class centres and their gradient float32.
- TFLOP/s count the useful work of the head and nothing else: 2NDC for forward, 8NDC for step and train, whatever a provider really does.
  ``share`` is that over a large matrix product measured among the same rounds.
- ``peak_mb`` is the highest memory during one call less what was there before it and less the gradients it leaves.
"""
