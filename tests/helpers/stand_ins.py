"""Stand-ins for libraries that are not installed with the tests: as much of Open Metric Learning, speechbrain and mmpretrain as
``marginkernels.compat`` subclasses, with their arguments, attributes and formulas, longhand. Where the library itself is installed it is
taken, and the same tests run beside it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).to(torch.bool)


# -- Open Metric Learning 4.0.0, oml/losses/arcface.py ---------------------------------------------------------------------------


class OMLArcFaceLoss(nn.Module):
    criterion_name = "arcface"

    def __init__(self, in_features, num_classes, m=0.5, s=64, smoothing_epsilon=0, label2category=None, reduction="mean"):
        super().__init__()
        assert smoothing_epsilon is None or 0 <= smoothing_epsilon < 1
        self.criterion = nn.CrossEntropyLoss(reduction=reduction)
        self.num_classes, self.smoothing_epsilon, self.rescale, self.m = num_classes, smoothing_epsilon, s, m
        self.label2category = None
        if label2category is not None:
            number = {category: i for i, category in enumerate(sorted(set(label2category.values())))}
            self.label2category = torch.tensor([number[label2category[c]] for c in range(num_classes)])
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.cos_m, self.sin_m = math.cos(m), math.sin(m)
        self.th, self.mm = -self.cos_m, self.sin_m * m
        self._last_logs: dict[str, Tensor] = {}

    def fc(self, x):
        return F.normalize(x) @ F.normalize(self.weight).T

    def smooth_labels(self, y):
        epsilon, own = self.smoothing_epsilon, F.one_hot(y, self.num_classes).float()
        if self.label2category is None:
            return (1 - epsilon) * own + epsilon / self.num_classes
        same = (self.label2category[y][:, None] == self.label2category[None, :]).float()
        return (1 - epsilon) * own + epsilon * same / same.sum(1, keepdim=True)

    def forward(self, x, y):
        assert torch.all(y < self.num_classes), "You should provide labels between 0 and num_classes - 1."
        cos = self.fc(x)
        self._last_logs["accuracy"] = (cos.argmax(1) == y).float().mean()
        turned = cos * self.cos_m - torch.sqrt(1 - cos**2) * self.sin_m
        turned = torch.where(cos > self.th, turned, cos - self.mm)
        logits = torch.where(one_hot(y, self.num_classes), turned, cos) * self.rescale
        return self.criterion(logits, self.smooth_labels(y) if self.smoothing_epsilon else y)

    @property
    def last_logs(self):
        return self._last_logs


class OMLArcFaceLossWithMLP(nn.Module):
    def __init__(self, in_features, num_classes, mlp_features, m=0.5, s=64, smoothing_epsilon=0, label2category=None, reduction="mean"):
        super().__init__()
        layers: list[nn.Module] = []
        for width, following in zip([in_features, *mlp_features], mlp_features, strict=False):
            layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(0.0)]
        del layers[-2]
        self.mlp = nn.Sequential(*layers)
        self.arcface = OMLArcFaceLoss(mlp_features[-1], num_classes, m, s, smoothing_epsilon, label2category, reduction)

    def forward(self, x, y):
        return self.arcface(self.mlp(x), y)

    @property
    def last_logs(self):
        return self.arcface.last_logs


# -- speechbrain 1.1.2, speechbrain/nnet/losses.py and speechbrain/lobes/models/ECAPA_TDNN.py ------------------------------------


class AngularMargin(nn.Module):
    def __init__(self, margin=0.0, scale=1.0):
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(self, outputs, targets):
        return self.scale * (outputs - self.margin * targets)


class AdditiveAngularMargin(AngularMargin):
    def __init__(self, margin=0.0, scale=1.0, easy_margin=False):
        super().__init__(margin, scale)
        self.easy_margin = easy_margin
        self.cos_m, self.sin_m = math.cos(margin), math.sin(margin)
        self.th, self.mm = math.cos(math.pi - margin), math.sin(math.pi - margin) * margin

    def forward(self, outputs, targets):
        cos = outputs.float().clamp(-1 + 1e-7, 1 - 1e-7)
        turned = cos * self.cos_m - torch.sqrt(1 - cos**2) * self.sin_m
        turned = torch.where(cos > 0, turned, cos) if self.easy_margin else torch.where(cos > self.th, turned, cos - self.mm)
        return self.scale * (targets * turned + (1 - targets) * cos)


class LogSoftmaxWrapper(nn.Module):
    def __init__(self, loss_fn):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs, targets, length=None):
        outputs, targets = outputs.squeeze(1), targets.squeeze(1)
        targets = F.one_hot(targets.long(), outputs.shape[1]).float()
        try:
            logits = self.loss_fn(outputs, targets)
        except TypeError:
            logits = self.loss_fn(outputs)
        return -(F.log_softmax(logits, 1) * targets).sum() / targets.sum()


class Classifier(nn.Module):
    def __init__(self, input_size, device="cpu", lin_blocks=0, lin_neurons=192, out_neurons=1211):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(lin_blocks):  # there a batch norm comes before
            self.blocks.append(nn.Linear(input_size, lin_neurons))
            input_size = lin_neurons
        self.weight = nn.Parameter(torch.empty(out_neurons, input_size, device=device))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x):
        for layer in self.blocks:
            x = layer(x)
        return (F.normalize(x.squeeze(1)) @ F.normalize(self.weight).T).unsqueeze(1)


# -- mmpretrain 1.2.0, mmpretrain/models/heads/margin_head.py ----------------------------------------------------------------------


class CrossEntropyLoss(nn.Module):
    def __init__(self, use_sigmoid=False, use_soft=False, reduction="mean", loss_weight=1.0, class_weight=None, pos_weight=None):
        super().__init__()
        self.use_sigmoid, self.use_soft, self.reduction = use_sigmoid, use_soft, reduction
        self.loss_weight, self.class_weight, self.pos_weight = loss_weight, class_weight, pos_weight

    def forward(self, cls_score, label, weight=None, avg_factor=None, reduction_override=None):
        class_weight = None if self.class_weight is None else cls_score.new_tensor(self.class_weight)
        if self.use_soft:
            losses = -(label * cls_score.log_softmax(1)).sum(1)
        else:
            losses = F.cross_entropy(cls_score, label, class_weight, reduction="none")
        losses = losses if weight is None else losses * weight
        reduction = reduction_override or self.reduction
        return self.loss_weight * (losses.sum() / avg_factor if reduction == "mean" else losses)


class NormProduct(nn.Linear):
    def __init__(self, in_features, out_features, k=1):
        super().__init__(in_features, out_features * k, bias=False)
        self.out_features, self.k = out_features, k

    def forward(self, input):
        cos = F.normalize(input) @ F.normalize(self.weight).T
        return cos if self.k == 1 else cos.unflatten(1, (self.out_features, self.k)).amax(2)


class ArcFaceClsHead(nn.Module):
    def __init__(self, num_classes, in_channels, num_subcenters=1, scale=64.0, margins=0.50, easy_margin=False,
                 loss={"type": "CrossEntropyLoss", "loss_weight": 1.0}, init_cfg=None):  # fmt: skip  # noqa: B006
        super().__init__()
        self.loss_module = loss if isinstance(loss, nn.Module) else Registry.build(None, loss)
        self.num_classes, self.in_channels, self.num_subcenters = num_classes, in_channels, num_subcenters
        self.scale, self.easy_margin = scale, easy_margin
        self.norm_product = NormProduct(in_channels, num_classes, num_subcenters)
        self.register_buffer("margins", None, persistent=False)
        self.set_margins(margins)

    def set_margins(self, margins):
        margins = [margins] * self.num_classes if isinstance(margins, float) else list(margins)
        assert len(margins) == self.num_classes
        self.margins = torch.tensor(margins, device=self.norm_product.weight.device, dtype=torch.float32)

    def pre_logits(self, feats):
        return feats[-1]

    def _get_logit_with_margin(self, pre_logits, target):
        cos, m = self.norm_product(pre_logits), self.margins
        turned = torch.cos(torch.acos(cos) + m)
        turned = torch.where(cos > 0, turned, cos) if self.easy_margin else torch.where(cos > -m.cos(), turned, cos - m.sin() * m)
        return torch.where(one_hot(target, self.num_classes), turned, cos)

    def forward(self, feats, target=None):
        with torch.autocast("cpu", enabled=False):
            x = self.pre_logits(feats)
            return self.scale * (self.norm_product(x) if target is None else self._get_logit_with_margin(x, target))

    def loss(self, feats, data_samples, **kwargs):
        labels = torch.cat([sample.gt_label for sample in data_samples])
        target = torch.stack([sample.gt_score for sample in data_samples]) if "gt_score" in data_samples[0] else labels
        scores = self(feats, labels)
        return {"loss": self.loss_module(scores, target, avg_factor=len(scores), **kwargs)}


class DataSample:
    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __contains__(self, name):
        return name in self.held

    def __getattr__(self, name):
        if name.startswith("gt_"):
            return self.held[name]
        raise AttributeError(name)

    def set_gt_label(self, value):
        self.held["gt_label"] = torch.as_tensor([value]).reshape(-1)
        return self

    def set_gt_score(self, value):
        self.held["gt_score"] = value
        return self


class Registry:
    modules: dict[str, Any] = {}  # noqa: RUF012

    def register_module(self, name=None, force=False, module=None):
        assert force or name not in self.modules
        self.modules[name] = module

    def build(self, config):
        config = dict(config)
        return (Registry.modules | {"CrossEntropyLoss": CrossEntropyLoss})[config.pop("type")](**config)

    def get(self, name):
        return self.modules[name]


#: Module -> what it has. Those before them in the dotted name are there too.
MODULES: dict[str, dict[str, Any]] = {
    "oml.losses.arcface": {"ArcFaceLoss": OMLArcFaceLoss, "ArcFaceLossWithMLP": OMLArcFaceLossWithMLP},
    "speechbrain.nnet.losses": {c.__name__: c for c in (AngularMargin, AdditiveAngularMargin, LogSoftmaxWrapper)},
    "speechbrain.lobes.models.ECAPA_TDNN": {"Classifier": Classifier},
    "mmpretrain.models.heads": {"ArcFaceClsHead": ArcFaceClsHead},
    "mmpretrain.models.losses": {"CrossEntropyLoss": CrossEntropyLoss},
    "mmpretrain.registry": {"MODELS": Registry()},
    "mmpretrain.structures": {"DataSample": DataSample},
}
#: What there is a stand-in for.
LIBRARIES = {name.partition(".")[0] for name in MODULES}


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@contextlib.contextmanager
def compat(library: str) -> Iterator[ModuleType]:
    """``marginkernels.compat.<library>``, over the library or, where it is not installed, its stand-in, of which nothing stays behind."""
    shim = f"marginkernels.compat.{library}"
    if installed(library):
        yield importlib.import_module(shim)
        return
    made = []
    try:
        for name, held in MODULES.items():
            if name.partition(".")[0] != library:
                continue
            parts = name.split(".")
            for at in range(1, len(parts) + 1):
                whole = ".".join(parts[:at])
                if whole not in sys.modules:
                    sys.modules[whole] = ModuleType(whole)
                    made.append(whole)
                    if at > 1:
                        setattr(sys.modules[".".join(parts[: at - 1])], parts[at - 1], sys.modules[whole])
            vars(sys.modules[name]).update(held)
        yield importlib.import_module(shim)
    finally:
        for name in (*made, shim):
            sys.modules.pop(name, None)
        vars(importlib.import_module("marginkernels.compat")).pop(library, None)
