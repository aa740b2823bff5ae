"""Compile caches on real processes and containers: a build task leaves files, another node's runners see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache_facts import GOOD
from e2e_cluster import POOLS, Cluster, until
from fal_contract.cache_key import cache_key
from fal_contract.v1 import cluster_pb2 as pb
from fal_runtime.host_image import worker_command

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]
NODES = {"oci": "box", "process": "lap"}
# What a runner sees, told in its log before it becomes a worker. A folder is tried to be written to.
LOOK = """
echo "caches <$FAL_COMPILE_CACHE>"
for one in $(echo "$FAL_COMPILE_CACHE" | tr , ' '); do
  folder=${one#*=}
  echo "kernel <$(cat "$folder/kernels/k.cubin")>"
  if (echo x > "$folder/kernels/k.cubin") 2>/dev/null; then echo "written"; else echo "read-only"; fi
done
exec "$@"
"""


def facts_of(real: Cluster, name: str) -> tuple[Path, str]:
    """A file with facts of their own, and their key."""
    facts = GOOD | {"compile_options": name}
    file = real.root / f"{name}.json"
    file.write_text(json.dumps(facts))
    return file, cache_key(facts)


def build(real: Cluster, namespace: str, facts: Path, driver: str, script: str) -> dict[str, object]:
    """`falctl cache build` of a shell script, on the node with this driver; the entry."""
    argv = ["cache", "build", namespace, "--facts", str(facts), "--pool", POOLS[driver], "--size-max", "1MiB"]
    done = real.falctl(*argv, "--json", "--", "/bin/sh", "-c", script)
    assert done.returncode in (0, 1), done.stderr
    entry = json.loads(done.stdout)["entry"]
    return {**entry, "error": done.stderr}


def seen(real: Cluster, app: str, team: str, key: str, driver: str) -> list[str]:
    """What a runner of that team on that node tells of its compile caches."""
    worker = [*worker_command(isolates=driver == "oci").argv, "-m", "fal_runtime.worker.fake"]
    file = real.manifest(
        app, driver=driver, team=team, command=["/bin/sh", "-c", LOOK, "sh", *worker], compile_caches=[key]
    )
    done = real.falctl("--team", team, "app", "apply", "-f", str(file), timeout_s=90)
    assert done.returncode == 0, done.stderr
    views = real.call("ListRunners", pb.ListRunnersRequest(team=team, app=f"{team}/{app}")).runners
    (runner,) = [view.runner.id for view in views]
    assert {view.node_name for view in views} == {NODES[driver]}
    logs = real.falctl("runner", "logs", runner, "--tail", "50")
    assert logs.returncode == 0, logs.stderr
    real.call("DeleteApp", pb.DeleteAppRequest(id=f"{team}/{app}"))
    until(
        lambda: not real.call("ListRunners", pb.ListRunnersRequest(team=team, app=f"{team}/{app}")).runners,
        f"the runners of {app} are gone",
    )
    words = ("caches <", "kernel <", "read-only", "written")
    return [
        text
        for line in logs.stdout.splitlines()
        for word in words
        if (text := line[line.find(word) :]).startswith(word)
    ]


@pytest.mark.parametrize("driver", ["oci", "process"])
def test_what_a_build_leaves_is_seen_on_another_node_by_its_team_alone(real: Cluster, driver: str) -> None:
    other = "process" if driver == "oci" else "oci"
    facts, key = facts_of(real, f"built-on-{driver}")
    script = 'mkdir "$FAL_BUILD_OUTPUT/kernels"; echo -n ptx > "$FAL_BUILD_OUTPUT/kernels/k.cubin"; echo done'
    view = build(real, "team/default", facts, driver, script)
    assert (view["state"], view["key"]) == ("ready", key), view
    entry = view["entry"]
    assert isinstance(entry, dict)
    assert entry["bytes"] == 3
    assert str(entry["task"]).startswith(f"system/build-{key[:12]}-")

    told = seen(real, f"sees-{driver}", "default", key, other)
    assert told[0].startswith(f"caches <{key}=")
    assert told[1] == "kernel <ptx>"
    if other == "oci":
        assert told[2] == "read-only"
    if driver == "oci":  # the scheduler's choice, whatever the driver
        assert seen(real, f"not-{driver}", "others", key, other)[0] == "caches <>"

    done = real.falctl("cache", "evict", "team/default", key)
    assert done.returncode == 0, done.stderr
    assert not real.ask("entries", "cache", "list", "--key", key)


@pytest.mark.parametrize("driver", ["oci", "process"])
def test_a_build_that_fails_or_writes_too_much_is_told_with_its_last_lines(real: Cluster, driver: str) -> None:
    facts, _ = facts_of(real, f"fails-on-{driver}")
    view = build(real, "cluster", facts, driver, "echo no compiler here; exit 3")
    assert view["state"] == "failed"
    assert "code 3" in str(view["reason"])
    assert "no compiler here" in str(view["error"])
    if driver == "process":
        return
    large = 'head -c 5000000 /dev/zero > "$FAL_BUILD_OUTPUT/k"; sleep 60'
    view = build(real, "cluster", facts, driver, large)
    assert (view["state"], view["entry"]) == ("failed", None)
    assert "at most 1048576 are allowed" in str(view["reason"])
    link = 'ln -s /etc/passwd "$FAL_BUILD_OUTPUT/k"'
    view = build(real, "cluster", facts, driver, link)
    assert "neither file nor folder" in str(view["reason"])
    until(lambda: not list(real.call("ListApps", pb.ListAppsRequest(team="system")).apps), "builds are over")
    node = real.nodes[NODES[driver]]
    assert not list(node.state_dir.rglob("*.output"))
