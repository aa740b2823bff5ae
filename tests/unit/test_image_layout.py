"""What a packed image's folder says, and which process that means: hostile text included."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_CONFIG_BYTES_MAX
from fal_runtime.images.layout import ImageConfig, parse_config, parse_layout, read_layout
from fal_runtime.images.process import PATH_DEFAULT, home_of, process_of, user_of

FOLDER = Path("/images/x")
PASSWD = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n7:x:70:71::/:/bin/sh\nbig:x:70000:0::/:\n"
GROUP = "root:x:0:\nann:x:1001:\nvideo:x:44:ann,bob\nrender:x:105:ann\nbad:x:y:ann\n"


T = TypeVar("T")


def outcome(work: Callable[[], T]) -> T | FalError:
    """What it returns, or the expected failure."""
    try:
        return work()
    except FalError as error:
        return error


def table(**changes: Any) -> dict[str, Any]:
    base = {
        "version": 1, "source": "docker://registry.example/app:1", "digest": f"sha256:{'0' * 64}",
        "platform": "linux/amd64", "format": "erofs", "layer_bytes": 12, "config": {"Cmd": ["sh"]},
    }  # fmt: skip
    return {**base, **changes}


def parsed(**changes: Any) -> ImageConfig:
    return parse_layout(json.dumps(table(config=changes)).encode(), FOLDER).config


def test_the_folder_is_described() -> None:
    layout = parse_layout(json.dumps(table()).encode(), FOLDER)
    assert (layout.file, layout.format, layout.layer_bytes) == (FOLDER / "image.erofs", "erofs", 12)
    assert layout.config == ImageConfig(cmd=("sh",))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 2}, "version"),
        ({"format": "ext4"}, "format"),
        ({"digest": "sha256:1"}, "digest"),
        ({"platform": "linux"}, "platform"),
        ({"layer_bytes": -1}, "layer_bytes"),
        ({"layer_bytes": True}, "layer_bytes"),
        ({"source": "x" * 2000}, "source"),
        ({"source": "a\0b"}, "source"),
        ({"config": []}, "config"),
        ({"config": {"Env": "A=1"}}, "config.Env"),
        ({"config": {"Cmd": ["a\0b"]}}, "config.Cmd[0]"),
        ({"config": {"Cmd": ["a", 3]}}, "config.Cmd[1]"),
        ({"config": {"Entrypoint": ["x"] * 2000}}, "config.Entrypoint"),
        ({"config": {"WorkingDir": "srv"}}, "config.WorkingDir"),
        ({"config": {"WorkingDir": "/srv/../../etc"}}, "config.WorkingDir"),
        ({"config": {"WorkingDir": "/" + "x" * 5000}}, "config.WorkingDir"),
        ({"config": {"User": "a b"}}, "config.User"),
        ({"config": {"User": "../root"}}, "config.User"),
        ({"config": {"Env": ["A=\ud800"]}}, "config.Env[0]"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_layout(json.dumps(table(**changes)).encode(), FOLDER)
    assert (caught.value.code, caught.value.field) == (Code.CORRUPT, field)


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 100_000, b"\xff\xfe", b"3", b" " * (IMAGE_CONFIG_BYTES_MAX + 1)])
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(FalError) as caught:
        parse_layout(text, FOLDER)
    assert caught.value.code is Code.CORRUPT


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["Env", "Cmd", "Entrypoint", "User", "WorkingDir", "other"]), x)))  # fmt: skip
def test_any_configuration_is_read_or_refused(value: object) -> None:
    config = outcome(lambda: parse_config(value))
    if isinstance(config, FalError):
        assert config.code is Code.CORRUPT
        assert config.field
        return
    assert config.working_dir.startswith("/")
    assert not any("\0" in text for text in (*config.cmd, *config.entrypoint, *config.env.values(), config.user))


def test_variables_that_no_process_should_get_are_dropped_with_a_note() -> None:
    config = parsed(Env=["A=1", "B", "=x", "C D=1", "FAL_SOCKET_DIR=/etc", "E=a=b", "A=2"])
    assert dict(config.env) == {"A": "2", "E": "a=b"}
    assert [note.split("'")[1] for note in config.notes] == ["B", "", "C D", "FAL_SOCKET_DIR"]


def test_unknown_keys_are_ignored() -> None:
    assert parsed(Cmd=["x"], Labels={"a": "b"}, Healthcheck={"Test": ["NONE"]}).cmd == ("x",)


def test_a_folder_is_read_without_following_links(tmp_path: Path) -> None:
    with pytest.raises(FalError) as caught:
        read_layout(tmp_path)
    assert caught.value.code is Code.NOT_FOUND
    (tmp_path / "real.json").write_text(json.dumps(table()))
    (tmp_path / "config.json").symlink_to("real.json")
    with pytest.raises(FalError, match="cannot be read"):
        read_layout(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FalError, match="no plain file"):
        read_layout(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "real.json").rename(tmp_path / "config.json")
    with pytest.raises(FalError, match=r"image\.erofs cannot be read"):
        read_layout(tmp_path)
    (tmp_path / "image.erofs").symlink_to("/etc/passwd")
    with pytest.raises(FalError, match="no plain file"):
        read_layout(tmp_path)
    (tmp_path / "image.erofs").unlink()
    (tmp_path / "image.erofs").write_bytes(b"x")
    assert read_layout(tmp_path).file == tmp_path / "image.erofs"


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "command", "argv"),
    [
        (("a",), ("b",), (), ("a", "b")),
        (("a",), ("b",), ("c",), ("c",)),
        ((), ("b", "c"), (), ("b", "c")),
        (("a",), (), (), ("a",)),
    ],
)
def test_our_command_takes_the_place_of_both(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], command: tuple[str, ...], argv: tuple[str, ...]
) -> None:
    assert process_of(ImageConfig(entrypoint=entrypoint, cmd=cmd), command, {}).argv == argv


def test_no_command_at_all_is_an_error_with_a_remedy() -> None:
    with pytest.raises(FalError, match="names no command") as caught:
        process_of(ImageConfig(), (), {})
    assert (caught.value.code, caught.value.field) == (Code.INVALID, "command")


def test_our_variables_win_and_there_is_a_path() -> None:
    config = ImageConfig(cmd=("x",), env={"A": "image", "B": "image"}, working_dir="/srv", user="7:8")
    process = process_of(config, (), {"A": "app"})
    assert dict(process.env) == {"PATH": PATH_DEFAULT, "A": "app", "B": "image"}
    assert (process.working_dir, process.user) == ("/srv", "7:8")
    assert process_of(config, (), {"PATH": "/x"}).env["PATH"] == "/x"


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", (0, 0, ())),
        ("root", (0, 0, ())),
        ("ann", (1000, 1001, (44, 105))),
        ("1000", (1000, 1001, (44, 105))),
        ("ann:video", (1000, 44, ())),
        ("ann:", (1000, 1001, (44, 105))),
        ("5:6", (5, 6, ())),
        ("5", (5, 0, ())),
        ("7", (70, 71, ())),  # a name before a number
        ("bad", None),
        ("ann:none", None),
        ("65536", None),
        ("5:70000", None),
        ("big", None),
        ("99999999999", None),
        ("-1", None),
        ("٣", None),
    ],
)
def test_users_are_found_in_the_image(user: str, ids: tuple[int, int, tuple[int, ...]] | None) -> None:
    if ids is None:
        with pytest.raises(FalError) as caught:
            user_of(user, PASSWD, GROUP)
        assert (caught.value.code, caught.value.field) == (Code.INVALID, "user")
    else:
        assert tuple(user_of(user, PASSWD, GROUP)) == ids


@given(st.text(max_size=20), st.text(max_size=200), st.text(max_size=200))
def test_any_user_file_gives_ids_in_range_or_a_clear_error(user: str, passwd: str, group: str) -> None:
    found = outcome(lambda: user_of(user, passwd, group))
    if isinstance(found, FalError):
        assert found.code is Code.INVALID
        return
    assert all(0 <= one < 65536 for one in (found.uid, found.gid, *found.groups))


def test_home_is_the_users_or_the_root() -> None:
    assert home_of(1000, PASSWD) == "/home/ann"
    assert home_of(4, PASSWD) == "/"
    assert home_of(9, "x:x:9:9::relative:\n") == "/"
