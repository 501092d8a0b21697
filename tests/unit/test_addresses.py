"""A host and a port as one, whichever kind of address the host is."""

import pytest

from baton.addresses import join, split


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.1", "10.0.0.1:80"), ("::1", "[::1]:80"), ("worker-0.example", "worker-0.example:80")],
)
def test_what_is_joined_is_split_again(host: str, address: str) -> None:
    assert join(host, 80) == address
    assert split(address) == (host, 80)


def test_an_address_without_a_port_is_refused() -> None:
    with pytest.raises(ValueError, match="worker-0"):
        split("worker-0")
