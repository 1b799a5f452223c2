"""What a margin is: the value and the slope of the target logit, and which transform the non-target logits of the row take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._deprecated import warn
from ..core.device import digest
from ..core.nontarget import NonTarget
from ..core.types import Reduction

#: ``non_target_lse(s)`` gives (N,) float64 ``log sum_{j != y} exp(s c_ij)`` for a scale s: one more pass over the classes.
NonTargetLSE = Callable[[Tensor], Tensor]
#: ``nearest(count)`` gives (N, count) what :meth:`BatchInfo.nearest` does.
Nearest = Callable[[int], Tensor]


def check_range(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False, unit: str = "") -> float:
    """``value`` as a float, or a ``ValueError``/``TypeError`` naming the argument, what was expected and what came."""
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    inside = (number > low if open_low else number >= low) and number <= high and math.isfinite(number)
    if not inside:
        bound = f"a finite number {'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name}: expected {bound}{' ' + unit if unit else ''}, got {value!r}")
    return number


def settled(state: Tensor) -> Tensor:
    """``state`` (float64) to the nearest 2^-40, for state that must be the same bits whoever summed the batch, and in whatever order."""
    return torch.round(state * 2.0**40) * 2.0**-40


def setting(name: str, doc: str) -> Any:
    """A property of a :class:`Margin`: a float that :meth:`Margin.set_margin` or an assignment changes, checked as by the constructor."""

    def get(margin: Margin) -> Any:
        return margin.__dict__[name]

    def change(margin: Margin, value: Any) -> None:
        margin._change(**{name: value})

    return property(get, change, doc=doc)


class _Key(str):
    """A key of a state dict that torch's messages show with what is known of whose it is."""

    __slots__ = ("about",)
    about: str

    @classmethod
    def of(cls, key: str, about: str) -> _Key:
        made = cls(key)
        made.about = about
        return made

    def __format__(self, spec: str) -> str:
        return f"{str.__str__(self)} ({self.about})"


class BatchInfo:
    """What a margin may know of each row beside its target cosine.

    Attributes:
        embeddings: (N, D), as they came.
        labels: (N,) int64, the identity of each row; -1 where the row has none (ignored).
        valid: (N,) bool, False for ignored rows.
        num_classes: C, over all shards.
        own: which of the rows this process has brought, of those of all ranks.
    """

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        own: slice = slice(None),
        center_norm: Tensor | None = None,
        nearest: Nearest | None = None,
    ):
        self.embeddings = embeddings
        self.labels = labels
        self.valid = labels >= 0
        self.num_classes = num_classes
        self.own = own
        self._center_norm = center_norm
        self._nearest = nearest

    def with_labels(self, labels: Tensor) -> BatchInfo:
        """The same rows with other labels."""
        return BatchInfo(self.embeddings, labels, self.num_classes, own=self.own, center_norm=self._center_norm, nearest=self._nearest)

    def with_classes(self, center_norm: Tensor | None, nearest: Nearest) -> BatchInfo:
        """The same rows with what :attr:`center_norm` and :meth:`nearest` give."""
        return BatchInfo(self.embeddings, self.labels, self.num_classes, own=self.own, center_norm=center_norm, nearest=nearest)

    @property
    def norm(self) -> Tensor:
        """(N,) float64 norm of each embedding, differentiable; ``detach()`` it where the paper does."""
        norm: Tensor = torch.linalg.vector_norm(self.embeddings.double(), dim=1)
        return norm

    @property
    def center_norm(self) -> Tensor:
        """(N,) norm of each row's own class center, for a margin that says ``needs_center_norm``; else ones."""
        return torch.ones_like(self.labels, dtype=torch.float64) if self._center_norm is None else self._center_norm

    def nearest(self, count: int) -> Tensor:
        """(N, count) the highest similarities of each row with the classes that are not its own, falling, -inf where there are fewer
        classes; one more pass over them, or over those drawn. For :meth:`Margin.threshold`; not differentiated."""
        if self._nearest is None:
            raise RuntimeError("nearest: expected a call from threshold(), got one where the classes are not known")
        return self._nearest(count)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (..., N) over the valid rows, 0 where there is none. Never waits for the device."""
        return torch.where(self.valid, values, 0).sum(-1) / self.valid.sum().clamp_min(1)


class Margin(nn.Module):
    """Base of every margin; subclass it to make your own.

    A subclass defines :meth:`target` and runs on every backend. Everything else has a default: cosine logits (both sides normalized), a
    fixed scale, untransformed non-target logits, no state. State is kept in buffers, of shape (1,) where it is a float64 number:
    torch.compile loses what is written to a float64 buffer of shape ().

    Args:
        scale: s > 0, what both target and non-target logits are multiplied by.
        focal_gamma: gamma >= 0 of the per-sample focal factor ``(1 - p_y) ** gamma`` (Lin et al. 2017, eq. 4); 0 turns it off.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is not a number.

    Class attributes a subclass may set:
        normalize_embedding, normalize_weight: whether the similarity ``c`` uses ``x/|x|`` and ``w/|w|``.
        non_target: the transform of non-target logits, a :class:`NonTarget`; some also need :meth:`threshold`, ``t`` or both.
        t: the parameter of the transform: a number, or a tensor of shape (), (1,) or (N,).
        reduction: what is summed over the other classes: ``LOG_SUM_EXP`` gives a cross-entropy, and ``SOFTPLUS_SUM`` the loss of a binary
            classifier for each class, ``target_weight softplus(-z_y) + other_weight sum_j softplus(z_j)``.
        target_weight, other_weight: of the two parts of the latter.
        loss_factor: what each row's cross-entropy is multiplied by, with focal factor and smoothing and without :meth:`regularizer`.
        needs_center_norm: whether ``target`` reads ``batch.center_norm``, as it may where the weight is not normalized. The value must then
            be homogeneous in the class center, as its similarity is: twice the center, twice the value. Its gradient follows from that.
        straight_through: the slope is by intention not the derivative of the value, so :func:`marginkernels.testing.check_margin`
            compares it with the gradient that autograd gives to the value (which a ``detach()`` changes) and not with differences.
    """

    normalize_embedding: bool = True
    normalize_weight: bool = True
    non_target: NonTarget = NonTarget.IDENTITY
    needs_center_norm: bool = False
    straight_through: bool = False
    loss_factor: float = 1.0
    reduction: Reduction = Reduction.LOG_SUM_EXP
    target_weight: float = 1.0
    other_weight: float = 1.0
    t: float | Tensor
    #: The names of state and parameters, by which a checkpoint is told to be that of another margin.
    _state_names: tuple[str, ...] = ()
    #: Whether the constructor needs a number as its scale; None is then an error unless row_scale is overridden.
    _fixed_scale: bool = False

    def __init__(self, scale: float | None = 64.0, *, focal_gamma: float = 0.0):
        super().__init__()
        if scale is not None or (self._fixed_scale and type(self).row_scale is Margin.row_scale):
            self.scale = check_range("scale", scale, 0.0, open_low=True)
        self.focal_gamma = check_range("focal_gamma", focal_gamma, 0.0)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "form" in vars(cls):
            warn(f"{cls.__name__}.form", f"{cls.__name__}.non_target")
            cls.non_target = NonTarget(vars(cls)["form"])

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        """Value ``T(cos)`` and slope ``dT/dcos`` of the target logit before the scale.

        Args:
            cos: (N,) float64 in [-1, 1] (unbounded where a side is not normalized): each row's target cosine.
            batch: what else is known of the rows, for margins that depend on norm or identity.

        Returns:
            value and slope, (N,) each, at least as precise as ``cos``; a slope that is the same for all rows may be a number. Shapes and
            dtypes are checked in every call, which costs nothing on the device. The reference differentiates ``value`` in ``cos`` by
            autograd; the fused backends multiply by ``slope`` and differentiate ``value`` in anything else (``batch.norm``, the margin's
            own parameters).
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(cos, batch)")

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        """(N,) what a non-target cosine must exceed for the transform to change it; only asked where the transform has a threshold."""
        raise NotImplementedError(f"{type(self).__name__} uses a transform with a threshold and must define threshold(cos, batch)")

    def row_scale(self, batch: BatchInfo) -> float | Tensor:
        """The scale s: a number, a scalar tensor or one value per row (N,); differentiated where it is a tensor that needs it."""
        scale: float | Tensor | None = getattr(self, "scale", None)
        if scale is None:
            raise NotImplementedError(f"{type(self).__name__} has no fixed scale and must define row_scale(batch)")
        return scale

    def class_bias(self) -> Tensor | None:
        """What is added to the bias of every class, a tensor of shape () that may be trained, or None."""
        return None

    def regularizer(self, batch: BatchInfo) -> Tensor | None:
        """(N,) what is added to each row's loss beside its cross-entropy, after the focal factor and the smoothing, or None; differentiated
        by autograd in ``batch.norm`` and in the margin's own parameters."""
        return None

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        """Advance the state by one training step, before the step uses it. Runs without gradient, only in training mode.

        Args:
            cos: (N,) float64 target cosines of the whole batch (all ranks).
            batch: the rows they belong to.
            non_target_lse: ``non_target_lse(s)`` gives (N,) ``log sum_{j != y} exp(s c_ij)``, one more pass over the classes.
        """

    def bind(self, num_classes: int) -> None:
        """Told the number of classes before the first use and at each later one, for margins whose constants depend on it.

        Raises:
            ValueError: the margin was made for another number of classes.
        """

    def set_margin(self, *values: Any, **named: Any) -> None:
        """Change the margin between two steps, as a warm-up does, within the ranges of the constructor. Under ``torch.compile`` the new
        value is read like any tensor, so nothing is compiled again (:class:`SphereFace` is the exception). With several ranks every
        rank must call it. The value is not part of ``state_dict()``.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; TypeError where there is no margin to set.
        """
        raise TypeError(f"{type(self).__name__} has no margin to set")

    def reset_parameters(self) -> None:
        """Set the state and the parameters back to where the constructor starts them; needed after ``to_empty()``. A margin of your own
        that has state or parameters overrides it."""

    @property
    def _moves(self) -> bool:
        """Whether there is state that :meth:`update` moves."""
        return type(self).update is not Margin.update

    # -- numbers that a compiled step reads as a tensor --------------------------------------------------------------------------

    def _numbers(self) -> Iterable[float]:
        """What :meth:`target` reads through :meth:`_read`: the margin, and what follows from it, computed once by Python's math."""
        return ()

    def _change(self, **settings: Any) -> None:
        """Check ``settings`` (see :func:`setting`), then store them: none of them where one is wrong."""
        checked = {name: self._checked(name, value) for name, value in settings.items()}
        self.__dict__.update(checked)
        if "_held" in self.__dict__:
            self._held.copy_(torch.tensor(list(self._numbers()), dtype=torch.float64))

    def _checked(self, name: str, value: Any) -> Any:
        """``value`` of the setting ``name`` as it is stored, or the constructor's error."""
        raise NotImplementedError

    def _hold(self) -> None:
        """The last line of a constructor that has settings. They are held in a plain tensor, not a buffer: buffers are averaged, broadcast
        and saved by others, and this one always follows from the floats."""
        self._held = torch.tensor(list(self._numbers()), dtype=torch.float64)

    def _read(self, like: Tensor) -> tuple[Tensor, ...]:
        """The numbers, of shape () each and in the dtype of ``like``; a copy, since a backward pass may follow the next change."""
        return self._held.to(like.dtype, copy=True).unbind()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Margin:
        # Running statistics move 1% a step: in half precision they would stop moving, so .half() leaves them as they are.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:
                setattr(self, name, old.to(device=moved.device))
        if "_held" in self.__dict__:
            device = fn(torch.empty(0, dtype=torch.float64, device=self._held.device)).device
            if device != self._held.device:
                self._held = torch.tensor(list(self._numbers()), dtype=torch.float64, device=device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module's; the message for a checkpoint of another margin names the classes of both."""
        missing, unexpected = len(missing_keys), len(unexpected_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        saved = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        owner = " or ".join(c.__name__ for c in _subclasses(Margin) if c._state_names and set(c._state_names) == saved)
        mine = type(self).__name__
        for i in range(missing, len(missing_keys)):
            where = f"the state dict is that of {owner}" if owner else "the state dict is that of a margin without it"
            missing_keys[i] = _Key.of(missing_keys[i], f"of {mine}, but {where}")
        for i in range(unexpected, len(unexpected_keys)):
            unexpected_keys[i] = _Key.of(unexpected_keys[i], f"of {owner or 'another margin'}, but the head's margin is {mine}")

    def extra_repr(self) -> str:
        hidden = ("training", "non_target", "loss_factor", "target_weight", "other_weight")  # which follow from the arguments
        shown = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str) and not k.startswith("_") and k not in hidden}
        return _arguments(shown)

    def fingerprint(self) -> str:
        """What two ranks must agree on: the class, its settings, and the values of its tensors. Reads them, so it waits for the device."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)} | self.state_dict()
        parts = [type(self).__name__, self.extra_repr()]
        for name, v in sorted(tensors.items()):
            parts.append(f"{name}: {tuple(v.shape)} {v.dtype} {digest(v)}")
        return "; ".join(parts)


def _subclasses(cls: type[Margin]) -> Iterator[type[Margin]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _arguments(shown: Mapping[str, object]) -> str:
    """``scale=64.0, beyond_pi='linear'``, without a focal factor or a filter that is off."""
    named = {k: f"<{tuple(v.shape)}>" if isinstance(v, Tensor) else repr(v) for k, v in shown.items()}
    off = {"focal_gamma": 0, "filter_above": None}
    return ", ".join(f"{k}={v}" for k, v in named.items() if not (k in off and shown[k] == off[k]))


def check_holds_values(margin: Margin) -> None:
    """A ``ValueError`` where ``margin`` has tensors without values, as one that was made on the meta device."""
    if any(v.is_meta for v in (*margin.parameters(), *margin.buffers(), *(v for v in (getattr(margin, "_held", None),) if v is not None))):
        raise ValueError("margin: expected one whose tensors hold values, got one on the device meta; see to_empty()")


def check_margin(margin: object) -> None:
    """A ``TypeError`` where ``margin`` is not a :class:`Margin`."""
    if not isinstance(margin, Margin):
        raise TypeError(f"margin: expected an instance of mk.Margin such as mk.ArcFace(), got {margin!r}")
