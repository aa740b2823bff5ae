"""What the agent hands to its fal-fsd: the operator's settings and its own, in one file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fal_agent.cache_daemon import command
from fal_agent.layout import Layout
from fal_agent.options import AgentOptions
from fal_contract.errors import FalError


def made(tmp_path: Path, settings: str | None = None) -> dict[str, object]:
    """The file that fsd is started with."""
    (tmp_path / "state" / "fsd").mkdir(parents=True)
    layout = Layout(tmp_path / "state")
    config = None
    if settings is not None:
        config = tmp_path / "operator.toml"
        config.write_text(settings)
    options = AgentOptions(state_dir=layout.state_dir, schedulers=["s:1", "s:2"], fsd_config=config)
    argv = command(options, layout, tmp_path / "fsd.sock")
    assert argv[-2:-1] == ["--config"]
    return tomllib.loads(Path(argv[-1]).read_text())


def test_fsd_gets_what_the_agent_knows(tmp_path: Path) -> None:
    assert made(tmp_path) == {
        "state_dir": str(tmp_path / "state" / "fsd"),
        "socket": str(tmp_path / "fsd.sock"),
        "schedulers": ["s:1", "s:2"],
        "identity": str(tmp_path / "state" / "identity"),
    }


def test_the_operators_settings_go_along(tmp_path: Path) -> None:
    found = made(tmp_path, 'bulk_port = 9500\nread_timeout_s = 5.5\ntls = "always"\naddresses = ["lan=ä:1"]\n')
    assert found["bulk_port"] == 9500
    assert found["read_timeout_s"] == 5.5
    assert found["tls"] == "always"
    assert found["addresses"] == ["lan=ä:1"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('identity = "/x"\n', "fsd_config: identity = '/x' is the agent's to set"),
        ("bulk_port = \n", "is no TOML"),
        ("[hf]\nx = 1\n", "fsd_config: hf"),
    ],
)
def test_wrong_settings_are_refused_with_the_key(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(FalError, match=words):
        made(tmp_path, settings)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "fsd").mkdir()
    options = AgentOptions(state_dir=tmp_path, schedulers=["s:1"], fsd_config=tmp_path / "none.toml")
    with pytest.raises(FalError, match=r"none\.toml cannot be read"):
        command(options, Layout(tmp_path), tmp_path / "s")
