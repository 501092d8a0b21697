"""Does the NetworkPolicy keep strangers out, where the cluster's network enforces any?"""

from __future__ import annotations

import json
import subprocess

from tests.k8s.release import IMAGES, Release, program

#: Asked inside the pod, where no policy is in the way.
LISTENS = "import socket; socket.create_connection(('127.0.0.1', 8000), timeout=1).close()"

DENIED = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "denied"},
            "spec": {"podSelector": {"matchLabels": {"app": "denied"}}, "policyTypes": ["Ingress"]},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "denied", "labels": {"app": "denied"}},
            "spec": {
                "enableServiceLinks": False,
                "containers": [
                    {
                        "name": "server",
                        "image": IMAGES["router"],
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python", "-m", "http.server", "8000", "--directory", "/opt/baton"],
                        "readinessProbe": {"exec": {"command": ["python", "-c", LISTENS]}},
                    }
                ],
            },
        },
    ],
}


def test_a_stranger_reaches_the_router_and_nothing_else(release: Release) -> None:
    command = [program("kubectl"), "--namespace", release.namespace, "apply", "-f", "-"]
    subprocess.run(command, input=json.dumps(DENIED), text=True, check=True, timeout=60)
    release.kubectl("wait", "--for=condition=Ready", "pod/denied", "--timeout=60s")
    (denied,) = (one for one in release.objects("pods") if one["metadata"]["name"] == "denied")
    (decode,) = release.pods("decode")

    assert release.execute("in_cluster_connect.py", release.address, "8000")
    # What the network does not enforce for a policy that denies everything, it enforces for none.
    enforced = not release.execute("in_cluster_connect.py", denied["status"]["podIP"], "8000")
    for host, port in ((f"{release.name}-kvstore", "50052"), (decode["status"]["podIP"], "50053")):
        assert release.execute("in_cluster_connect.py", host, port) is not enforced
    release.kubectl("delete", "pod/denied", "networkpolicy/denied", "--grace-period=0", "--force")
