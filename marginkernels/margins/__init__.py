"""Every margin, each written once: see :class:`Margin` for what one is made of."""

from ..core.nontarget import NonTarget
from .adaptive import AdaCos
from .angular import Annealing, ArcFace, CombinedMargin, CosFace, LSoftmax, SphereFace
from .base import BatchInfo, Margin, check_holds_values, check_margin
from .binary import SphereFace2, UniFace
from .circle import Circle
from .elastic import ElasticFace
from .hard_negative import CurricularFace, MVSoftmax
from .inter_topk import InterTopK
from .per_class import margins_from_counts
from .quality import AdaFace, MagFace
from .softmax import L2Softmax, NormFace, Softmax
from .sphereface_r import SphereFaceR

#: The margins that the package ships, in the order of the documentation's table.
ALL = (
    Softmax,
    NormFace,
    L2Softmax,
    LSoftmax,
    SphereFace,
    SphereFaceR,
    CosFace,
    ArcFace,
    CombinedMargin,
    AdaCos,
    MVSoftmax,
    CurricularFace,
    InterTopK,
    Circle,
    AdaFace,
    MagFace,
    ElasticFace,
    SphereFace2,
    UniFace,
)

__all__ = [
    "ALL",
    "AdaCos",
    "AdaFace",
    "Annealing",
    "ArcFace",
    "BatchInfo",
    "Circle",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InterTopK",
    "L2Softmax",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "NonTarget",
    "NormFace",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "SphereFaceR",
    "UniFace",
    "check_holds_values",
    "check_margin",
    "margins_from_counts",
]
