"""Does every setting have one name, one type and a known origin?"""

from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from baton.cli.main import main
from baton.cli.options import settings_options
from baton.config import SECTIONS, BadSetting, Settings, declared, flag, resolve, variable


def test_a_name_is_declared_once() -> None:
    names = [item.name for _, item, _ in declared()]
    assert len(names) == len(set(names))


def test_every_default_is_valid_and_comes_from_default() -> None:
    settings, effective = resolve({}, {})
    assert {row.source for row in effective} == {"default"}
    assert settings.router.port == 8000


def test_flags_beat_the_environment_which_beats_defaults() -> None:
    environ = {"BATON_PORT": "9000", "BATON_GRPC_PORT": "9001"}
    settings, effective = resolve({"port": 7000, "grpc_port": None}, environ)
    assert (settings.router.port, settings.router.grpc_port) == (7000, 9001)
    sources = {row.name: row.source for row in effective}
    assert sources["port"] == "flag --port"
    assert sources["grpc_port"] == "env BATON_GRPC_PORT"
    assert sources["policy"] == "default"


@pytest.mark.parametrize(
    ("environ", "culprit"),
    [
        ({"BATON_PORT": "http"}, "BATON_PORT"),
        ({"BATON_PORT": "70000"}, "BATON_PORT"),
        ({"BATON_PREFILL": "-1"}, "BATON_PREFILL"),
        ({"BATON_POLICY": "best"}, "BATON_POLICY"),
        ({"BATON_KEEP_LOGS": "perhaps"}, "BATON_KEEP_LOGS"),
        ({"BATON_PORTS": "1"}, "BATON_PORTS"),
    ],
)
def test_a_bad_variable_is_named(environ: dict[str, str], culprit: str) -> None:
    with pytest.raises(BadSetting, match=culprit):
        resolve({}, environ)


def test_every_setting_is_a_flag_with_help_default_and_variable() -> None:
    text = CliRunner().invoke(main, ["config", "--help"], terminal_width=10_000).output
    for _, item, _ in declared():
        assert flag(item.name) in text
        assert variable(item.name) in text


def test_a_command_gets_the_settled_tree() -> None:
    seen: list[Settings] = []

    @click.command()
    @settings_options("router", "cluster")
    def command(settings: Settings) -> None:
        seen.append(settings)

    environ = {"BATON_DECODE": "3", "BATON_LOG_LEVEL": "debug"}
    result = CliRunner().invoke(command, ["--port", "81", "--keep-logs"], env=environ, catch_exceptions=False)
    assert result.exit_code == 0
    assert (seen[0].router.port, seen[0].cluster.decode, seen[0].cluster.keep_logs) == (81, 3, True)
    assert seen[0].observability.log_level == "debug"


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--port", "65536"], ["--policy", "best"]])
def test_a_bad_flag_is_a_usage_error_that_names_it(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["config", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_every_section_is_a_section_of_the_tree() -> None:
    assert set(SECTIONS) == {item.name for item in fields(Settings)}
