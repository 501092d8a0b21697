"""Writes charts/baton/values.schema.json: `python charts/schema.py`.

The settings in it are those of baton/config.py, so that a Helm value is checked like a flag.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from baton.config import declared

SCHEMA = Path(__file__).parent / "baton" / "values.schema.json"

#: Settings that templates give every process, or that have a value with another name.
GIVEN = {
    "model": {"model", "served_model_name", "device", "gpu"},
    "worker": {"role", "worker_id", "worker_host", "worker_port", "transfer"},
    "router": {"host", "port", "grpc_port", "share_ports", "api_keys", "tls_cert", "tls_key"},
    "planner": {
        *("planner_host", "router_metrics", "namespace", "lease"),
        *("prefill_workload", "decode_workload", "gpus_per_prefill", "gpus_per_decode"),
    },
    "kvstore": {"kvstore", "kvstore_port", "kvstore_host", "redis"},
    "observability": {"metrics_port"},
}

Schema = dict[str, Any]


def camel(name: str) -> str:
    """The Helm value of the setting `name`: `kv_bytes` is `kvBytes`."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def settings(*sections: str) -> dict[str, Schema]:
    """Schemas of the settings of `sections` that values may give, by Helm name."""
    return {
        camel(item.name): _setting(item, kind)
        for section, item, kind in declared(sections)
        if item.name not in GIVEN.get(section, set())
    }


def _setting(item: Any, kind: Any) -> Schema:
    schema: Schema = {"description": item.metadata["help"]}
    if get_origin(kind) is not None:
        return schema | {"enum": list(get_args(kind))}
    schema["type"] = {int: "integer", float: "number", bool: "boolean", str: "string"}[kind]
    for bound in ("minimum", "maximum"):
        if item.metadata[bound] is not None:
            schema[bound] = item.metadata[bound]
    return schema


def closed(**properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def number(minimum: int = 0) -> Schema:
    return {"type": "integer", "minimum": minimum}


TEXT: Schema = {"type": "string"}
SWITCH: Schema = {"type": "boolean"}
FREE: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
OBJECTS: Schema = {"type": "array", "items": FREE}
WORDS: Schema = {"type": "array", "items": TEXT}
PULL: Schema = {"enum": ["Always", "IfNotPresent", "Never"]}
VARIABLES: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": TEXT, "value": TEXT, "valueFrom": FREE},
    },
}
RESOURCES = closed(limits=FREE, requests=FREE, claims=OBJECTS)
COUNT: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^([0-9]+%)?$"}]}

IMAGE: dict[str, Schema] = {"repository": TEXT, "tag": TEXT, "digest": TEXT}
POD: dict[str, Schema] = {
    "image": closed(**IMAGE),
    "resources": RESOURCES,
    "nodeSelector": TEXTS,
    "tolerations": OBJECTS,
    "affinity": FREE,
    "topologySpreadConstraints": OBJECTS,
    "priorityClassName": TEXT,
    "runtimeClassName": TEXT,
    "podAnnotations": TEXTS,
    "podLabels": TEXTS,
    "podSecurityContext": FREE,
    "securityContext": FREE,
    "extraEnv": VARIABLES,
    "extraArgs": WORDS,
    "extraVolumes": OBJECTS,
    "extraVolumeMounts": OBJECTS,
}
SCALED: dict[str, Schema] = {
    "replicas": number(),
    "updateStrategy": closed(type=TEXT, rollingUpdate=FREE),
    "pdb": closed(enabled=SWITCH, minAvailable=COUNT, maxUnavailable=COUNT),
    "hpa": closed(
        enabled=SWITCH, minReplicas=number(1), maxReplicas=number(1), metrics=OBJECTS, behavior=FREE
    ),
    "keda": closed(
        enabled=SWITCH, minReplicas=number(), maxReplicas=number(1), triggers=OBJECTS, advanced=FREE
    ),
}
ROUTE = closed(enabled=SWITCH, parentRefs=OBJECTS, hostnames=WORDS, annotations=TEXTS)


def worker() -> Schema:
    return closed(
        **POD, **SCALED, config=closed(**settings("engine", "worker")), startupTimeoutSeconds=number(1)
    )


def values() -> Schema:
    """The schema of values.yaml."""
    said = settings("observability")
    path = closed(path=TEXT, pathType={"enum": ["Prefix", "Exact", "ImplementationSpecific"]})
    host = closed(host=TEXT, paths={"type": "array", "items": path})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "baton",
    } | closed(
        # What Helm itself passes to a chart that is part of another.
        **{"global": FREE},
        nameOverride=TEXT,
        fullnameOverride=TEXT,
        image=closed(registry=TEXT, tag=TEXT, pullPolicy=PULL),
        imagePullSecrets=OBJECTS,
        device={"enum": list(get_args(_kind("device")))},
        model=closed(
            id=TEXT,
            uri={"type": "string", "pattern": "^(hf|s3|gs|az|pvc|file)://.+"},
            existingSecret=TEXT,
            extraEnv=VARIABLES,
            **settings("model"),
        ),
        modelCache=closed(
            enabled=SWITCH,
            existingClaim=TEXT,
            size=TEXT,
            storageClassName=TEXT,
            accessModes=WORDS,
            annotations=TEXTS,
        ),
        **{name: said[name] for name in ("logLevel", "logFormat", "otlpEndpoint", "traceShare")},
        serviceAccount=closed(create=SWITCH, name=TEXT, annotations=TEXTS),
        podAnnotations=TEXTS,
        priorityClassName=TEXT,
        router=closed(
            **POD,
            **SCALED,
            config=closed(**settings("router")),
            service=closed(
                type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                port=number(1),
                grpcPort=number(1),
                annotations=TEXTS,
            ),
            preStopSeconds=number(),
        ),
        kvstore=closed(**POD, config=closed(**settings("kvstore"))),
        planner=closed(**POD, enabled=SWITCH, replicas=number(1), config=closed(**settings("planner"))),
        prefill=worker(),
        decode=worker(),
        shm=closed(size=TEXT),
        rdma=closed(enabled=SWITCH, resources=FREE, netDevices=TEXT, transports=TEXT),
        ucx={
            "type": "object",
            "additionalProperties": {"type": ["string", "number"]},
            "propertyNames": {"pattern": "^UCX_"},
        },
        redis=closed(
            url=TEXT,
            existingSecret=TEXT,
            existingSecretKey=TEXT,
            bundled=closed(enabled=SWITCH, image=closed(registry=TEXT, **IMAGE), resources=RESOURCES),
        ),
        tls=closed(existingSecret=TEXT, certManager=closed(enabled=SWITCH, issuerRef=FREE, dnsNames=WORDS)),
        internalTls=closed(existingSecret=TEXT, certManager=closed(enabled=SWITCH, issuerRef=FREE)),
        apiKeys=closed(existingSecret=TEXT, key=TEXT, testKey=TEXT),
        ingress=closed(
            enabled=SWITCH,
            className=TEXT,
            annotations=TEXTS,
            hosts={"type": "array", "items": host},
            tls=OBJECTS,
        ),
        gateway=closed(httpRoute=ROUTE, grpcRoute=ROUTE),
        serviceMonitor=closed(enabled=SWITCH, labels=TEXTS, interval=TEXT, scrapeTimeout=TEXT),
        grafana=closed(dashboards=closed(enabled=SWITCH, labels=TEXTS, annotations=TEXTS)),
        networkPolicy=closed(enabled=SWITCH, routerFrom=OBJECTS, metricsFrom=OBJECTS),
    )


def _kind(name: str) -> Any:
    return next(kind for _, item, kind in declared() if item.name == name)


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(values(), indent=2) + "\n")
