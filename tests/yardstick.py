"""The tolerance rule: three measures against float64, each relative to a yardstick.

The yardstick is plain dense torch in the dtype under test, on the same inputs. (a) The largest
error finds local faults; (b) the projection on the reference finds a wrong scale, which (a) cannot;
(c) the error of each row beside that row's size finds faults in rows with small gradients, which
the others would not see beside large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def rel_max(ours: Tensor, ref: Tensor) -> float:
    """``max|ours - ref| / max|ref|`` over entries finite in both; absolute if ref is zero."""
    ours, ref = _finite_pairs(ours, ref)
    if ref.numel() == 0:
        return 0.0
    return ((ours - ref).abs().max() / (ref.abs().max() or 1.0)).item()


def projection(ours: Tensor, ref: Tensor) -> float:
    """``<ours, ref> / <ref, ref>`` over entries finite in both; 1 if ref is zero."""
    ours, ref = _finite_pairs(ours, ref)
    scale = ref.abs().max().item() if ref.numel() else 0.0
    if scale == 0:
        return 1.0
    ref = ref / scale  # squares of a tiny gradient would underflow
    return ((ours / scale * ref).sum() / ref.square().sum()).item()


def distances(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """``‖ours - exact‖ / ‖exact‖`` of each pair, in float64."""
    pairs = zip(ours, exact, strict=True)
    return [float((x.double() - ref).norm() / ref.norm()) for x, ref in pairs]


def row_errors(ours: Tensor, ref: Tensor, eps: float) -> Tensor:
    """``|ours - ref| / |ref|`` of each row (the last dimension), over entries finite in both.

    A row counts as at least `eps**2` of the largest, so that one of zeros may be nearly so.
    """
    ours, ref = (x.detach().double().reshape(-1, x.shape[-1]) for x in (ours, ref))
    both = ours.isfinite() & ref.isfinite()
    ours, ref = ours.where(both, 0.0), ref.where(both, 0.0)
    largest = ref.abs().max() or 1.0  # squares of a tiny gradient would underflow
    size = (ref / largest).norm(dim=1)
    return ((ours - ref) / largest).norm(dim=1) / size.clamp_min(eps**2 * (size.max() or 1.0))


def assert_close(
    ours: Tensor, ref: Tensor, yardstick: Tensor, eps: float, *, zero_scale: float = 1.0
) -> None:
    """Fail unless `ours` is about as near to the float64 `ref` as the same-dtype `yardstick` is.

    `eps` is the machine epsilon of the dtype under test. NaN and infinities have to stand where
    they stand in `ref`. Where `ref` is all zero, `ours` may reach twice the yardstick's largest
    entry plus the slack times `zero_scale`; give the size of the terms that cancel as `zero_scale`.
    """
    assert ours.shape == ref.shape == yardstick.shape, (ours.shape, ref.shape, yardstick.shape)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(ours) != test(ref)
        assert not differ.any(), f"{kind} at other places: {differ.nonzero()[:8].tolist()}"

    is_zero = not ref.nan_to_num(0, 0, 0).any()
    error, yard = rel_max(ours, ref), rel_max(yardstick, ref)
    # In float64 the reference has the same rounding as what it judges.
    # In fp32, sums taken in another order than the yardstick's differ by tens of eps.
    slack = 1e-10 if eps < 1e-12 else 64 * eps if eps < 1e-6 else 4 * eps
    bound = 2 * yard + slack * (zero_scale if is_zero else 1.0)
    assert error <= bound, f"largest error {error:.3e} > {bound:.3e} (yardstick {yard:.3e})"

    p, p_yard = projection(ours, ref), projection(yardstick, ref)
    bound = 2 * abs(p_yard - 1) + _projection_slack(eps)
    assert abs(p - 1) <= bound, f"projection {p:.6f}, off 1 by more than {bound:.3e} ({p_yard:.6f})"

    if ref.ndim > 1 and ref.shape[-1] > 1 and ref.numel() and not is_zero:
        errors, yards = row_errors(ours, ref, eps), row_errors(yardstick, ref, eps)
        # A row's own yardstick may be lucky: half of all rows are allowed for.
        bounds = 2 * torch.maximum(yards, yards.median()) + slack
        i = int((errors / bounds).argmax())
        assert errors[i] <= bounds[i], (
            f"error of row {i} {errors[i]:.3e} > {bounds[i]:.3e} (yardstick {yards[i]:.3e})"
        )


def assert_each_close(
    names: Iterable[str], ours: Sequence[Tensor], ref: Sequence[Tensor],
    yardstick: Sequence[Tensor], eps: float, run: object,
) -> None:  # fmt: skip
    """:func:`assert_close` of several tensors; a failure says of which, in which ``run``."""
    for name, *values in zip(names, ours, ref, yardstick, strict=True):
        try:
            assert_close(*values, eps)
        except AssertionError as error:
            raise AssertionError(f"{name}, {run}: {error}") from None


def _finite_pairs(ours: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    ours, ref = ours.detach().double(), ref.detach().double()
    both = ours.isfinite() & ref.isfinite()
    return ours[both], ref[both]


def _projection_slack(eps: float) -> float:
    """1e-3 for bf16 and fp16, 1e-5 for fp32, 1e-10 for fp64."""
    assert 0 < eps < 0.1 and math.isfinite(eps), f"eps must be a machine epsilon, got {eps}"
    return 1e-3 if eps > 1e-5 else 1e-5 if eps > 1e-12 else 1e-10
