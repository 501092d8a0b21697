"""Each Triton kernel computes what the layers compute without it."""

from __future__ import annotations

import pytest
import torch

from baton.attention.paged import PagedKvCache
from baton.engine import draw
from baton.kernels import fused
from baton.kv.hashing import KvLayout
from baton.models.layers import OffsetRmsNorm, RmsNorm, added_and_normed, gated, gelu_tanh, silu
from baton.models.rope import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the last bit of the dtype or two: sums are added up in another order."""
    assert actual.dtype == expected.dtype
    bits = {torch.float32: 20, torch.bfloat16: 6, torch.float16: 9}[actual.dtype]
    assert torch.allclose(actual.float(), expected.float(), rtol=2.0**-bits, atol=2.0**-bits)


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "kernels", lambda: None)


@pytest.mark.parametrize("size", [64, 100, 4096, 8192])
@pytest.mark.parametrize("make", [RmsNorm, OffsetRmsNorm])
def test_norms(make, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = make(random(size, dtype=dtype), 1e-5)
    x, delta = random(7, size, dtype=dtype), random(7, size, dtype=dtype)
    heads = random(5, 9, size, dtype=dtype)[:, 2:6]
    fast = norm(x), *added_and_normed(x, delta, norm), norm(heads)
    plainly(monkeypatch)
    for actual, expected in zip(fast, (norm(x), x + delta, norm(x + delta), norm(heads)), strict=True):
        same(actual, expected)


@pytest.mark.parametrize("activation", [silu, gelu_tanh])
def test_gates(activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = random(33, 2 * 1500, dtype=dtype)
    fast = gated(activation, gate_up)
    plainly(monkeypatch)
    same(fast, gated(activation, gate_up))


@pytest.mark.parametrize("half", [12, 32, 64])
def test_rotations(half: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = random(50, 11, 128, dtype=dtype)
    turn = (torch.randn(50, 1, half, device="cuda"), torch.randn(50, 1, half, device="cuda"))
    fast = rotate(heads.clone()[:, 1:8], turn)
    plainly(monkeypatch)
    same(fast, rotate(heads[:, 1:8], turn))


def test_keys_and_values_are_stored_where_they_belong(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = KvLayout("test", "", 16, 0, "")
    shape, device = (9, 3, 2, 16, 4, 80), torch.device("cuda")
    fast, plain = PagedKvCache(layout, shape, dtype, device), PagedKvCache(layout, shape, dtype, device)
    rows = torch.tensor([5, 96 + 3, 4 * 96], device="cuda")
    k, v = random(3, 12, 80, dtype=dtype)[:, 4:].split(4, dim=1)
    fast.write(1, rows, k, v)
    plainly(monkeypatch)
    plain.write(1, rows, k, v)
    assert plain.storage.any()
    assert torch.equal(fast.storage, plain.storage)


def test_the_search_for_the_last_token_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (torch.randn(5, 50_257, device="cuda") * 3).bfloat16().float()  # with many equals
    order = draw._ordered(logits)
    weights = (logits.double().softmax(-1) * 2.0**52).long()
    shares = torch.tensor([[0.01], [0.5], [0.9], [0.9999], [2.0]], dtype=torch.float64, device="cuda")
    fast = draw._keep_share(weights, order, shares)
    plainly(monkeypatch)
    assert torch.equal(fast, draw._keep_share(weights, order, shares))
