"""What others have published: GPUs by their makers' data sheets, and a table of training speed to compare with. Nothing of it was measured
here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker's data sheet has it.

    Attributes:
        title: its name.
        memory: GB.
        rate: TFLOP/s of dense half-precision products on tensor cores with sums in float32, without the sparsity that some sheets count.
        bandwidth: of its memory, GB/s.
        link: GB/s that it receives from others of its kind, which is half of what a sheet states for both directions.
        by: what it is linked with.
        source: the data sheet.
    """

    title: str
    memory: float
    rate: float
    bandwidth: float
    link: float
    by: str
    source: str


GPUS = {
    "v100": Gpu("V100 SXM2 32 GB", 32, 125, 900, 150, "NVLink", "NVIDIA V100 Tensor Core GPU, data sheet"),
    "a100": Gpu("A100 SXM 80 GB", 80, 312, 2039, 300, "NVLink", "NVIDIA A100 Tensor Core GPU, data sheet"),
    "h100": Gpu("H100 SXM 80 GB", 80, 989.5, 3350, 450, "NVLink", "NVIDIA H100 Tensor Core GPU, data sheet"),
    "h200": Gpu("H200 SXM 141 GB", 141, 989.5, 4800, 450, "NVLink", "NVIDIA H200 Tensor Core GPU, data sheet"),
    "b200": Gpu("B200 SXM 180 GB", 180, 2250, 8000, 900, "NVLink", "NVIDIA DGX B200, data sheet: an eighth of the system"),
    "a10": Gpu("A10 24 GB", 24, 125, 600, 32, "PCIe 4.0", "NVIDIA A10 Tensor Core GPU, data sheet"),
    "l40s": Gpu("L40S 48 GB", 48, 362.05, 864, 32, "PCIe 4.0", "NVIDIA L40S GPU, data sheet"),
    "rtx4090": Gpu("GeForce RTX 4090 24 GB", 24, 165.2, 1008, 32, "PCIe 4.0", "NVIDIA Ada GPU architecture, white paper, appendix A"),
}

#: Samples a second and MB of each GPU, as published for arcface_torch: identities -> (samples/s, MB) of data parallel, model parallel and
#: Partial FC with a tenth of the identities; None where it ran out of memory.
INSIGHTFACE: dict[int, tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int]]] = {
    125_000: ((4681, 7358), (4824, 5306), (5004, 4868)),
    1_400_000: ((1672, 32252), (3043, 11178), (4738, 6056)),
    5_500_000: (None, (1389, 32188), (3975, 9854)),
    8_000_000: (None, None, (3565, 12310)),
    16_000_000: (None, None, (2679, 19950)),
    29_000_000: (None, None, (1855, 32324)),
}
#: Where that table is. It names the GPUs, eight V100 of 32 GB, and neither backbone nor batch; the page beside it that it refers to,
#: docs/speed_benchmark.md, has ResNet-50 and 1,024 rows.
INSIGHTFACE_SOURCE = "github.com/deepinsight/insightface, recognition/arcface_torch/README.md, Speed Benchmark"
INSIGHTFACE_ROWS = 1024
