"""Layers give a row the same bits whatever rows it comes with and however many threads compute it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from baton.models.layers import ACTIVATIONS, Linear, RmsNorm


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_does_not_depend_on_where_a_value_lies(name: str, dtype: torch.dtype) -> None:
    """A vectorised loop and its scalar tail differ for about one value in fifty thousand, so many values
    are computed as tails: in pieces of fewer than a vector register holds, or a few more."""
    values = (4 * torch.randn(150_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    together = ACTIVATIONS[name](values)
    for length in (15, 45):
        apart = torch.cat([ACTIVATIONS[name](piece) for piece in values.split(length)])
        assert torch.equal(apart, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "rows"), [(2816, 256), (1024, 300), (64, 503), (71, 60)])
def test_a_product_does_not_depend_on_the_other_rows(columns: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(torch.randn(rows, columns, generator=generator).to(dtype))
    x = torch.randn(300, columns, generator=generator).to(dtype)
    together = linear(x)
    for count in (1, 2, 3, 5, 6, 17, 64, 129):
        assert torch.equal(linear(x[7 : 7 + count]), together[7 : 7 + count])


@pytest.mark.parametrize("size", [18, 60, 1024, 2815])
def test_a_norm_does_not_depend_on_the_other_rows(size: int) -> None:
    norm = RmsNorm(torch.ones(size), 1e-6)
    x = torch.randn(300, size, generator=torch.Generator().manual_seed(0))
    together = norm(x)
    for count in (1, 2, 3, 17, 129):
        assert torch.equal(norm(x[7 : 7 + count]), together[7 : 7 + count])
