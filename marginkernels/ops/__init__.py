"""The private operators of ``torch.library`` and the one ``autograd.Function`` on top of them."""

from .autograd import ClassSums, SumOptions, sum_over_classes
from .operators import center_sum, class_pass, prepare_inputs, row_gradient, row_pass, scale_gradient, topk

__all__ = [
    "ClassSums",
    "SumOptions",
    "center_sum",
    "class_pass",
    "prepare_inputs",
    "row_gradient",
    "row_pass",
    "scale_gradient",
    "sum_over_classes",
    "topk",
]
