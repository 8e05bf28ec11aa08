"""``bgkernels.numpy``: the statistics of dense arrays, read where they lie."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from bgkernels import numpy as bgn
from bgkernels.rows.stats import TENSOR_FIELDS

V = 41


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_against_numpy(dtype: type) -> None:
    s, t = logits(0, 2, 5, V).astype(dtype), logits(1, 2, 5, V).astype(dtype)
    labels = np.random.default_rng(2).integers(0, V, (2, 5))
    labels[0, 1] = -100
    stats = bgn.row_stats(s, t, labels, temperature=2.0)
    lp, lq = log_softmax(s / dtype(2)), log_softmax(t / dtype(2))
    valid = labels != -100
    at = np.where(valid, labels, 0)[..., None]
    expected = {
        "kl_ts": (np.exp(lq) * (lq - lp)).sum(-1),
        "kl_st": (np.exp(lp) * (lp - lq)).sum(-1),
        "entropy_t": -(np.exp(lq) * lq).sum(-1),
        "logp_t": np.take_along_axis(lq, at, -1)[..., 0],
        "nll": -np.take_along_axis(log_softmax(s), at, -1)[..., 0],
        "max_prob_s": np.exp(lp).max(-1),
        "argmax_t": lq.argmax(-1),
    }
    wide = np.float64 if dtype is np.float64 else np.float32
    tolerance = 2e-3 if dtype is np.float16 else 1e-5
    for name, value in expected.items():
        got = getattr(stats, name)
        assert got.dtype == (np.int64 if name == "argmax_t" else wide), name
        np.testing.assert_allclose(got[valid], value[valid], rtol=tolerance, err_msg=name)
    assert (stats.valid == valid).all() and stats.kl_ts[0, 1] == 0


def test_fields_are_those_of_row_stats() -> None:
    assert tuple(f.name for f in fields(bgn.NumpyRowStats)) == TENSOR_FIELDS


def test_nothing_is_copied(tmp_path: Path) -> None:
    s = logits(0, 6, V)
    assert bgn._tensor("student_logits", s[::2]).data_ptr() == s.ctypes.data
    s.tofile(tmp_path / "logits")
    stored = np.memmap(tmp_path / "logits", np.float32, "r", shape=s.shape)
    stats = bgn.row_stats(stored, s[:, ::-1])
    assert (stats.label == s[:, ::-1].argmax(-1)).all()


def test_errors_name_the_argument() -> None:
    s = logits(0, 3, V)
    with pytest.raises(TypeError, match=r"`student_logits`.*list"):
        bgn.row_stats(s.tolist(), s)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`teacher_logits`.*>f4"):
        bgn.row_stats(s, s.astype(">f4"))
    with pytest.raises(TypeError, match=r"`labels`.*<U1"):
        bgn.row_stats(s, s, np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"teacher\.logits"):
        bgn.row_stats(s, s[:2])
