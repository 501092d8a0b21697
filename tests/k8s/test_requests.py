"""Do requests through the Service work, and does KV move between pods?"""

from __future__ import annotations

from openai import OpenAI

from tests.k8s.release import Release


def test_helm_test_passes(release: Release) -> None:
    release.helm("test", release.name, "--timeout", "120s")


def test_the_openai_client_streams_a_chat(release: Release) -> None:
    with (
        release.forward(8000) as address,
        OpenAI(base_url=f"http://{address}/v1", api_key="unused") as client,
    ):
        (model,) = client.models.list().data
        stream = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "What does a list do?"}],
            max_tokens=16,
            temperature=0,
            stream=True,
        )
        pieces = [piece.choices[0].delta.content for piece in stream if piece.choices]
    assert "".join(piece or "" for piece in pieces)


def test_grpc_streams_through_the_service(release: Release) -> None:
    answer = release.execute("in_cluster_grpc.py", release.address)
    assert answer["serving"]
    assert answer["tokens"] == 16
    assert answer["text"]


def test_kv_moves_from_pod_to_pod_and_prefixes_are_found_again(release: Release) -> None:
    # A policy that prefills remotely whatever is predicted, and a second decode worker to change to.
    release.upgrade("router.config.policy=round-robin", "decode.replicas=2")
    prompt = "def greet(name):\n    return 'hello ' + name\n\n" * 8
    moved = release.metric("decode", "baton_kv_transfer_bytes_total")
    first = release.execute("in_cluster_ask.py", release.address, prompt, "8")
    assert first["headers"]["x-baton-prefill"] == "remote"
    assert int(first["headers"]["x-baton-cached-tokens"]) == 0
    assert release.metric("decode", "baton_kv_transfer_bytes_total") > moved

    moved = release.metric("decode", "baton_kv_transfer_bytes_total")
    second = release.execute("in_cluster_ask.py", release.address, prompt, "8")
    assert int(second["headers"]["x-baton-cached-tokens"]) > 0
    assert second["answer"]["choices"][0]["text"] == first["answer"]["choices"][0]["text"]
    # The other decode worker's turn: it had nothing, and read what the prefill worker still held.
    assert second["headers"]["x-baton-decode-worker"] != first["headers"]["x-baton-decode-worker"]
    assert release.metric("decode", "baton_kv_transfer_bytes_total") > moved
    release.rollback()
