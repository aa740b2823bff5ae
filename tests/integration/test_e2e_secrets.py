"""A secret from `falctl secret set` to a file in a real container, and where its value must not be found."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from e2e_cluster import Cluster, processes, until, worker_pid

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]
VALUE = b"correct-horse-\x00-battery-staple"
MARK = b"correct-horse"


def seen_by(pid: int) -> Path:
    """The folder of secrets, as the process sees it."""
    environ = dict(
        entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry
    )
    return Path(f"/proc/{pid}/root{environ[b'FAL_SECRETS_DIR'].decode()}")


def told_anywhere(cluster: Cluster) -> list[str]:
    """Files of scheduler and agents (stores, journals, logs, specs), arguments and environments with the value."""
    found = []
    for path in cluster.root.rglob("*"):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink() and MARK in path.read_bytes():
                found.append(str(path))
    for pid, _ in processes():
        for name in ("environ", "cmdline"):
            with suppress(OSError):
                if MARK in Path(f"/proc/{pid}/{name}").read_bytes():
                    found.append(f"{name} of {pid}")
    return found


@pytest.mark.parametrize("driver", ["oci", "process"])
def test_a_secret_reaches_its_container_and_nothing_else(real: Cluster, driver: str, tmp_path: Path) -> None:
    app, name = f"secret-{driver}", f"token-{driver}"
    refused = real.falctl("app", "apply", "-f", str(real.manifest(app, driver=driver, secrets=[name])), "--detach")
    assert refused.returncode == 1
    assert f"secret 'default/{name}' is not set" in refused.stderr

    file = tmp_path / "value"
    file.write_bytes(VALUE)
    assert real.falctl("secret", "set", name, "--from-file", str(file)).returncode == 0
    [runner] = real.apply(app, driver=driver, secrets=[name])
    pid = worker_pid(runner)
    assert (seen_by(pid) / name).read_bytes() == VALUE
    assert [path.name for path in seen_by(pid).iterdir()] == [name]

    file.write_bytes(b"another")
    assert real.falctl("secret", "set", name, "--from-file", str(file)).returncode == 0
    assert (seen_by(pid) / name).read_bytes() == VALUE, "a runner keeps what it started with"
    assert real.falctl("runner", "stop", runner).returncode == 0
    until(lambda: real.ready(app) and runner not in real.ready(app), "a stopped runner is replaced")
    [second] = real.wait_ready(app, 1)
    place = seen_by(worker_pid(second))
    assert (place / name).read_bytes() == b"another", "a new one gets the new value"

    assert told_anywhere(real) == []
    kept = real.falctl("secret", "unset", name)
    assert kept.returncode == 1
    assert f"default/{app}" in kept.stderr
    [listed] = [one for one in real.ask("secrets", "secret", "list") if one["id"] == f"default/{name}"]
    assert (listed["apps"], listed["generation"], listed["bytes"]) == ([f"default/{app}"], 2, 7)

    real.delete(app)
    assert real.falctl("secret", "unset", name).returncode == 0
    mounts = Path("/proc/self/mounts").read_text()
    assert not any("falctl-secrets" in line and runner.replace("/", ".") in line for line in mounts.splitlines())
    assert told_anywhere(real) == []
