"""Does the NetworkPolicy keep strangers out, where the cluster's network enforces any?"""

from __future__ import annotations

from tests.k8s.release import Release

#: Asked inside the pod, where no policy is in the way.
LISTENS = "import socket; socket.create_connection(('127.0.0.1', 8000), timeout=1).close()"
NOBODY_MAY_CONNECT = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "denied"},
    "spec": {"podSelector": {"matchLabels": {"app": "denied"}}, "policyTypes": ["Ingress"]},
}


def test_a_stranger_reaches_the_router_and_nothing_else(release: Release) -> None:
    release.apply(NOBODY_MAY_CONNECT)
    server = ["python", "-m", "http.server", "8000", "--directory", "/opt/baton"]
    release.start_pod("denied", server, ready=["python", "-c", LISTENS])
    (denied,) = release.objects("pods", "-l", "app=denied")
    (decode,) = release.pods("decode")

    assert release.execute("in_cluster_connect.py", release.address, "8000")
    # What the network does not enforce for a policy that denies everything, it enforces for none.
    enforced = not release.execute("in_cluster_connect.py", denied["status"]["podIP"], "8000")
    for host, port in ((f"{release.name}-kvstore", "50052"), (decode["status"]["podIP"], "50053")):
        assert release.execute("in_cluster_connect.py", host, port) is not enforced
    release.kubectl("delete", "pod/denied", "networkpolicy/denied", "--grace-period=0", "--force")
