"""Every margin, each written once: see :class:`Margin` for what one is made of."""

from .adaptive import AdaCos, CurricularFace, MVSoftmax
from .angular import Annealing, ArcFace, CombinedMargin, SphereFace
from .base import Margin, Rows
from .linear import CosFace, L2Softmax, NormFace, Softmax

#: The margins that the package ships, in the order of the README's table.
ALL = (Softmax, NormFace, L2Softmax, SphereFace, CosFace, ArcFace, CombinedMargin, AdaCos, MVSoftmax, CurricularFace)

__all__ = [*(cls.__name__ for cls in ALL), "Annealing", "Margin", "Rows"]
