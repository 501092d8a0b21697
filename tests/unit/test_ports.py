"""Is a port that was picked for a process still free when the process gets to it?"""

import random
import socket
from contextlib import closing

import pytest

from baton.ports import check_free, unused_port


def test_no_outgoing_connection_can_take_the_port_meanwhile() -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        outgoing = probe.getsockname()[1]
    assert 10_000 <= unused_port("127.0.0.1") < outgoing


def test_a_port_that_is_listened_on_is_not_free() -> None:
    port = unused_port("127.0.0.1")
    with closing(socket.create_server(("127.0.0.1", port))), pytest.raises(OSError, match="in use"):
        check_free("127.0.0.1", port)


def test_no_port_is_given_twice_before_anybody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    given = unused_port("127.0.0.1")
    draw, drawn = random.randrange, [given, given]
    monkeypatch.setattr(random, "randrange", lambda *of: drawn.pop() if drawn else draw(*of))
    assert unused_port("127.0.0.1") != given
    assert not drawn


def test_a_host_that_is_elsewhere_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        unused_port("192.0.2.1")
