"""CDI specifications: what the standard takes and refuses, names, conflicts, edits, and who may write a file."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from driver_tree import UUIDS, VERSION, make_tree
from fal_contract.errors import Code, FalError
from fal_runtime.cdi.document import VERSIONS, parse, parse_name
from fal_runtime.cdi.driver_tree import FILE_NAME, find_driver, write_specification
from fal_runtime.cdi.model import Edits, HookEdit, MountEdit, NodeEdit, RdtEdit
from fal_runtime.cdi.nvidia import INSIDE, Driver, Gpu, Library, specification
from fal_runtime.cdi.reader import Reader, complete
from fal_runtime.cdi.registry import File, make_registry, resolve

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parents[1] / "data" / "cdi_schema.json").read_text()))
# Every field of version 0.7.0.
FULL: dict[str, Any] = {
    "cdiVersion": "0.7.0",
    "kind": "vendor.com/device",
    "annotations": {"a": "b"},
    "devices": [
        {
            "name": "my-device",
            "annotations": {"whoami": "gpu"},
            "containerEdits": {
                "env": ["A=1", "B=x=y"],
                "deviceNodes": [
                    {
                        "path": "/dev/card1", "hostPath": "/vendor/dev/card1", "type": "c", "major": 25, "minor": 25,
                        "fileMode": 384, "permissions": "rw", "uid": 1000, "gid": 1000,
                    },
                    {"path": "/dev/card-render1", "type": "p"},
                ],
                "additionalGids": [44, 0],
            },
        },
        {"name": "other", "containerEdits": {"env": ["C=1"]}},
    ],
    "containerEdits": {
        "env": ["ALL=1"],
        "mounts": [
            {"hostPath": "/usr/lib/libVendor.so.0", "containerPath": "/usr/lib/libVendor.so.0", "options": ["ro"]},
            {"hostPath": "tmpfs", "containerPath": "/tmp/data", "type": "tmpfs", "options": ["nosuid"]},
        ],
        "hooks": [
            {"hookName": "createContainer", "path": "/bin/vendor-hook", "args": ["vendor-hook", "x"], "env": ["H=1"]},
            {"hookName": "startContainer", "path": "/usr/bin/ldconfig", "timeout": 5},
        ],
        "intelRdt": {"closID": "guaranteed", "l3CacheSchema": "L3:0=ff", "memBwSchema": "MB:0=50", "enableCMT": True},
    },
}  # fmt: skip


def changed(**by_path: Any) -> dict[str, Any]:
    """FULL with values at paths, such as devices__0__name; ... takes the key away."""
    made = copy.deepcopy(FULL)
    for path, value in by_path.items():
        at: Any = made
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        for part in parents:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return made


def test_every_field_is_read() -> None:
    SCHEMA.validate(FULL)
    made = parse(FULL, source="f")
    assert (made.version, made.kind) == ("0.7.0", "vendor.com/device")
    device = made.devices[0]
    assert made.qualified(device) == "vendor.com/device=my-device"
    assert device.edits == Edits(
        env=("A=1", "B=x=y"),
        nodes=(
            NodeEdit("/dev/card1", "/vendor/dev/card1", "c", 25, 25, 384, "rw", 1000, 1000),
            NodeEdit("/dev/card-render1", kind="p"),
        ),
        gids=(44, 0),
    )
    assert made.edits.mounts[1] == MountEdit("tmpfs", "/tmp/data", "tmpfs", ("nosuid",))
    assert made.edits.hooks == (
        HookEdit("createContainer", "/bin/vendor-hook", ("vendor-hook", "x"), ("H=1",)),
        HookEdit("startContainer", "/usr/bin/ldconfig", timeout_s=5),
    )
    assert made.edits.rdt == RdtEdit("guaranteed", "L3:0=ff", "MB:0=50", enable=("enableCMT",))


E0, E1 = "devices__0__containerEdits", "containerEdits"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cdiVersion": "0.2.0"}, "cdiVersion"),
    ({"cdiVersion": ...}, "cdiVersion"),
    ({"cdiVersion": 1}, "cdiVersion"),
    ({"kind": "vendor.com"}, "kind"),
    ({"kind": "vendor.com/device/x"}, "kind"),
    ({"kind": "ven_dor.com/device"}, "kind"),
    ({"kind": "-vendor.com/device"}, "kind"),
    ({"kind": "vendor..com/device"}, "kind"),
    ({"kind": f"vendor.com/{'d' * 64}"}, "kind"),
    ({"kind": "vendor.com/-device"}, "kind"),
    ({"kind": ...}, "kind"),
    ({"devices": []}, "devices"),
    ({"devices": ...}, "devices"),
    ({"devices__1__name": "my-device"}, "devices"),
    ({"devices__0__name": "-x"}, "devices[0].name"),
    ({"devices__0__name": "x/y"}, "devices[0].name"),
    ({"devices__0__name": ...}, "devices[0].name"),
    ({"devices__0__extra": 1}, "devices[0].extra"),
    ({"devices__1__containerEdits": {}}, "devices[1].containerEdits"),
    ({"devices__1__containerEdits": ...}, "devices[1].containerEdits"),
    ({"unknown": 1}, "unknown"),
    ({"annotations": {"a": 1}}, "annotations"),
    ({f"{E0}__env": ["NOTHING"]}, "env[0]"),
    ({f"{E0}__env": ["=x"]}, "env[0]"),
    ({f"{E0}__env": "A=1"}, "env"),
    ({f"{E0}__more": []}, "more"),
    ({f"{E0}__deviceNodes__0__path": "dev/x"}, "path"),
    ({f"{E0}__deviceNodes__0__path": "/dev/../x"}, "path"),
    ({f"{E0}__deviceNodes__0__path": ...}, "path"),
    ({f"{E0}__deviceNodes__0__type": "x"}, "type"),
    ({f"{E0}__deviceNodes__0__major": "25"}, "major"),
    ({f"{E0}__deviceNodes__0__major": True}, "major"),
    ({f"{E0}__deviceNodes__0__uid": -1}, "uid"),
    ({f"{E0}__deviceNodes__0__uid": 1 << 32}, "uid"),
    ({f"{E0}__deviceNodes__0__permissions": "rx"}, "permissions"),
    ({f"{E0}__additionalGids": ["44"]}, "additionalGids[0]"),
    ({f"{E0}__additionalGids": [None]}, "additionalGids[0]"),
    ({f"{E1}__mounts__0__hostPath": ...}, "hostPath"),
    ({f"{E1}__mounts__0__containerPath": "lib"}, "containerPath"),
    ({f"{E1}__mounts__0__options": "ro"}, "options"),
    ({f"{E1}__hooks__0__hookName": "onSunday"}, "hookName"),
    ({f"{E1}__hooks__0__path": "vendor-hook"}, "path"),
    ({f"{E1}__hooks__1__timeout": 0}, "timeout"),
    ({f"{E1}__hooks__1__timeout": -1}, "timeout"),
    ({f"{E1}__intelRdt__closID": "a/b"}, "closID"),
    ({f"{E1}__intelRdt__enableCMT": "yes"}, "enableCMT"),
    ({f"{E1}__intelRdt__unknown": "yes"}, "unknown"),
]


@pytest.mark.parametrize(("change", "field"), WRONG, ids=[" ".join(change) + " " + field for change, field in WRONG])
def test_what_is_wrong_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(FalError) as caught:
        parse(changed(**change), source="/etc/cdi/v.json")
    assert caught.value.code is Code.INVALID
    assert field in (caught.value.field or "")
    assert caught.value.remedy


SINCE = [
    ({"annotations": {"a": "b"}}, "0.6.0"),
    ({"kind": "vendor.com/a.b"}, "0.6.0"),
    ({"devices": [{"name": "0", "containerEdits": {"env": ["A=1"]}}]}, "0.5.0"),
    ({"containerEdits": {"deviceNodes": [{"path": "/dev/x", "hostPath": "/y"}]}}, "0.5.0"),
    ({"containerEdits": {"mounts": [{"hostPath": "/x", "containerPath": "/x", "type": "none"}]}}, "0.4.0"),
    ({"containerEdits": {"additionalGids": [1]}}, "0.7.0"),
    ({"containerEdits": {"intelRdt": {"closID": "a"}}}, "0.7.0"),
    ({"containerEdits": {"intelRdt": {"schemata": ["L3:0=f"]}}}, "1.1.0"),
    ({"containerEdits": {"intelRdt": {"enableMonitoring": True}}}, "1.1.0"),
]


@pytest.mark.parametrize(("more", "since"), SINCE, ids=[f"{next(iter(m))}-{v}-{n}" for n, (m, v) in enumerate(SINCE)])
def test_fields_are_known_from_their_version_on(more: dict[str, Any], since: str) -> None:
    least = {"kind": "vendor.com/device", "devices": [{"name": "a", "containerEdits": {"env": ["A=1"]}}], **more}
    for version in VERSIONS:
        document = {"cdiVersion": version, **least}
        SCHEMA.validate(document)
        if VERSIONS.index(version) >= VERSIONS.index(since):
            assert parse(document, source="f").version == version
        else:
            with pytest.raises(FalError, match="needs cdiVersion"):
                parse(document, source="f")


def test_fields_that_were_dropped_and_those_that_we_lack() -> None:
    dropped = changed(cdiVersion="1.1.0")
    with pytest.raises(FalError, match="enableCMT"):
        parse(dropped, source="f")
    interfaces = {"netDevices": [{"hostInterfaceName": "eth1", "name": "eth0"}]}
    with pytest.raises(FalError, match="not supported"):
        parse(changed(cdiVersion="1.1.0", containerEdits=interfaces), source="f")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_document_does_more_than_be_refused(data: st.DataObject) -> None:
    """One value anywhere in a good document is another: it is refused with INVALID, or it is valid."""
    document = copy.deepcopy(FULL)
    at: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            at[key] = data.draw(JSON)
            break
        at = at[key]
    code = _refused_with(document)
    assert code is Code.INVALID or (code is None and SCHEMA.is_valid(_without_nulls(document)))


def _refused_with(document: object) -> Code | None:
    try:
        parse(document, source="f")
    except FalError as error:
        return error.code
    return None


def _without_nulls(value: Any) -> Any:
    """An absent field may be written as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def test_names() -> None:
    assert parse_name("nvidia.com/gpu=GPU-1f") == ("nvidia.com/gpu", "GPU-1f")
    assert parse_name("nvidia.com/gpu=0:1") == ("nvidia.com/gpu", "0:1")
    for bad in ("nvidia.com/gpu", "nvidia.com=0", "=0", "nvidia.com/gpu=", "nvidia.com/gpu=a b", "a/b/c=d"):
        with pytest.raises(FalError) as caught:
            parse_name(bad)
        assert caught.value.code is Code.INVALID


# ---- registry


def _file(path: str, priority: int, *names: str, env: str = "") -> File:
    devices = [{"name": name, "containerEdits": {"env": [f"{name}={path}"]}} for name in names]
    document: dict[str, Any] = {"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": devices}
    if env:
        document["containerEdits"] = {"env": [env]}
    return File(path, priority, parse(document, source=path))


def test_a_later_directory_wins_and_equals_conflict() -> None:
    registry = make_registry(
        [_file("low", 0, "a", "b"), _file("high", 1, "a"), _file("one", 1, "c"), _file("two", 1, "c", "d")]
    )
    assert registry.devices["v.com/c=a"][0].path == "high"
    assert registry.devices["v.com/c=b"][0].path == "low"
    assert registry.has("v.com/c=d")
    assert not registry.has("v.com/c=c")
    with pytest.raises(FalError) as caught:
        resolve(["v.com/c=c"], registry)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert "one, two" in caught.value.what
    # A third of a higher directory settles it.
    settled = make_registry([_file("one", 0, "c"), _file("two", 0, "c"), _file("high", 1, "c")])
    assert settled.devices["v.com/c=c"][0].path == "high"
    assert not settled.conflicts


def test_a_files_own_edits_come_once_and_first() -> None:
    registry = make_registry([_file("f", 0, "a", "b", env="ALL=1"), _file("g", 0, "x", env="G=1")])
    edits = resolve(["v.com/c=b", "v.com/c=x", "v.com/c=a", "v.com/c=b"], registry)
    assert edits.env == ("ALL=1", "b=f", "G=1", "x=g", "a=f")
    with pytest.raises(FalError) as caught:
        resolve(["v.com/c=nobody"], registry)
    assert caught.value.code is Code.NOT_FOUND
    assert "v.com/c=a" in caught.value.remedy
    assert resolve([], registry) == Edits()


@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.sampled_from("abc"), min_size=1)), max_size=6))
def test_each_device_comes_from_the_highest_directory(files: list[tuple[int, set[str]]]) -> None:
    made = [_file(f"{at}", priority, *sorted(names)) for at, (priority, names) in enumerate(files)]
    registry = make_registry(made)
    for name in "abc":
        having = [file for file in made if any(device.name == name for device in file.specification.devices)]
        best = [file for file in having if file.priority == max(one.priority for one in having)]
        qualified = f"v.com/c={name}"
        assert registry.has(qualified) == (len(best) == 1)
        assert (qualified in registry.conflicts) == (len(best) > 1)
        if len(best) == 1:
            assert registry.devices[qualified][0] is best[0]


# ---- reader


def _write(directory: Path, name: str, text: str, mode: int = 0o644) -> Path:
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    (directory / name).write_text(text)
    (directory / name).chmod(mode)
    return directory / name


YAML = """
cdiVersion: 0.6.0
kind: v.com/c
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/null
"""


def test_json_and_yaml_are_read_and_broken_files_told(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _write(one, "a.yaml", YAML)
    _write(one, "b.json", json.dumps(FULL))
    _write(one, "c.json", "{")
    _write(one, "d.yml", "- [")
    _write(one, "e.txt", "not looked at")
    _write(one, "f.json", json.dumps(changed(unknown=1)))
    (one / "g.json").symlink_to(one / "nowhere")
    reader = Reader((one, two, tmp_path / "missing"))
    registry = reader.registry()
    assert set(registry.devices) == {"v.com/c=0", "vendor.com/device=my-device", "vendor.com/device=other"}
    assert [Path(path).name for path, _why in registry.problems] == ["c.json", "d.yml", "f.json", "g.json"]
    _write(two, "a.yaml", YAML.replace("/dev/null", "/dev/zero"))
    assert resolve(["v.com/c=0"], reader.registry()).nodes[0].path == "/dev/zero"
    (two / "a.yaml").unlink()
    assert resolve(["v.com/c=0"], reader.registry()).nodes[0].path == "/dev/null"


def test_an_unchanged_file_is_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "d", "a.yaml", YAML)
    reader = Reader((tmp_path / "d",))
    first = reader.registry().devices["v.com/c=0"][0].specification
    assert reader.registry().devices["v.com/c=0"][0].specification is first
    path.write_text(YAML.replace("c.com", "d.com") + "# more\n")
    assert reader.registry().devices["v.com/c=0"][0].specification is not first


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = _write(tmp_path / "d", "a.yaml", YAML)
    reader = Reader((tmp_path / "d",))
    assert reader.registry().devices
    path.chmod(mode)
    registry = reader.registry()
    assert not registry.devices
    assert "written by others" in registry.problems[0][1]
    path.chmod(0o644)
    assert reader.registry().devices


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "d", "a.yaml", YAML)
    (tmp_path / "d").chmod(0o777)
    registry = Reader((tmp_path / "d",)).registry()
    assert not registry.devices
    assert registry.problems


@pytest.mark.root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "d", "a.yaml", YAML)
    os.chown(path, 1234, 1234)
    assert not Reader((tmp_path / "d",)).registry().devices


def test_edits_are_completed_from_the_machine(tmp_path: Path) -> None:
    (tmp_path / "lib").write_text("x")
    edits = Edits(
        nodes=(NodeEdit("/dev/x", "/dev/null"), NodeEdit("/dev/zero", kind="c", major=1, minor=5, file_mode=0o600)),
        mounts=(MountEdit(str(tmp_path / "lib"), "/lib/x", options=("ro",)), MountEdit("t", "/t", "tmpfs", ("nodev",))),
    )
    done = complete(edits, user_namespace=True)
    assert [(node.kind, node.major, node.minor) for node in done.nodes] == [("c", 1, 3), ("c", 1, 5)]
    assert (done.nodes[0].file_mode, done.nodes[1].file_mode) == (0o666, 0o600)
    assert done.mounts[0].kind == "bind"
    assert {"ro", "bind"} <= set(done.mounts[0].options)
    assert done.mounts[1] == edits.mounts[1]
    made_by_number = Edits(nodes=(NodeEdit("/dev/none", kind="c", major=9, minor=9),))
    assert complete(made_by_number, user_namespace=False) == made_by_number
    bad: list[tuple[Edits, Code]] = [
        (made_by_number, Code.NOT_FOUND),
        (Edits(nodes=(NodeEdit("/dev/none"),)), Code.NOT_FOUND),
        (Edits(mounts=(MountEdit("/none", "/x"),)), Code.NOT_FOUND),
        (Edits(nodes=(NodeEdit("/dev/null", kind="b"),)), Code.DRIVER_FAILED),
        (Edits(nodes=(NodeEdit("/dev/null", kind="c", major=195, minor=0),)), Code.DRIVER_FAILED),
        (Edits(nodes=(NodeEdit(str(tmp_path / "lib")),)), Code.DRIVER_FAILED),
    ]
    for one, code in bad:
        with pytest.raises(FalError) as caught:
            complete(one, user_namespace=True)
        assert caught.value.code is code


# ---- ours


def test_our_own_specification_is_one(tmp_path: Path) -> None:
    _folder, dev = make_tree(tmp_path / "tree", nodes=False)
    driver = find_driver(VERSION, root=tmp_path / "tree", dev=dev)
    names = {name for library in driver.libraries for name in library.names}
    assert {"libcuda.so.1", "libcuda.so", f"libcuda.so.{VERSION}", "libnvidia-ml.so.1"} <= names
    assert not {name for name in names if "470" in name or "GLX" in name}
    gpus = [Gpu((UUIDS[0], "0"), ("/dev/nvidia0",)), Gpu((UUIDS[1],), ("/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap1"))]
    document = specification(gpus, driver)
    SCHEMA.validate(document)
    made = parse(document, source="ours")
    assert [device.name for device in made.devices] == [UUIDS[0], "0", UUIDS[1], "all"]
    assert [node.path for node in made.devices[3].edits.nodes] == ["/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap1"]
    assert not made.edits.hooks
    assert {mount.container_path for mount in made.edits.mounts} == {
        *(f"{INSIDE}/lib/{name}" for name in names),
        f"{INSIDE}/bin/nvidia-smi",
    }
    path = write_specification(tmp_path / "own", gpus, driver)
    assert path == tmp_path / "own" / FILE_NAME
    assert Reader((tmp_path / "own",)).registry().has(f"nvidia.com/gpu={UUIDS[1]}")
    assert sorted(os.listdir(tmp_path / "own")) == [FILE_NAME]
    assert write_specification(tmp_path / "own", [Gpu((UUIDS[0],), ())], driver) is None
    assert not Reader((tmp_path / "own",)).registry().devices


def test_folders_of_the_linker_are_searched(tmp_path: Path) -> None:
    root = tmp_path / "r"
    (root / "etc/ld.so.conf.d").mkdir(parents=True)
    (root / "odd/place").mkdir(parents=True)
    (root / "odd/place/libcuda.so.1.2.3").write_text("x")
    (root / "odd/place/libcuda.so.1").symlink_to("libcuda.so.1.2.3")
    (root / "etc/ld.so.conf").write_text("# comment\ninclude /etc/ld.so.conf.d/*.conf\n")
    (root / "etc/ld.so.conf.d/driver.conf").write_text("/odd/place  # here\n")
    found = find_driver("1.2.3", root=root, dev=root / "dev")
    assert found.libraries == (Library(str(root / "odd/place/libcuda.so.1.2.3"), ("libcuda.so.1", "libcuda.so.1.2.3")),)
    assert find_driver("9", root=root, dev=root / "dev") == Driver((), dev=str(root / "dev"))


def test_a_driver_without_files_gives_nodes_alone() -> None:
    document = specification([Gpu(("GPU-1",), ("/dev/nvidia0",))], Driver(("/dev/nvidiactl",)))
    SCHEMA.validate(document)
    made = parse(document, source="ours")
    assert made.edits == Edits(nodes=(NodeEdit("/dev/nvidiactl", permissions="rw"),))
