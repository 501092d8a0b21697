"""Does `baton plan` print a plan and write values that say the same?"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from baton.cli.main import main
from baton.config import BadSetting
from baton.planning.offers import Hardware, offer_of

OPT = ("--profile", "distserve:opt-13b:1", "--weight-bytes", "26e9", "--kv-bytes-per-token", "819200")
LOAD = ("--request-rate", "8", "--num-prompts", "60", "--input-len", "600", "--output-len", "60")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *OPT, *arguments])


def test_the_values_are_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    done = plan(*LOAD, "--slo-ttft", "0.5", "--slo-tpot", "0.1", "--values", str(file))
    assert done.exit_code == 0, done.output
    values = yaml.safe_load(file.read_text())
    prefills, decoders = (values[role]["replicas"] for role in ("prefill", "decode"))
    assert f"{prefills} prefill distserve:opt-13b:1 + {decoders} decode" in done.output
    assert values["prefill"]["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert f"# Ratio {prefills} : {decoders}:" in file.read_text()


def test_what_cannot_be_met_is_said() -> None:
    done = plan(*LOAD, "--slo-ttft", "0.05", "--max-gpus", "3")
    assert done.exit_code == 1
    assert "no fleet of up to 3 GPUs" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(LOAD, "--slo-ttft"), (("--slo-ttft", "1", "--concurrency", "4", "--num-prompts", "4"), "open loop")],
)
def test_a_question_that_is_none_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = plan(*arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_a_worker_has_the_memory_of_its_gpus_less_the_weights() -> None:
    hardware = Hardware(gpu_bytes=80e9, weight_bytes=26e9, kv_bytes_per_token=819_200)
    one, two = (offer_of(f"distserve:opt-13b:{degree}", hardware) for degree in (1, 2))
    assert (one.gpus, two.gpus) == (1, 2)
    assert one.spec.kv_blocks == int(46e9 / 819_200) // 16
    assert two.spec.kv_blocks == int(118e9 / 819_200) // 16
    assert offer_of("distserve:opt-13b:1@4", hardware).gpus == 4


def test_a_worker_takes_steps_as_long_as_it_would_choose_itself_unless_told() -> None:
    by_itself = Hardware(gpu_bytes=80e9, weight_bytes=26e9, kv_bytes_per_token=819_200)
    told = replace(by_itself, max_batch_tokens=777)
    sizes = [offer_of("distserve:opt-13b:1", each).spec.max_batch_tokens for each in (by_itself, told)]
    # On one A100 prompts of 512 are computed at 89 % of the best speed, those of 1024 at 99 %.
    assert sizes == [1024, 777]


def test_a_model_that_does_not_fit_is_refused() -> None:
    hardware = Hardware(gpu_bytes=24e9, weight_bytes=26e9, kv_bytes_per_token=819_200)
    with pytest.raises(BadSetting, match="leave no room for KV on 1 GPUs"):
        offer_of("distserve:opt-13b:1", hardware)
