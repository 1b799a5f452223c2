"""One random problem: what it is made of, its tensors, and its shrinking."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from marginkernels import testing
from marginkernels.backend import FUSED
from marginkernels.margins import CombinedMargin, CosFace, CurricularFace, Margin, MVSoftmax

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: The largest and the smallest magnitude of huge and tiny values. Those of half precision leave room for the sums of eager PyTorch.
HUGE = {"float64": 1e18, "float32": 1e18, "float16": 1e3, "bfloat16": 1e18}
TINY = {"float64": 1e-18, "float32": 1e-18, "float16": 1e-3, "bfloat16": 1e-18}
VALUES = ("normal", "near", "zero rows", "zeros", "equal rows", "at centers", "huge", "tiny", "small integers", "mixed", "unit vectors")
LAYOUTS = ("contiguous", "transposed", "every other column", "offset", "expanded")
#: Heads whose scale follows from the number of classes: their formulas are of three and more.
NEED_THREE_CLASSES = ("l2-softmax", "adacos")
#: Scales other than a head's own, for the backends that are held to them. In half precision a similarity is off by so much that from
#: thousands on its rounding alone decides which class wins.
SCALES, HALF_SCALES = (1.0, 1e3, 1e5, 1e8), (1.0, 1e3)
LARGE_SCALES = ("cpu", "torch")
#: The values that a problem shrinks to, tried in this order.
PLAIN = {
    "values": "normal",
    "weight_values": "normal",
    "layout": "contiguous",
    "weight_layout": "contiguous",
    "bias": "",
    "smoothing": 0.0,
    "focal": 0.0,
    "workspace_mb": 0.0,
    "reduction": "sum",
    "ignored": 0.0,
    "ignore_index": -100,
    "one_class": False,
    "threads": 1,
    "training": False,
    "upstream": False,
    "scale": 0.0,
    "masked": 0.0,
    "bad_ignored": False,
    "steps": 1,
    "strided_upstream": False,
}


@dataclass(frozen=True)
class Problem:
    """The choices of a problem; the tensors follow from them.

    Attributes:
        seed: of the numbers.
        backend: the one that is compared.
        head: a key of :data:`marginkernels.testing.HEADS`.
        n, d, c: N rows, D, C classes.
        dtype, weight_dtype: of the embeddings and of the class centers, keys of ``DTYPES``.
        bias: its dtype, or "" for none.
        values, weight_values: of ``VALUES``.
        layout, weight_layout: of ``LAYOUTS``.
        smoothing, focal, reduction, workspace_mb: options of the loss.
        ignored: the share of rows that are ignored.
        ignore_index: their label.
        one_class: all rows have one label.
        threads: of PyTorch.
        training: whether the margin's state moves.
        upstream: whether the loss has a random upstream gradient, of either sign, instead of ones.
        scale: the margin's, where it has one number; 0 for its own.
        masked: the share of classes whose bias is -inf, those of the labels never.
        bad_ignored: whether ignored rows hold NaN and infinity.
        steps: of two, the second has another margin where there is one to set; their gradients accumulate.
        strided_upstream: whether the upstream gradient of ``reduction="none"`` lies apart in memory.
    """

    seed: int
    backend: str
    head: str
    n: int
    d: int
    c: int
    dtype: str
    weight_dtype: str
    bias: str
    values: str
    weight_values: str
    layout: str
    weight_layout: str
    smoothing: float
    focal: float
    reduction: str
    workspace_mb: float
    ignored: float
    ignore_index: int
    one_class: bool
    threads: int
    training: bool
    upstream: bool
    scale: float
    masked: float
    bad_ignored: bool
    steps: int
    strided_upstream: bool

    @classmethod
    def draw(cls, seed: int, backends: tuple[str, ...]) -> Problem:
        """The problem of a seed: the same for the same seed and backends."""
        r = random.Random(seed)
        backend = r.choice(backends)
        d = r.choice((1, 2, 3, r.randint(1, 24), r.randint(1, 24), r.randint(1, 24), r.randint(25, 140)))
        pairs = [
            (dtype, weight_dtype)
            for dtype in DTYPES
            for weight_dtype in DTYPES
            if (weight_dtype != "float64" or dtype == "float64")
            and FUSED[backend].unsupported_reason("cpu", DTYPES[dtype], DTYPES[weight_dtype], d) is None
        ]
        dtype, weight_dtype = r.choice(pairs + 3 * [pair for pair in pairs if pair[0] == pair[1] or pair[1] == "float32"])
        c = r.choice((1, 2, 3, r.randint(1, 60), r.randint(1, 60), r.randint(1, 60), r.randint(60, 300)))
        masked = r.choice((0.0, 0.0, 0.0, 0.3, 0.9))
        drawn = cls(
            seed=seed,
            backend=backend,
            head=r.choice([head for head in testing.HEADS if c >= 3 or not head.startswith(NEED_THREE_CLASSES)]),
            n=r.choice((0, 1, 2, r.randint(1, 12), r.randint(1, 12), r.randint(1, 12), r.randint(12, 70))),
            d=d,
            c=c,
            dtype=dtype,
            weight_dtype=weight_dtype,
            bias=r.choice(("", "", "float32", weight_dtype, "huge")),
            values=r.choice(("normal", "near", *VALUES)),
            weight_values=r.choice(("normal", "normal", *(v for v in VALUES if v not in ("near", "at centers")))),
            layout=r.choice(("contiguous", "contiguous", *LAYOUTS)),
            weight_layout=r.choice(("contiguous", "contiguous", *LAYOUTS)),
            smoothing=0.0 if masked else r.choice((0.0, 0.0, 0.1, 1.0, r.random())),  # the loss of both is infinite
            focal=r.choice((0.0, 0.0, 0.0, 0.5, 1.0, 2.0)),
            reduction=r.choice(("none", "mean", "sum")),
            workspace_mb=r.choice((0.0, 0.0, 0.001, 0.01, 1e9)),
            ignored=r.choice((0.0, 0.0, 0.2, 0.5, 1.0)),
            ignore_index=r.choice((-100, -100, -1, 0, c, 10**12)),
            one_class=r.random() < 0.15,
            threads=r.choice((1, 1, 1, 1, 2)),
            training=r.random() < 0.7,
            upstream=r.random() < 0.5,
            scale=r.choice((0.0, 0.0, 0.0, 0.0, r.choice(HALF_SCALES if "16" in dtype else SCALES))) if backend in LARGE_SCALES else 0.0,
            masked=masked,
            bad_ignored=r.random() < 0.5,
            steps=r.choice((1, 1, 1, 2)),
            strided_upstream=r.random() < 0.3,
        )
        # A binary classifier for each class has no distribution to smooth or to focus.
        return drawn if testing.accepted(drawn.head, label_smoothing=0.1) else replace(drawn, smoothing=0.0, focal=0.0)

    def __str__(self) -> str:
        shown = {k: v for k, v in asdict(self).items() if k not in ("seed", "backend", "head", "n", "d", "c", "dtype", "weight_dtype")}
        options = ", ".join(f"{k}={v!r}" for k, v in shown.items() if v != PLAIN.get(k))
        return f"{self.backend} {self.head} N={self.n} D={self.d} C={self.c} {self.dtype}/{self.weight_dtype}" + (
            f" ({options})" if options else ""
        )

    def margin(self, step: int = 0) -> Margin:
        """As at the start of a step, state apart."""
        margin = testing.HEADS[self.head](self.c)
        if self.focal:
            margin.focal_gamma = self.focal
        if self.scale and isinstance(vars(margin).get("scale"), float):
            margin.scale = self.scale
        if step:
            change_margin(margin)
        return margin.train(self.training)

    def tensors(self) -> dict[str, Tensor]:
        """``x`` (N, D), ``w`` (C, D), ``labels`` (N,), ``upstream`` () or (N,), and ``b`` (C,) where there is one, in their layouts."""
        g = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(self.c, (self.n,), generator=g)
        if self.one_class and self.n:
            labels[:] = labels[0].clone()
        # A head that keeps a norm, or takes it for its scale, has logits as large as that: ordinary magnitudes, since past 1e15 even
        # the softmax of float64 has no correct digit.
        margin = self.margin()
        kept = not margin.normalize_embedding or not margin.normalize_weight or getattr(margin, "scale", 1.0) is None
        products = "float16" if self.dtype == "float16" else self.weight_dtype  # the centers are converted to the embeddings' dtype
        w = _values(self.weight_values, self.c, self.d, products, g, ordinary=kept).to(DTYPES[self.weight_dtype])
        x = _values(self.values, self.n, self.d, self.dtype, g, ordinary=kept)
        if self.values == "near":
            x = 0.3 * x + w[labels].double() * (0.3 * self.d**0.5 / w[labels].double().norm(dim=1, keepdim=True).clamp_min(1e-300))
        elif self.values == "at centers":  # cosines of 1 and -1
            unit = w[labels].double() / w[labels].double().abs().amax(1, keepdim=True).clamp_min(1e-300)
            x = unit * (torch.randint(2, (self.n, 1), generator=g) * 2 - 1)
        found = {
            "x": _laid_out(self.layout, x.to(DTYPES[self.dtype]), self.values),
            "w": _laid_out(self.weight_layout, w, self.weight_values),
            "upstream": torch.ones((self.n,) if self.reduction == "none" else (), dtype=torch.float64),
        }
        if self.bias:
            b = torch.randn(self.c, generator=g, dtype=torch.float64)
            if self.bias == "huge":
                b *= 100
            found["b"] = b.to(DTYPES.get(self.bias, torch.float32))
        if self.upstream:
            found["upstream"] = torch.randn(found["upstream"].shape, generator=g, dtype=torch.float64).float().double()
        ignored = torch.rand(self.n, generator=g) < self.ignored
        found["labels"] = torch.where(ignored, self.ignore_index, labels)
        if self.masked:
            masked = (torch.rand(self.c, generator=g) < self.masked).index_fill(0, labels, False)
            found["b"] = found.get("b", torch.zeros(self.c)).masked_fill(masked, -torch.inf)
        if self.bad_ignored:
            wrong = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, (self.n,), generator=g)]
            bad = torch.where((found["labels"] == self.ignore_index)[:, None], wrong[:, None].to(found["x"].dtype), found["x"])
            found["x"] = _laid_out(self.layout, bad, "")
        return found

    def smaller(self) -> Iterator[Problem]:
        """Problems that are simpler by one choice."""
        for size, least in (("n", 1), ("c", 1), ("d", 1)):
            value = getattr(self, size)
            for less in (value // 2, value - 1):
                if least <= less < value:
                    yield replace(self, **{size: less})
        for name, plain in PLAIN.items():
            if getattr(self, name) != plain:
                yield replace(self, **{name: plain})
        if self.weight_dtype != self.dtype:
            yield replace(self, weight_dtype=self.dtype)


def change_margin(margin: Margin) -> None:
    """Another margin, as a warm-up sets it between two steps, where the head has one to set."""
    if isinstance(margin, MVSoftmax | CurricularFace | CosFace | CombinedMargin):
        margin.set_margin(**({"m3": 0.1} if type(margin) is CombinedMargin else {"margin": 0.15}))


def _values(kind: str, rows: int, columns: int, dtype: str, g: torch.Generator, *, ordinary: bool) -> Tensor:
    """(rows, columns) float64."""
    v = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    huge, tiny = (30.0, 1e-3) if ordinary else (HUGE[dtype], TINY[dtype])
    if kind == "zero rows":
        v[torch.rand(rows, generator=g) < 0.4] = 0
    elif kind == "zeros":
        v.zero_()
    elif kind == "equal rows":
        v = v[:1].repeat(rows, 1)
    elif kind == "huge":
        v *= huge
    elif kind == "tiny":
        v *= tiny
    elif kind == "small integers":
        v = torch.randint(-1, 2, (rows, columns), generator=g).double()
    elif kind == "mixed":
        v *= torch.exp(torch.rand(rows, 1, generator=g, dtype=torch.float64) * torch.tensor(huge / tiny).log()) * tiny
    elif kind == "unit vectors":
        v = torch.zeros_like(v).scatter_(1, torch.randint(columns, (rows, 1), generator=g), 1.0)
    return v


def _laid_out(layout: str, v: Tensor, kind: str) -> Tensor:
    """The numbers of ``v`` in another memory layout."""
    if layout == "transposed":
        return v.t().contiguous().t()
    if layout == "every other column":
        wide = v.new_full((v.shape[0], 2 * v.shape[1]), torch.nan)
        wide[:, ::2] = v
        return wide[:, ::2]
    if layout == "offset":
        wide = v.new_full((v.shape[0] + 2, v.shape[1] + 3), torch.nan)
        wide[1:-1, 1:-2] = v
        return wide[1:-1, 1:-2]
    if layout == "expanded" and kind in ("equal rows", "zeros") and v.shape[0]:
        return v[:1].expand(v.shape)
    return v.contiguous()
