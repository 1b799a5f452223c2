"""Benchmarks of the fused margin heads and their peers: ``python -m benchmarks --help``.

How a measurement is taken:

- One process per case (head, N, D, C, dtype). In it every provider (our backends and the peers) first runs the case once, and its loss
  and gradients are compared with a float64 reference. A provider that fails this check is not timed.
- Then the providers are timed in turn, round after round, in rotating order, so that a disturbance of the machine affects all of them.
  Percentiles over the rounds are recorded. On a GPU the L2 cache is overwritten before every call.
- ``forward`` is the loss with gradients required, ``step`` is forward and backward, ``train`` adds one SGD-momentum step of the class
  centers. Gradient buffers are released before each call, so every provider allocates its own.
- ``bf16`` is mixed precision as in training: embeddings and products in bfloat16, class centers and their gradient in float32.
- TFLOP/s count the useful work of the head only: 2NDC for forward, 8NDC for step and train, whatever a provider really computes.
  ``share`` is that rate divided by the rate of a large matrix product timed in the same rounds.
- ``peak_mb`` is the peak memory during one call, minus the memory in use before it and minus the gradients it produces.
"""
