"""Configuration: precedence of the sources and errors that name source, key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, SecretStr, ValidationError

from fal_contract.config import ConfigModel, describe, load_config, pydantic_error
from fal_contract.errors import Code, FalError


class Log(ConfigModel):
    level: Literal["debug", "info"] = Field("info", description="least level logged")


class Peer(ConfigModel):
    host: str
    port: int = 1


class Sample(ConfigModel):
    name: str = Field(description="how this node is called")
    port: int = Field(7070, ge=0, le=65535)
    hosts: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    root: Path = Path("/var/lib/sample")
    secret: SecretStr = SecretStr("")
    log: Log = Log()
    peers: list[Peer] = Field(default_factory=list)
    ttl_s: float | None = None


def load(
    tmp_path: Path,
    text: str = 'name = "a"\n',
    env: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
) -> Sample:
    file = tmp_path / "sample.toml"
    file.write_text(text)
    return load_config(Sample, file=file, env=env or {}, prefix="FAL_SAMPLE", flags=flags or {})


def refused(tmp_path: Path, text: str, **kwargs: dict[str, str]) -> FalError:
    with pytest.raises(FalError) as caught:
        load(tmp_path, text, **kwargs)  # type: ignore[arg-type]
    assert caught.value.code is Code.INVALID
    return caught.value


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    text = 'name = "file"\nport = 1\n[log]\nlevel = "info"\n'
    assert load(tmp_path, text).port == 1
    env = {"FAL_SAMPLE_PORT": "2", "FAL_SAMPLE_LOG_LEVEL": "debug", "UNRELATED": "x"}
    assert load(tmp_path, text, env).port == 2
    both = load(tmp_path, text, env, {"port": 3, "name": None})
    assert (both.port, both.name, both.log.level) == (3, "file", "debug")
    assert load(tmp_path).port == 7070


def test_no_file_is_needed() -> None:
    config = load_config(
        Sample, file=None, env={"FAL_SAMPLE_NAME": "n"}, prefix="FAL_SAMPLE", flags={"log.level": "debug"}
    )
    assert (config.name, config.log.level) == ("n", "debug")


@pytest.mark.parametrize(
    ("text", "expected"), [("a,b", ("a", "b")), ("", ()), ('["a", "b,c"]', ("a", "b,c")), (" a , b ", ("a", "b"))]
)
def test_lists_in_the_environment(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    assert load(tmp_path, env={"FAL_SAMPLE_HOSTS": text}).hosts == expected


def test_tables_in_the_environment(tmp_path: Path) -> None:
    assert load(tmp_path, env={"FAL_SAMPLE_LABELS": '{zone = "a"}'}).labels == {"zone": "a"}
    error = refused(tmp_path, 'name = "a"', env={"FAL_SAMPLE_LABELS": "{zone"})
    assert error.field == "FAL_SAMPLE_LABELS"
    assert "TOML" in error.what


def test_unknown_key_names_file_key_and_nearest(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"\nports = 1\n')
    assert "sample.toml: unknown key 'ports'" in error.what
    assert error.remedy == "Did you mean 'port'?"
    assert error.field == "ports"


def test_unknown_nested_keys_know_their_own_table(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"\n[log]\nlevle = "info"\n')
    assert (error.field, error.remedy) == ("log.levle", "Did you mean 'level'?")
    error = refused(tmp_path, 'name = "a"\n[[peers]]\nhost = "h"\n[[peers]]\nhsot = "h"\nhost = "h"\n')
    assert (error.field, error.remedy) == ("peers[1].hsot", "Did you mean 'host'?")


def test_unknown_key_far_from_all_lists_the_legal_ones(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"\nzzzzqqq = 1\n')
    assert "port" in error.remedy
    assert "hosts" in error.remedy


def test_wrong_type_names_field_value_and_remedy(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"\nport = "many"\n')
    assert "sample.toml: port = 'many' is refused" in error.what
    assert error.remedy == "Give port as int."
    error = refused(tmp_path, 'name = "a"\nport = 70000\n')
    assert "70000" in error.what
    assert "65535" in error.what


def test_the_guilty_source_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"', env={"FAL_SAMPLE_PORT": "many"})
    assert error.what.startswith("environment variable FAL_SAMPLE_PORT: port = 'many'")
    with pytest.raises(FalError, match="flag --log-level: log"):
        load(tmp_path, flags={"log.level": "loud"})


def test_unknown_environment_variable_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"', env={"FAL_SAMPLE_PORTS": "1"})
    assert error.field == "FAL_SAMPLE_PORTS"
    assert error.remedy == "Did you mean FAL_SAMPLE_PORT?"


def test_missing_key_says_what_it_is(tmp_path: Path) -> None:
    error = refused(tmp_path, "port = 1\n")
    assert "name is missing" in error.what
    assert "how this node is called" in error.remedy


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    error = refused(tmp_path, 'name = "a"\nsecret = ["hunter2"]\n')
    assert "hunter2" not in str(error)


def test_long_values_are_clipped(tmp_path: Path) -> None:
    error = refused(tmp_path, f'name = "a"\nport = "{"x" * 5000}"\n')
    assert len(str(error)) < 400


def test_broken_and_missing_and_huge_files(tmp_path: Path) -> None:
    error = refused(tmp_path, "name = \n")
    assert "line 1" in error.what
    with pytest.raises(FalError, match="No such file"):
        load_config(Sample, file=tmp_path / "none.toml", env={}, prefix="FAL_SAMPLE", flags={})
    error = refused(tmp_path, "# " + "x" * (1 << 20))
    assert "larger" in error.what


def test_describe_lists_every_key_with_default_and_variable() -> None:
    keys = {key.path: key for key in describe(Sample, "FAL_SAMPLE")}
    assert set(keys) == {"name", "port", "hosts", "labels", "root", "secret", "log.level", "peers", "ttl_s"}
    assert keys["name"].default == "required"
    assert keys["port"].default == "7070"
    assert (keys["log.level"].type, keys["log.level"].env) == ("'debug' or 'info'", "FAL_SAMPLE_LOG_LEVEL")
    assert keys["log.level"].help == "least level logged"
    assert keys["ttl_s"].type == "float or none"


def test_pydantic_error_without_a_model_still_names_the_field() -> None:
    with pytest.raises(ValidationError) as caught:
        Sample.model_validate({"name": "a", "log": {"level": "loud"}})
    error = pydantic_error(caught.value, "app.toml")
    assert error.field == "log.level"
    assert "'loud'" in error.what
