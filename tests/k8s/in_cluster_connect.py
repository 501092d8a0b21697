"""Runs in the client pod: whether a TCP connection comes about, as JSON. Arguments: host, port."""

import json
import socket
import sys

try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
    print(json.dumps(True))
except socket.gaierror:
    raise
except OSError:  # no answer, or a network that refuses instead of dropping
    print(json.dumps(False))
