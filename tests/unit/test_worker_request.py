"""What a request may say: every refusal names the field, the value and the remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_runtime.worker.fake import FAKE_MODEL
from fal_runtime.worker.request import InferRequest, Lora, check_request_id, parse_request


def parse(**keys: Any) -> InferRequest:
    return parse_request(json.dumps({"prompt": "seven"} | keys).encode(), FAKE_MODEL, seed_default=99)


def test_what_is_left_out_gets_the_models_defaults() -> None:
    assert parse() == InferRequest(prompt="seven", seed=99, steps=4, guidance=1.0)


def test_null_means_left_out() -> None:
    assert parse(seed=None, steps=None, guidance=None, width=None, lora=None, format=None) == parse()


def test_everything_given_arrives() -> None:
    request = parse(
        seed=7, steps=3, guidance=2, width=64, height=32, lora={"name": "neon", "scale": 0.5}, format="json"
    )
    assert request == InferRequest(
        prompt="seven", seed=7, steps=3, guidance=2.0, width_px=64, height_px=32, lora=Lora("neon", 0.5), format="json"
    )


def test_a_lora_without_scale_acts_as_trained() -> None:
    assert parse(lora={"name": "neon"}).lora == Lora("neon", 1.0)


@pytest.mark.parametrize(
    ("keys", "field", "remedy"),
    [
        ({"prmpt": "x"}, "prmpt", "Known keys: prompt"),
        ({"prompt": ""}, "prompt", "what to draw"),
        ({"prompt": 7}, "prompt", "what to draw"),
        ({"prompt": "x" * 5000}, "prompt", "at most 4096"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"seed": -1}, "seed", "leave it out"),
        ({"seed": 2**63}, "seed", "leave it out"),
        ({"seed": 1.0}, "seed", "leave it out"),
        ({"seed": True}, "seed", "leave it out"),
        ({"seed": "7"}, "seed", "leave it out"),
        ({"steps": 0}, "steps", "leave it out"),
        ({"steps": 201}, "steps", "leave it out"),
        ({"guidance": -0.1}, "guidance", "leave it out"),
        ({"guidance": "much"}, "guidance", "leave it out"),
        ({"guidance": 10**400}, "guidance", "leave it out"),
        ({"width": 20}, "width", "Use 16"),
        ({"height": 0}, "height", "leave it out"),
        ({"height": 8192}, "height", "leave it out"),
        ({"lora": "neon"}, "lora", "null"),
        ({"lora": {"name": "oil"}}, "lora.name", "Loaded: neon"),
        ({"lora": {}}, "lora.name", "Loaded: neon"),
        ({"lora": {"name": "neon", "weight": 1}}, "lora.weight", "Known keys"),
        ({"lora": {"name": "neon", "scale": 99}}, "lora.scale", "leave it out"),
        ({"format": "jpeg"}, "format", "png"),
        ({"format": ["png"]}, "format", "png"),
    ],
)
def test_a_bad_value_is_refused_by_name(keys: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(FalError) as caught:
        parse(**keys)
    assert (caught.value.code, caught.value.field) == (Code.INVALID, field)
    assert remedy in caught.value.remedy
    assert caught.value.what.startswith(f"{field} = ")
    assert len(str(caught.value)) < 400, "an error repeats no more of the input than a reader needs"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"seven"', b'{"prompt": NaN}', b"[" * 100_000, b"1" * 5000]
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(FalError) as caught:
        parse_request(body, FAKE_MODEL, seed_default=0)
    assert (caught.value.code, caught.value.field) == (Code.INVALID, "body")


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(FalError, match="prompt = None is missing"):
        parse_request(b"{}", FAKE_MODEL, seed_default=0)


def test_an_option_that_the_model_lacks_is_refused_and_null_is_not() -> None:
    plain = replace(FAKE_MODEL, options=frozenset({"steps"}))
    assert parse_request(b'{"prompt": "x", "width": null, "steps": 2}', plain, seed_default=0).steps == 2
    with pytest.raises(FalError, match="width = 64 is not offered by FakePipeline"):
        parse_request(b'{"prompt": "x", "width": 64}', plain, seed_default=0)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(["prompt", "seed", "steps", "guidance", "width", "height", "lora", "format", "x"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60) | st.dictionaries(_KEYS, _JSON, max_size=9).map(lambda d: json.dumps(d).encode()))
def test_any_body_is_a_legal_request_or_one_invalid_error(body: bytes) -> None:
    outcome: InferRequest | FalError
    try:
        outcome = parse_request(body, FAKE_MODEL, seed_default=0)
    except FalError as error:
        outcome = error
    if isinstance(outcome, FalError):
        assert outcome.code is Code.INVALID
        assert outcome.field
        assert outcome.remedy
    else:
        assert outcome.prompt.strip()
        assert 1 <= outcome.steps <= 200
        assert 0 <= outcome.guidance <= 50
        assert outcome.width_px % 8 == 0


def test_request_ids() -> None:
    assert check_request_id("01J-a.b:c_d") == "01J-a.b:c_d"
    for bad in ("", "-a", "a b", "a\n", "x" * 129, "ä"):
        with pytest.raises(FalError, match="is not a request id"):
            check_request_id(bad)
