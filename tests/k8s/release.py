"""A release of the chart on the cluster that KUBECONFIG names, as tests handle it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "baton"
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
BIN = Path(sys.executable).parent

IMAGES = {
    "router": os.environ.get("K8S_ROUTER_IMAGE", f"baton-router:{VERSION}"),
    "kvstore": os.environ.get("K8S_KVSTORE_IMAGE", f"baton-kvstore:{VERSION}"),
    "planner": os.environ.get("K8S_PLANNER_IMAGE", f"baton-planner:{VERSION}"),
    "prefill": os.environ.get("K8S_WORKER_IMAGE", f"baton-worker-cpu:{VERSION}"),
    "decode": os.environ.get("K8S_WORKER_IMAGE", f"baton-worker-cpu:{VERSION}"),
}
MORE_VALUES = os.environ.get("K8S_VALUES", "")
COMPONENTS = tuple(IMAGES)
#: Kinds that a release may make; Events and what controllers derive from these go with them.
KINDS = "all,configmap,secret,serviceaccount,pvc,pdb,networkpolicy,ingress,hpa,role,rolebinding,lease"

START_S = 300
#: The values decide again, also about replicas that `kubectl scale` or the planner has set meanwhile.
CHANGE = ("--force-conflicts", "--wait", "--timeout", f"{START_S}s")


@dataclass(frozen=True)
class Release:
    """One `helm install` in a namespace of its own, with a pod to ask it from inside the cluster."""

    name: str
    namespace: str

    # ---- programs

    def kubectl(self, *arguments: str, timeout_s: float = 120, given: str = "") -> str:
        """What it prints; `given` is its standard input."""
        return _run([program("kubectl"), "--namespace", self.namespace, *arguments], timeout_s, given)

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "-o", "json"))["items"]
        return found

    def helm(self, *arguments: str, timeout_s: float = START_S + 30) -> str:
        return _run([program("helm"), "--namespace", self.namespace, *arguments], timeout_s)

    # ---- life

    def install(self, *values: str) -> None:
        self.helm("install", self.name, str(CHART), *_values(values), "--wait", "--timeout", f"{START_S}s")

    def upgrade(self, *values: str) -> None:
        self.helm("upgrade", self.name, str(CHART), *_values(values), *CHANGE)

    def rollback(self) -> None:
        self.helm("rollback", self.name, *CHANGE)

    def start_client(self) -> None:
        """The pod that `execute` runs in: the router's image, which has Python and the stubs."""
        self.start_pod("client", ["python", "-c", "import signal; signal.sigwait([signal.SIGTERM])"])

    def start_pod(self, name: str, command: Sequence[str], ready: Sequence[str] = ()) -> None:
        """A pod of the router's image, labelled app=NAME, and as confined as the chart's own: it comes up
        wherever they do. Returns once it runs and the command `ready`, if there is one, succeeds in it."""
        container: dict[str, Any] = {
            "name": name,
            "image": IMAGES["router"],
            "imagePullPolicy": "IfNotPresent",
            "command": list(command),
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        if ready:
            probe = {"exec": {"command": list(ready)}, "periodSeconds": 2, "timeoutSeconds": 5}
            container["readinessProbe"] = probe
        confined = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"containers": [container], "securityContext": confined, "enableServiceLinks": False},
        }
        self.apply(pod)
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s")

    def apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", given=json.dumps(manifest))

    # ---- what there is

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of a component that are not on their way out."""
        found = self.objects("pods", "-l", self._selector(component))
        return [one for one in found if "deletionTimestamp" not in one["metadata"]]

    def ready(self, component: str) -> bool:
        """Whether a component has all its pods, and all of them take work."""
        (deployment,) = self.objects("deployments", "-l", self._selector(component))
        pods = self.pods(component)
        return len(pods) == deployment["spec"]["replicas"] and all(
            condition["status"] == "True"
            for one in pods
            for condition in one["status"].get("conditions", [{"type": "Ready", "status": "False"}])
            if condition["type"] == "Ready"
        )

    def _selector(self, component: str) -> str:
        return f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"

    def replace(self, component: str) -> None:
        """Take one pod away without a goodbye, and wait until another does its work."""
        gone = str(self.pods(component)[0]["metadata"]["name"])
        self.kubectl("delete", "pod", gone, "--grace-period=0", "--force")
        wait_for(
            f"another {component}",
            lambda: (
                gone not in {one["metadata"]["name"] for one in self.pods(component)}
                and self.ready(component)
            ),
            START_S,
        )

    @property
    def address(self) -> str:
        """The router's Service, inside the cluster."""
        return f"{self.name}-router"

    # ---- asking it

    def execute(self, script: str, *arguments: str, timeout_s: float = 120) -> Any:
        """What the script in this folder, run in the client pod, prints as JSON."""
        return json.loads(self.kubectl(*_execution(script, arguments), timeout_s=timeout_s))

    @contextmanager
    def load(self, concurrency: int = 4) -> Iterator[dict[str, Any]]:
        """Requests through the Service, from before the body of `with` begins until after it ends. The
        dictionary has what came of them once it has ended."""
        outcome: dict[str, Any] = {}
        command = [program("kubectl"), "--namespace", self.namespace]
        command += _execution("in_cluster_load.py", [self.address, str(concurrency)])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "answered\n"
                yield outcome
                printed, _ = process.communicate("", timeout=180)  # closing its input ends the load
                outcome.update(json.loads(printed))
            finally:
                process.kill()

    def metric(self, component: str, name: str) -> float:
        """The sum of a metric without labels over a component's pods."""
        addresses = [one["status"]["podIP"] for one in self.pods(component)]
        return float(self.execute("in_cluster_metric.py", name, *addresses))

    @contextmanager
    def forward(self, port: int) -> Iterator[str]:
        """host:port here that leads to the Service's port."""
        command = [program("kubectl"), "--namespace", self.namespace, "port-forward"]
        command += [f"service/{self.address}", f":{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
                assert found is not None
                yield f"127.0.0.1:{found[1]}"
            finally:
                process.kill()


def wait_for(what: str, condition: Any, timeout_s: float = 60) -> None:
    """Ask `condition` until it says yes.

    Raises:
        AssertionError: it has not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.5)


def _execution(script: str, arguments: Sequence[str]) -> list[str]:
    source = (Path(__file__).parent / script).read_text()
    return ["exec", "-i", "client", "--", "python", "-c", source, *arguments]


def _values(more: Sequence[str]) -> list[str]:
    words = ["--values", str(CHART / "values-kind.yaml")]
    for component, image in IMAGES.items():
        repository, _, tag = image.rpartition(":")
        words += ["--set-string", f"{component}.image.repository={repository},{component}.image.tag={tag}"]
    if MORE_VALUES:
        words += ["--values", MORE_VALUES]
    for value in more:
        # --set makes text of a number that has a fraction.
        fraction = re.fullmatch(r"[^=]+=\d+\.\d+", value)
        words += ["--set-json" if fraction else "--set", value]
    return words


def program(name: str) -> str:
    beside = BIN / name
    return str(beside) if beside.exists() else name


def _run(command: Sequence[str], timeout_s: float, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
