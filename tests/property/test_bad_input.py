"""Whatever stands in a token, a specification, a configuration or a request: an answer, or one clear refusal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from fal_agent.inventory.catalog import CATALOG, normalise
from fal_agent.inventory.spec import GPUS_MAX, parse_sim_gpus
from fal_contract.config import ConfigModel, load_config
from fal_contract.errors import Code, FalError
from fal_contract.identity import peer_of_der, peer_of_pem
from fal_contract.join_token import new_token, parse_token
from fal_contract.join_wire import error_body, error_of
from fal_contract.telemetry import redact


class Inner(ConfigModel):
    level: int = Field(3, ge=0)


class Outer(ConfigModel):
    name: str = "a"
    ports: tuple[int, ...] = ()
    inner: Inner = Inner()
    more: dict[str, Inner] = Field(default_factory=dict)


_TOML_VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.text(st.characters(codec="ascii", categories=["L"]))),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
_KEYS = st.sampled_from(["name", "ports", "inner", "more", "nmae", "level", "zzz"])


def outcome(ask: Callable[[], Any]) -> Any:
    """The answer, or the FalError; anything else that is raised fails the test."""
    try:
        return ask()
    except FalError as error:
        return error


@settings(max_examples=60)
@given(st.one_of(st.text(), st.text("falj1.0123456789abcdef", max_size=120)))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    read = outcome(lambda: parse_token(text))
    if isinstance(read, FalError):
        assert (read.code, read.field) == (Code.INVALID, "token")
    else:
        assert parse_token(str(read)) == read


@settings(max_examples=60)
@given(st.integers(), st.integers(0, 120), st.characters())
def test_a_token_with_one_changed_character_never_reads_as_itself(seed: int, place: int, other: str) -> None:
    token = new_token(Random(seed), "ab" * 32)
    text = str(token)
    place %= len(text)
    if text[place] == other:
        return
    read = outcome(lambda: parse_token(text[:place] + other + text[place + 1 :]))
    assert read != token
    assert token.secret not in repr(read)


_SPECS = st.from_regex(r"\d{1,3}x(H100-80GB|T4-16GB)(:mig=\dg\.\d\dgb\*\d)?", fullmatch=True)


@settings(max_examples=60)
@given(st.one_of(st.text(max_size=60), _SPECS))
def test_any_text_is_a_specification_or_refused(text: str) -> None:
    groups = outcome(lambda: parse_sim_gpus(text))
    if isinstance(groups, FalError):
        assert (groups.code, groups.field) == (Code.INVALID, "sim_gpus")
        assert groups.remedy
        return
    assert 1 <= sum(group.count for group in groups) <= GPUS_MAX
    for group in groups:
        assert sum(instance.memory_bytes for instance in group.instances) <= group.model.nominal_gb * 10**9


@given(st.text(max_size=60), st.integers(0, 1 << 42))
def test_any_product_gets_a_name(product: str, memory_bytes: int) -> None:
    name = normalise(product, memory_bytes)
    assert name.endswith("GB")
    assert name not in CATALOG or abs(CATALOG[name].memory_bytes - memory_bytes) <= 0.12 * CATALOG[name].memory_bytes


@settings(max_examples=60)
@given(st.dictionaries(_KEYS, _TOML_VALUES, max_size=4), st.dictionaries(_KEYS, st.text(max_size=8), max_size=2))
def test_any_configuration_is_loaded_or_refused_by_name(values: dict[str, Any], variables: dict[str, str]) -> None:
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    env = {f"FAL_T_{key.upper()}": value for key, value in variables.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.toml"
        file.write_text(text)
        config = outcome(lambda: load_config(Outer, file=file, env=env, prefix="FAL_T", flags={}))
    if isinstance(config, FalError):
        assert config.code is Code.INVALID
        assert config.remedy
        assert "t.toml" in config.what or "FAL_T_" in config.what
    else:
        assert set(values) <= set(Outer.model_fields)


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_any_bytes_are_no_certificate(raw: bytes) -> None:
    for read in (peer_of_pem, peer_of_der):
        with pytest.raises(FalError) as caught:
            read(raw)
        assert caught.value.code is Code.UNAUTHENTICATED


@given(st.sampled_from(list(Code)), st.text(), st.text(), st.text())
def test_errors_survive_the_join_wire(code: Code, what: str, remedy: str, field: str) -> None:
    error = FalError(code, what, remedy=remedy, field=field)
    back = error_of(400, error_body(error))
    assert (back.code, back.what, back.remedy, back.field) == (error.code, error.what, error.remedy, error.field)


@given(st.integers(100, 599), st.binary(max_size=200))
def test_any_answer_of_a_stranger_is_an_error(status: int, body: bytes) -> None:
    assert isinstance(error_of(status, body), FalError)


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.just("hunter2-as-text"), st.text(max_size=20)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["token", "password", "Authorization", "api_key", "x"]), inner, max_size=3),
        ),
        max_leaves=8,
    )
)
def test_nothing_under_a_secret_name_is_logged(value: Any) -> None:
    logged = redact(None, "info", {"event": "e", "x": value})

    def check(node: Any) -> None:
        if isinstance(node, dict):
            for key, inner in node.items():
                if key in ("token", "password", "Authorization", "api_key"):
                    assert inner is None or isinstance(inner, int) or inner == "(hidden)"
                else:
                    check(inner)
        elif isinstance(node, list):
            for inner in node:
                check(inner)

    check(logged["x"])
