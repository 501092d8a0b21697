"""How are a host and a port written as one, and read again?"""

from __future__ import annotations


def join(host: str, port: int) -> str:
    """host:port, as channels and URLs want it: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of what `join` has written.

    Raises:
        ValueError: there is no port.
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
