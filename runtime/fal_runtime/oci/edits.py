"""Puts CDI edits into an OCI config. Pure: what the machine knows (numbers, flags) is in the edits already.

Differences from a plain reading of the CDI standard, all towards less: no container may make device nodes, so "m" is
never granted; a mount may not replace one of ours; PATH and LD_LIBRARY_PATH are lists, so an edit's entry is appended
to the container's own instead of hiding it.
"""

from __future__ import annotations

from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_runtime.cdi.model import Edits, HookEdit, MountEdit, NodeEdit

_LISTS: Final = ("PATH", "LD_LIBRARY_PATH")


def apply(config: dict[str, Any], edits: Edits, *, user_namespace: bool) -> dict[str, Any]:
    """Change `config` (the dict of a config.json) and return it. FAILED_PRECONDITION where an edit hides our mounts.

    In a user namespace nobody can make a device node, and runc binds the host's node of the same path; one that lies
    elsewhere on the host is therefore bound by a mount of ours.
    """
    linux, process = config["linux"], config["process"]
    process["env"] = _env(process.get("env", []), edits.env)
    for node in edits.nodes:
        if node.kind in ("c", "b"):
            linux["resources"].setdefault("devices", []).append(_rule(node))
        if user_namespace and node.source != node.path:
            _add_mount(config, {
                "destination": node.path, "type": "bind", "source": node.source,
                "options": ["bind", "rw", "nosuid", "noexec", *node.options],
            })  # fmt: skip
        else:
            listed = [one for one in linux.get("devices", []) if one["path"] != node.path]
            linux["devices"] = [*listed, _device(node)]
    for mount in sorted(edits.mounts, key=lambda mount: mount.container_path.count("/")):
        _add_mount(config, _mount(mount))
    for hook in edits.hooks:
        config.setdefault("hooks", {}).setdefault(hook.name, []).append(_hook(hook))
    if gids := [gid for gid in edits.gids if gid]:
        user = process["user"]
        user["additionalGids"] = list(dict.fromkeys([*user.get("additionalGids", []), *gids]))
    if edits.rdt is not None:
        rdt = edits.rdt
        named = {"closID": rdt.clos_id, "l3CacheSchema": rdt.l3_cache_schema, "memBwSchema": rdt.mem_bw_schema}
        linux["intelRdt"] = {key: value for key, value in named.items() if value}
        if rdt.schemata:
            linux["intelRdt"]["schemata"] = list(rdt.schemata)
        linux["intelRdt"] |= dict.fromkeys(rdt.enable, True)
    return config


def _env(have: list[str], more: tuple[str, ...]) -> list[str]:
    values = dict(entry.partition("=")[::2] for entry in have)
    for entry in more:
        name, _, value = entry.partition("=")
        if name in _LISTS and values.get(name):
            parts = values[name].split(":")
            value = ":".join([*parts, *(part for part in value.split(":") if part not in parts)])
        values[name] = value
    return [f"{name}={value}" for name, value in sorted(values.items())]


def _rule(node: NodeEdit) -> dict[str, Any]:
    access = "".join(letter for letter in "rw" if letter in (node.permissions or "rwm"))
    return {
        "allow": bool(access), "type": node.kind, "major": node.major, "minor": node.minor, "access": access or "rw",
    }  # fmt: skip


def _device(node: NodeEdit) -> dict[str, Any]:
    made: dict[str, Any] = {"path": node.path, "type": node.kind, "uid": node.uid or 0, "gid": node.gid or 0}
    if node.kind != "p":
        made |= {"major": node.major, "minor": node.minor}
    if node.file_mode is not None:
        made["fileMode"] = node.file_mode
    return made


def _mount(mount: MountEdit) -> dict[str, Any]:
    return {
        "destination": mount.container_path,
        "type": mount.kind or "bind",
        "source": mount.host_path,
        "options": list(mount.options),
    }


def _add_mount(config: dict[str, Any], mount: dict[str, Any]) -> None:
    taken = {one["destination"] for one in config["mounts"]}
    if mount["destination"] in taken:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"a CDI specification mounts {mount['source']} over the container's own {mount['destination']}",
            remedy="Change its containerPath.",
        )
    config["mounts"].append(mount)


def _hook(hook: HookEdit) -> dict[str, Any]:
    made: dict[str, Any] = {"path": hook.path}
    if hook.args:
        made["args"] = list(hook.args)
    if hook.env:
        made["env"] = list(hook.env)
    if hook.timeout_s is not None:
        made["timeout"] = hook.timeout_s
    return made
