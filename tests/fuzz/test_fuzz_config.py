"""Whatever the environment says, settings are settled or refused with the name of the culprit."""

from __future__ import annotations

from hypothesis import strategies as st

from baton.config import BadSetting, declared, resolve, variable
from baton.machine import list_cores, read_cores
from services.router.admission import parse_weights
from tests.fuzz.explore import explore

VARIABLES = [variable(item.name) for _, item, _ in declared()]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
VALUES = TEXT | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["", "true", "no", "auto"])


@explore(
    environ=st.dictionaries(st.sampled_from(VARIABLES) | TEXT.map("BATON_{}".format), VALUES, max_size=4)
)
def test_an_environment_is_settled_or_the_culprit_is_named(environ: dict[str, str]) -> None:
    try:
        settings, effective = resolve({}, environ)
    except BadSetting as refusal:
        assert any(name in refusal.message for name in environ)
        return
    shown = {variable(row.name): row for row in effective}
    for name in environ:
        assert shown[name].source == f"env {name}"
    for section, item, _ in declared():
        value = getattr(getattr(settings, section), item.name)
        low, high = item.metadata["minimum"], item.metadata["maximum"]
        assert low is None or value >= low
        assert high is None or value <= high


@explore(cores=st.sets(st.integers(0, 200), min_size=1))
def test_a_list_of_cores_is_read_as_it_was_written(cores: set[int]) -> None:
    assert set(read_cores(list_cores(sorted(cores)))) == cores


@explore(
    text=TEXT
    | st.lists(st.sampled_from(["a=1", "b=", "=2", "c=0", "d=inf", "e=nan", ",", "=="])).map(",".join)
)
def test_weights_are_positive_or_refused(text: str) -> None:
    try:
        weights = parse_weights(text)
    except BadSetting:
        return
    assert all(0 < weight < float("inf") and name for name, weight in weights.items())
