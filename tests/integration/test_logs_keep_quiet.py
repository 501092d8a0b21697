"""What users send and what they get is in no log, at the most talkative level, whatever goes wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from baton.security.keys import new_key, write_keys
from baton.text import Tokenizer
from tests.conftest import StartCluster
from tests.unit.router.fakes import MODEL

MARKER = "zebra-crossing-at-midnight"
C, CHAT = "/v1/completions", "/v1/chat/completions"


def test_no_log_holds_a_prompt_an_answer_or_a_key(start_cluster: StartCluster, tmp_path: Path) -> None:
    secret, key = new_key(tenant="acme", requests_per_minute=1000)
    keys = tmp_path / "keys.json"
    write_keys(keys, [key])
    tokenizer = Tokenizer.load(MODEL)
    assert tokenizer is not None
    token_ids = tokenizer.encode(MARKER, add_special_tokens=False)
    with start_cluster(
        *("--api-keys", str(keys), "--log-level", "debug", "--keep-logs"), model=MODEL
    ) as cluster:
        headers = {"authorization": f"Bearer {secret}"}
        answers = []
        with httpx.Client(base_url=cluster.base_url, timeout=60, headers=headers) as client:
            for path, body in (
                (C, {"prompt": MARKER, "max_tokens": 12, "ignore_eos": True}),
                (CHAT, {"messages": [{"role": "user", "content": MARKER}], "max_tokens": 12}),
                (C, {"prompt": token_ids, "max_tokens": 12, "stream": True, "cache_salt": MARKER}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                if path == C and "stream" not in body:
                    answers.append(answer.json()["choices"][0]["text"].strip())
            # Everything that can be wrong with a request, and what is in it.
            for path, content in (
                (C, f'{{"prompt": "{MARKER}", "temperature": NaN}}'),
                (C, f'{{"{MARKER}": 1}}'),
                (C, f'{{"prompt": "{MARKER}'),
                (CHAT, f'{{"messages": [{{"role": "{MARKER}", "content": "{MARKER}"}}]}}'),
                (f"/{MARKER}", "{}"),
                ("/v1/models/" + MARKER, ""),
            ):
                assert 400 <= client.post(path, content=content).status_code < 500
            wrong = f"sk-baton-{MARKER}"
            assert client.get("/v1/models", headers={"authorization": f"Bearer {wrong}"}).status_code == 401
            route = httpx.get(f"{cluster.own_url}/debug/route", params={"prompt": MARKER})
            assert route.status_code == 200
            with grpc.insecure_channel(cluster.grpc_address) as channel:
                request = inference_pb2.GenerateRequest(text=MARKER)
                request.sampling.max_tokens = 4
                metadata = (("authorization", f"Bearer {secret}"),)
                list(
                    inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60, metadata=metadata)
                )
            # A worker that dies in the middle of an answer: failures are where logs talk most.
            body = {"prompt": MARKER, "max_tokens": 200, "ignore_eos": True, "stream": True}
            with client.stream("POST", C, json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                os.kill(cluster.pids()["decode-0"], signal.SIGKILL)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        logs = {**cluster.logs(), "baton up": cluster.stdout + cluster.stderr}
        assert "router" in logs
        assert any(" DEBUG " in text for text in logs.values()), "the level is the most talkative one"
        (answer,) = answers
        assert len(answer) > 10
        for name, text in logs.items():
            for secret_text in (MARKER, secret, secret.removeprefix("sk-baton-"), key.sha256, answer):
                assert secret_text not in text, (name, _line_with(secret_text, text))
            assert str(token_ids)[1:-1] not in text, name


def _line_with(wanted: str, text: str) -> str:
    return next(line for line in text.splitlines() if wanted in line)


@pytest.mark.parametrize("name", ["router", "kvstore", "prefill", "decode"])
def test_there_is_no_setting_that_logs_them(name: str) -> None:
    from baton.config import PROCESS_SECTIONS, declared

    logged = {item.name for _, item, _ in declared(PROCESS_SECTIONS[name]) if "log" in item.name}
    assert logged <= {"log_level", "log_format", "logit_bias"}
