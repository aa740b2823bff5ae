"""Keys of compile caches: every fact matters, nothing else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_facts import GOOD
from fal_contract.cache_key import CLUSTER, FACTS, cache_key, check_namespace, entry_model, may_read, namespace_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import CACHE_FACT_BYTES_MAX

VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)


def facts() -> st.SearchStrategy[dict[str, str]]:
    digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
    return st.fixed_dictionaries({name: digests if name == "component_config" else VALUES for name in FACTS})


@given(facts(), facts())
def test_equal_facts_give_equal_keys_and_only_they_do(first: dict[str, str], second: dict[str, str]) -> None:
    assert (cache_key(first) == cache_key(second)) == (first == second)
    assert cache_key(dict(reversed(first.items()))) == cache_key(first)
    assert len(cache_key(first)) == 64


@given(st.sampled_from(sorted(set(FACTS) - {"component_config"})), VALUES)
def test_every_fact_matters(name: str, value: str) -> None:
    assert (cache_key(GOOD | {name: value}) == cache_key(GOOD)) == (value == GOOD[name])


def test_the_weights_are_no_fact() -> None:
    assert not any("weight" in name or "model" in name or "digest" in name for name in FACTS)
    with pytest.raises(FalError) as caught:
        cache_key(GOOD | {"weights": "ab" * 32})
    assert caught.value.code is Code.INVALID
    assert "weights" in caught.value.what


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_missing_fact_is_named(name: str) -> None:
    with pytest.raises(FalError, match=name):
        cache_key({one: value for one, value in GOOD.items() if one != name})


@pytest.mark.parametrize("value", ["", "a\nb", "ä", "\ud800", "x" * (CACHE_FACT_BYTES_MAX + 1)])
def test_a_value_that_is_none_is_refused_with_its_fact(value: str) -> None:
    with pytest.raises(FalError) as caught:
        cache_key(GOOD | {"torch": value})
    assert caught.value.field == "facts.torch"


def test_the_config_is_a_digest() -> None:
    with pytest.raises(FalError) as caught:
        cache_key(GOOD | {"component_config": "config.json"})
    assert caught.value.field == "facts.component_config"


def test_a_key_never_changes() -> None:
    assert cache_key(GOOD) == "a83c40dad35488b05f59b883dc9e999fa8f23da20578364ff503e4d9bf6287c2"


@pytest.mark.parametrize("bad", ["", "Cluster", "team", "team/", "team/A", "team/a/b", "node/n-1", "team/system", "a"])
def test_bad_namespaces(bad: str) -> None:
    with pytest.raises(FalError, match="no namespace"):
        check_namespace(bad)


def test_who_may_read() -> None:
    assert check_namespace("cluster") == CLUSTER
    assert check_namespace("team/a") == namespace_of("a")
    assert may_read(CLUSTER, "a")
    assert may_read("team/a", "a")
    assert not may_read("team/b", "a")
    assert not may_read("", "a")
    assert not may_read("team/", "")


def test_namespaces_never_meet() -> None:
    assert entry_model("cluster", "ab" * 32) != entry_model("team/a", "ab" * 32)
    assert entry_model("cluster", "ab" * 32) != entry_model("cluster", "cd" * 32)
