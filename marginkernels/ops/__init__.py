"""The private operators of ``torch.library`` and the one ``autograd.Function`` on top of them."""

from .autograd import ClassSums, SumOptions, sum_over_classes
from .operators import center_sum, class_pass, prepare_inputs, row_gradient, row_pass, scale_gradient, topk
from .queue import Record, Sink, StepQueue
from .rows import checked_labels, fused_loss, fuses_rows, none_ignored, without_bad_ignored_rows
from .step import GradientChunks

__all__ = [
    "ClassSums",
    "GradientChunks",
    "Record",
    "Sink",
    "StepQueue",
    "SumOptions",
    "center_sum",
    "checked_labels",
    "class_pass",
    "fused_loss",
    "fuses_rows",
    "none_ignored",
    "prepare_inputs",
    "row_gradient",
    "row_pass",
    "scale_gradient",
    "sum_over_classes",
    "topk",
    "without_bad_ignored_rows",
]
