"""The libraries whose heads :mod:`marginkernels.compat` stands for: where a script takes them from, and what is the same and what is not.

The one table of it: ``migrate`` prints what differs, and the pages of the documentation have their lists from here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One library.

    Attributes:
        title: as it calls itself.
        shim: the module of ``marginkernels.compat``.
        sources: module of the library -> the names there that the shim has.
        same: what is the same, one sentence or list item each, in Markdown.
        numbers: what gives other numbers: a loss, a gradient, a statistic.
        otherwise: what else differs.
        by_hand: what a script needs beside the changed import, or None.
    """

    title: str
    shim: str
    sources: dict[str, tuple[str, ...]]
    same: tuple[str, ...]
    numbers: tuple[str, ...]
    otherwise: tuple[str, ...]
    by_hand: str | None = None


_PML = ("ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "SphereFaceLoss", "SubCenterArcFaceLoss")
_PML_FILES = tuple(
    f"{kind}_loss" for kind in ("arcface", "cosface", "large_margin_softmax", "normalized_softmax", "sphereface", "subcenter_arcface")
)
_WESPEAKER = (
    "AddMarginProduct",
    "ArcMarginProduct",
    "ArcMarginProduct_intertopk_subcenter",
    "SphereFace2",
    "SphereProduct",
    "get_projection",
)
_AT_ONE = "Where an embedding points exactly along its class center the library's gradient is NaN; this one is finite."
_IGNORED = "A row with label -100 has no loss; there it is an error."
_SECOND = "A second derivative raises, unless `fuse` is set to False, which computes as the library does."

LIBRARIES = {
    "metric_learning": Library(
        title="pytorch-metric-learning",
        shim="metric_learning",
        sources={"pytorch_metric_learning.losses": _PML}
        | {f"pytorch_metric_learning.losses.{file}": (name,) for file, name in zip(_PML_FILES, _PML, strict=True)},
        same=(
            "loss and gradients, within 1e-5 (float32) and 1e-12 (float64) of the largest element, relative; the dtype of the loss, "
            "also under autocast;",
            "arguments, `W` (D, C) with the initial values that a seed gives, `state_dict` (each loads the other's), `get_logits`, "
            "statistics; `get_outliers` of `SubCenterArcFaceLoss`, whose `W` is (D, C K);",
            "weights from miners, reducers, regularizers, the errors for missing or misshapen labels and for `ref_emb`;",
            "attributes that change while training (`loss_fn.margin = 0.1`), an assigned `W`, subclasses that override `forward`.",
        ),
        numbers=(
            "Where an embedding points exactly along its class center, the library's gradient for ArcFace is NaN before PyTorch 2.14 "
            "(`acos`); this one is finite.",
            "A row with label -100 has no loss; the library's margin losses raise an `IndexError` for fewer than 100 classes.",
            "Float16 and bfloat16 embeddings: sums are float32 and the loss is rounded once; the library rounds at every step, and is "
            "further from the loss in float64.",
        ),
        otherwise=(
            "`W` is the transpose of a contiguous (C, D) tensor, so that the class centers are contiguous. A `W` of any layout works.",
            "A second derivative raises, unless `loss_fn.fuse = False`, which computes as the library does.",
        ),
    ),
    "insightface": Library(
        title="insightface (recognition/arcface_torch)",
        shim="insightface",
        sources={"partial_fc_v2": ("PartialFC_V2",), "losses": ("ArcFace", "CombinedMarginLoss", "CosFace")},
        same=(
            "loss and gradients, within 5e-6 of the largest element, relative, as recorded from insightface's own head at commit "
            "7fadd420 on 1 and 3 ranks: the gradient of ArcFace that takes the margin for a constant, no fallback past pi, the filter "
            "between classes, the embeddings' gradient times the number of ranks;",
            "the division of the classes over ranks (C // R for each, one more for each of the first), the initial weights that a "
            "seed gives, and `state_dict` (`weight` alone), so that each loads the other's checkpoint of a rank;",
            "a dense gradient where classes are sampled, zero in the rows that were not drawn; torch's seed decides which are.",
        ),
        numbers=(
            "The loss of a row has no cap; insightface's stops at 69.08, while its gradient does not.",
            "A row labeled -1 is ignored; there it counts 69.08 and has the gradient of a row without a class. Labels are not "
            "squeezed in place.",
            "Sampling draws other classes from the same seed, and `max(round(r C), N)` of a rank's C, where N counts the rows of all "
            "ranks.",
        ),
        otherwise=(
            "Without a process group it is a head of one process, also on a CPU; insightface's asserts that there is one, and needs CUDA.",
            "Batches may be of any size, also a different one on each rank; insightface's asserts the first one's. `batch_size=` "
            "spares the ranks a wait.",
            "m1 other than 1 without m3 is refused when the head is made, not when it is called.",
            "What belongs to insightface's own computation is not there: `sample()`, `is_updated`, `init_weight_update`, "
            "`last_batch_size`, `dist_cross_entropy`. `weight_index`, the drawn classes, is there after a step.",
        ),
    ),
    "wespeaker": Library(
        title="wespeaker",
        shim="wespeaker",
        sources={"wespeaker.models.projections": _WESPEAKER},
        same=(
            "loss and gradients, within 1e-5 (float32) and 1e-12 (float64) of the largest element, relative, of `ArcMarginProduct`, "
            "`AddMarginProduct`, `SphereProduct`, `ArcMarginProduct_intertopk_subcenter` and `SphereFace2` (type C), and which rows "
            "are right, with the margin;",
            "`weight` (C, D), or (K C, D), and `bias` (1, 1) with the initial values that a seed gives, and their names in `state_dict`;",
            "`update(margin)` in every step, `margin` read back, and the penalty that follows the margin.",
        ),
        numbers=(
            _AT_ONE,
            "SphereFace2's exponents are not taken naively: large ones do not overflow to infinity.",
            "The penalty on the `k_top` nearest others takes all there are where there are fewer; wespeaker's takes the own class "
            "too, or raises.",
        ),
        otherwise=(
            "A projection gives `(outputs, loss)`, which the executor takes as it takes SphereFace2's. The outputs are no tensor: "
            "`outputs.cpu().detach().numpy()` is (N, C) of one byte, on the CPU alone, for the meter of the accuracy.",
            "SphereFace2 of type A, `ham_margin` and the linear classifier are wespeaker's own, by `get_projection`; "
            '`SphereFace2(..., "A")` is refused.',
            "A margin that is out of its range is refused.",
        ),
        by_hand="In wespeaker/utils/executor.py, to spare the (N, C) bytes of the accuracy: acc_meter.add(*outputs.right_or_not())",
    ),
    "speechbrain": Library(
        title="speechbrain",
        shim="speechbrain",
        sources={"speechbrain.lobes.models.ECAPA_TDNN": ("Classifier",), "speechbrain.nnet.losses": ("LogSoftmaxWrapper",)},
        same=(
            "loss and gradients, within 1e-5 of the largest element, relative, with `AdditiveAngularMargin` and `AngularMargin`;",
            "`weight` with the initial values that a seed gives, `blocks`, `state_dict`; in eval mode, in which the recipes take the "
            "error rate, the cosines (N, 1, C).",
        ),
        numbers=(
            "`AdditiveAngularMargin` takes the cosines in float32 and holds them 1e-7 within [-1, 1], whatever the dtype; here "
            "neither is done.",
            "A row with label -100 has no loss, and a label beyond the classes is a `ValueError`; there both are a `RuntimeError`.",
        ),
        otherwise=(
            "In training the classifier's output is no tensor but an `Unclassified`, with `embedding` and `weight`; `.cosines()` "
            "makes the (N, 1, C).",
            "Another `loss_fn`, or one whose margin has been changed since it was made, is computed by speechbrain's own code.",
        ),
        by_hand="Classifier and LogSoftmaxWrapper go together: where one is named in a recipe's YAML, change it there too",
    ),
    "oml": Library(
        title="Open Metric Learning",
        shim="oml",
        sources={
            "oml.losses": ("ArcFaceLoss", "ArcFaceLossWithMLP"),
            "oml.losses.arcface": ("ArcFaceLoss", "ArcFaceLossWithMLP"),
        },
        same=(
            "loss and gradients, within 1e-5 (float32) and 1e-12 (float64) of the largest element, relative, with every reduction; "
            "with a smoothing within 1e-5, since the library makes its labels in float32;",
            "`weight` with the initial values that a seed gives, `state_dict`, attributes, `last_logs` with the accuracy of the batch;",
            "`label2category` with a smoothing is computed by the library's own code, and `fused` is False.",
        ),
        numbers=(
            _AT_ONE,
            _IGNORED,
            "`m` and `rescale` are read in every call; the library reads `m` when the loss is made.",
        ),
        otherwise=("A label beyond the classes is a `ValueError`; there it is an `AssertionError`.", _SECOND),
    ),
    "mmpretrain": Library(
        title="mmpretrain",
        shim="mmpretrain",
        sources={
            "mmpretrain.models": ("ArcFaceClsHead",),
            "mmpretrain.models.heads": ("ArcFaceClsHead",),
            "mmpretrain.models.heads.margin_head": ("ArcFaceClsHead",),
        },
        same=(
            "loss and gradients, within 1e-5 (float32) and 1e-12 (float64) of the largest element, relative, with sub-centers, a "
            "margin for each class, `easy_margin` and `loss_weight`; past pi within 1e-5, since mmpretrain holds `m sin(m)` in "
            "float32;",
            "`norm_product.weight` with the initial values that a seed gives, `state_dict`, `forward`, `predict`, `set_margins` and "
            "its hook.",
        ),
        numbers=(
            "Where an embedding points exactly along its class center, mmpretrain's gradient is NaN before PyTorch 2.14 (`acos`); "
            "this one is finite.",
        ),
        otherwise=(
            "Computed by mmpretrain's own code: samples with `gt_score` (mixup, CutMix), class weights, another `loss_module`, "
            "further arguments of `loss()`.",
            "Embeddings of half precision are taken; there they are an error beside float32 centers.",
        ),
        by_hand=None,
    ),
}
