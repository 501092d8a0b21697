"""Keys, their file, and who comes in with which."""

from __future__ import annotations

import json
import stat
from hmac import compare_digest
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from baton.cli.keys import keys
from baton.config import BadSetting
from baton.errors import PermissionDenied, Unauthenticated
from baton.security.access import ANYONE, Access
from baton.security.keys import BadKeyFile, new_key, read_keys, write_keys
from baton.security.quota import RateLimited


class Clock:
    """Time as a test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def baton_keys(*words: str) -> Result:
    return CliRunner().invoke(keys, words)


def bearer(secret: str) -> str:
    return f"Bearer {secret}"


def test_the_file_holds_hashes_and_never_a_key(file: Path) -> None:
    secret = baton_keys("new", "--api-keys", str(file), "--tenant", "acme").output.strip()
    assert secret.startswith("sk-baton-")
    assert len(secret) >= 50
    text = file.read_text()
    assert secret not in text
    assert secret.removeprefix("sk-baton-") not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Access(str(file)).admit(bearer(secret)).tenant == "acme"


def test_keys_are_listed_and_revoked_by_id(file: Path) -> None:
    kept, revoked = (baton_keys("new", "--api-keys", str(file)).output.strip() for _ in range(2))
    second = read_keys(file)[1]
    assert baton_keys("revoke", "--api-keys", str(file), second.id).exit_code == 0
    listed = baton_keys("list", "--api-keys", str(file)).output
    assert "valid" in listed
    assert "revoked" in listed
    access = Access(str(file))
    access.admit(bearer(kept))
    with pytest.raises(PermissionDenied, match=second.id):
        access.admit(bearer(revoked))
    unknown = baton_keys("revoke", "--api-keys", str(file), "nobody")
    assert unknown.exit_code == 1
    assert "nobody" in unknown.output


def test_what_the_file_could_not_hold_is_refused_and_leaves_it_alone(file: Path) -> None:
    baton_keys("new", "--api-keys", str(file), "--tenant", "acme")
    before = file.read_bytes()
    for words, status in (
        (("--weight", "0"), 2),
        (("--requests-per-minute", "-1"), 2),
        (("--tenant", "acme", "--weight", "2"), 1),
    ):
        refused = baton_keys("new", "--api-keys", str(file), *words)
        assert refused.exit_code == status, refused.output
    assert file.read_bytes() == before


def test_without_a_file_anybody_comes_in() -> None:
    assert Access("").admit("") is ANYONE


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer ", "Basic abc", "Bearer sk-baton-wrong", "Bearer \udcff é", "x"]
)
def test_whoever_has_no_known_key_stays_out(file: Path, authorization: str) -> None:
    secret, key = new_key()
    write_keys(file, [key])
    access = Access(str(file))
    with pytest.raises(Unauthenticated) as refused:
        access.admit(authorization)
    assert "wrong" not in refused.value.message, "what was sent is not repeated"
    access.admit(bearer(secret))
    access.admit(f"bearer  {secret} ")


def test_the_hash_of_a_key_is_no_key(file: Path) -> None:
    secret, key = new_key()
    write_keys(file, [key])
    access = Access(str(file))
    for near in (key.sha256, secret[:-1], secret + "x", secret.upper()):
        with pytest.raises(Unauthenticated):
            access.admit(bearer(near))


def test_a_changed_file_counts_within_a_second(file: Path, clock: Clock) -> None:
    (first, first_key), (second, second_key) = new_key(), new_key(tenant="b", weight=3.0)
    write_keys(file, [first_key])
    access = Access(str(file), clock=clock)
    weights = access.weights({"other": 0.5})
    assert dict(weights) == {"other": 0.5}
    write_keys(file, [second_key])
    access.admit(bearer(first))
    clock.now_s += 1
    with pytest.raises(Unauthenticated):
        access.admit(bearer(first))
    assert access.admit(bearer(second)).tenant == "b"
    assert dict(weights) == {"b": 3.0, "other": 0.5}
    assert weights.get("nobody", 1.0) == 1.0


def test_a_broken_or_missing_file_leaves_the_keys_as_they_were(
    file: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    secret, key = new_key()
    write_keys(file, [key])
    access = Access(str(file), clock=clock)
    for content in (b"{", None, b'{"keys": [{"id": "a", "sha256": "short"}]}'):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        for _ in range(3):
            clock.now_s += 1
            access.admit(bearer(secret))
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3, "each change is said once"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not a file of API keys"),
        ("[]", "not a file of API keys"),
        ('{"keys": [{"id": "a"}]}', "sha256"),
        ('{"keys": [], "more": 1}', "more"),
        (json.dumps({"keys": [{"id": "a", "sha256": "A" * 64}]}), "sha256"),
        (
            json.dumps({"keys": [{"id": i, "sha256": "a" * 64} for i in "ab"]}),
            "two keys have the same sha256",
        ),
        (json.dumps({"keys": [{"id": "a", "sha256": s * 64} for s in "ab"]}), "two keys have the same id"),
        ("[" * 100_000, "not a file of API keys"),
    ],
)
def test_a_file_that_cannot_be_used_keeps_the_router_from_starting(
    file: Path, content: str, says: str
) -> None:
    file.write_text(content)
    with pytest.raises(BadKeyFile, match=says):
        read_keys(file)
    with pytest.raises(BadSetting, match="--api-keys"):
        Access(str(file))


def test_a_file_that_is_not_there_is_no_reason_to_let_everybody_in(file: Path) -> None:
    with pytest.raises(BadSetting, match="baton keys new"):
        Access(str(file))


def test_requests_per_minute_hold_for_each_key_and_survive_a_reload(file: Path, clock: Clock) -> None:
    (limited, key), (free, other) = new_key(requests_per_minute=60), new_key()
    write_keys(file, [key, other])
    access = Access(str(file), clock=clock)
    for _ in range(60):
        access.admit(bearer(limited))
    with pytest.raises(RateLimited) as refused:
        access.admit(bearer(limited))
    assert refused.value.retry_after_s == pytest.approx(1.0)
    access.admit(bearer(free))
    clock.now_s += 1.5
    write_keys(file, [key, msgspec.structs.replace(other, revoked=True)])
    access.admit(bearer(limited))
    with pytest.raises(RateLimited):
        access.admit(bearer(limited))


def test_keys_are_compared_as_hashes_and_in_constant_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, key = new_key()
    write_keys(file, [key])
    access = Access(str(file))
    compared: list[tuple[bytes, bytes]] = []

    def noting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    monkeypatch.setattr("baton.security.access.hmac.compare_digest", noting)
    access.admit(bearer(secret))
    assert compared == [(bytes.fromhex(key.sha256),) * 2]
