"""The arithmetic and bytes that MFU and MBU are made of."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.costs import Costs, Tally, peak_of
from baton.engine.scheduler import Scheduled
from baton.engine.sequence import Sequence
from baton.models.config import read_config
from baton.sampling import Sampling

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "baton-small"


def parameters(folder: Path) -> dict[str, int]:
    """Numbers in each tensor of a checkpoint, from the heads of its files."""
    found: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            head = msgspec.json.decode(file.read(size))
        for name, tensor in head.items():
            if name != "__metadata__":
                count = 1
                for axis in tensor["shape"]:
                    count *= axis
                found[name] = count
    return found


def test_bytes_and_flops_are_those_of_the_weights() -> None:
    config = read_config(BUNDLED)
    costs = Costs.of(config, weight_bytes_each=4, kv_bytes_per_token=1)
    sizes = parameters(BUNDLED)
    layers = sum(count for name, count in sizes.items() if ".layers." in name)
    head = config.hidden_size * config.vocab_size
    assert costs.weight_bytes == pytest.approx(4 * (layers + head), rel=0.01)  # norms aside
    assert costs.flops_per_token == pytest.approx(2 * layers, rel=0.01)
    assert costs.flops_per_sampled == 2 * head


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_pairs_are_those_of_causal_attention_however_a_prompt_is_cut(chunks: list[int]) -> None:
    total = sum(chunks)
    sequence = Sequence(0, "r", [1] * total, total, Sampling(max_tokens=1), b"root", 16)
    tally = Tally()
    ends = [sum(chunks[:number]) for number in range(len(chunks) + 1)]
    for start, end in pairwise(ends):
        tally.count(Scheduled(sequence, end - start, start, samples=end == total))
    assert tally.attended_pairs == total * (total + 1) // 2
    assert tally.computed_tokens == total
    assert tally.sampled_tokens == 1
    assert tally.read_tokens == sum(ends)


def test_devices_are_known_by_the_drivers_names() -> None:
    for name, tflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA L40", 181), ("NVIDIA L4", 121)):
        peak = peak_of(name)
        assert peak is not None
        assert peak.flops_per_s == tflops * 1e12
    assert peak_of("cpu") is None
