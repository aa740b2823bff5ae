"""falctl without a cluster: profiles, output, the manifest template, processes, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fal_contract.errors import Code, FalError
from fal_contract.manifest import AppManifest, parse_manifest
from fal_contract.units import format_bytes, format_duration, parse_bytes, parse_duration_s
from fal_contract.v1 import cluster_pb2, state_pb2
from falctl import processes
from falctl.output import to_json
from falctl.profile import Profile, load_profile, write_profile
from falctl.template import app_template


def run_falctl(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "falctl.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env={"PYTHONPATH": ":".join(sys.path), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin", **(env or {})},
    )


class TestProfiles:
    def test_round_trip_by_name(self, tmp_path: Path) -> None:
        env = {"XDG_CONFIG_HOME": str(tmp_path)}
        profile = Profile("lab", ("h1:7420", "h2:7420"), tmp_path / "me.pem", "video")
        write_profile("lab", profile, env)
        assert load_profile("lab", env) == profile
        assert load_profile(None, {**env, "FALCTL_PROFILE": "lab"}) == profile

    def test_default_is_preferred_to_dev(self, tmp_path: Path) -> None:
        env = {"XDG_CONFIG_HOME": str(tmp_path)}
        for name in ("dev", "default"):
            write_profile(name, Profile(name, ("h:1",), tmp_path / "me.pem", "default"), env)
        assert load_profile(None, env).name == "default"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("servers = [\n", "is not TOML"),
            ('servers = ["h:1"]\nidentity = "x"\nserver = "y"\n', "server"),
            ('servers = "h:1"\nidentity = "x"\n', "host:port"),
            ('servers = ["h"]\nidentity = "x"\n', "host:port"),
            ('servers = ["h:1"]\n', "identity"),
            ('servers = ["h:1"]\nidentity = "x"\nteam = "No Team"\n', "team"),
        ],
    )
    def test_bad_profiles(self, tmp_path: Path, text: str, words: str) -> None:
        path = tmp_path / "p.toml"
        path.write_text(text)
        with pytest.raises(FalError, match=words) as caught:
            load_profile(str(path), {})
        assert caught.value.remedy

    def test_no_profile_says_how_to_get_one(self, tmp_path: Path) -> None:
        with pytest.raises(FalError, match="falctl dev up"):
            load_profile(None, {"XDG_CONFIG_HOME": str(tmp_path)})


def test_json_has_plain_numbers_short_enums_and_every_field() -> None:
    view = cluster_pb2.RunnerView(
        runner=state_pb2.Runner(id="default/d-1", memory_bytes=5 << 30), state=state_pb2.RUNNER_STATE_IDLE
    )
    view.placement.refused["gpu-free"] = 3
    shown = to_json(view)
    assert shown["state"] == "IDLE"
    assert shown["runner"]["memory_bytes"] == 5 << 30
    assert shown["runner"]["gpus"] == []
    assert shown["placement"]["refused"] == {"gpu-free": 3}
    assert shown["status"] is None
    assert json.loads(json.dumps(shown)) == shown


def test_the_template_is_a_manifest_and_documents_every_key() -> None:
    text = app_template("digits")
    manifest = parse_manifest(AppManifest, text, source="t", yaml_syntax=False)
    assert (manifest.name, manifest.model, manifest.min_concurrency) == ("digits", "digits", 1)
    for key in AppManifest.model_fields:
        assert key in text
    uncommented = "\n".join(
        line[2:] if line.startswith("# ") and " = " in line and "(" not in line.split(" = ")[0] else line
        for line in text.splitlines()
        if not line.startswith("# digits:")
    )
    parse_manifest(AppManifest, uncommented, source="t", yaml_syntax=False)


class TestUnits:
    @pytest.mark.parametrize(
        ("text", "value"), [("2TiB", 2 << 40), ("500 MB", 500_000_000), ("0", 0), ("1.5KiB", 1536)]
    )
    def test_bytes(self, text: str, value: int) -> None:
        assert parse_bytes(text) == value

    @pytest.mark.parametrize(("text", "value"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2d", 172800), ("5", 5)])
    def test_durations(self, text: str, value: float) -> None:
        assert parse_duration_s(text) == value

    @pytest.mark.parametrize("text", ["", "h", "1 fortnight", "-3s", "1h30m"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(FalError) as caught:
            parse_duration_s(text, field="--ttl")
        assert caught.value.field == "--ttl"

    def test_shown(self) -> None:
        assert [format_duration(s) for s in (0.34, 42, 310, 11000, 349200)] == [
            "0.3s",
            "42s",
            "5m10s",
            "3h03m",
            "4d01h",
        ]
        assert [format_bytes(b) for b in (12, 4 << 30)] == ["12 B", "4.0 GiB"]


class TestProcesses:
    def test_start_recognise_end(self, tmp_path: Path) -> None:
        process = processes.start("sleeper", ["sleep", "60"], log=tmp_path / "log")
        assert process.alive
        stranger = processes.Process("sleeper", process.pid, process.start_ticks + 1, ())
        assert not stranger.alive  # the pid alone does not name it
        assert not processes.end(stranger, grace_s=5)
        assert process.alive
        assert processes.end(process, grace_s=5)
        assert not process.alive
        assert not processes.end(process, grace_s=5)

    def test_one_that_ignores_sigterm_is_killed(self, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        script = f"trap '' TERM; touch {ready}; while :; do sleep 1; done"
        process = processes.start("stubborn", ["sh", "-c", script], log=tmp_path / "log")
        processes.wait_for_file(ready, process, log=tmp_path / "log", timeout_s=10)
        assert processes.end(process, grace_s=0.2)
        assert not process.alive

    def test_a_daemon_that_dies_tells_its_error(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        script = "echo 'error: port 1 is in use. Use another.' >&2; exit 1"

        def begin() -> None:  # it may be gone before `start` returns, or after
            process = processes.start("d", ["sh", "-c", script], log=log)
            processes.wait_for_file(tmp_path / "never", process, log=log, timeout_s=10)

        with pytest.raises(FalError, match="port 1 is in use"):
            begin()


class TestCommand:
    def test_usage_error_is_2(self) -> None:
        assert run_falctl("app", "frobnicate").returncode == 2

    def test_failure_is_1_with_what_and_remedy(self, tmp_path: Path) -> None:
        done = run_falctl("status", env={"XDG_CONFIG_HOME": str(tmp_path)})
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: There is no profile")

    def test_init_writes_once(self, tmp_path: Path) -> None:
        assert run_falctl("init", "digits", cwd=tmp_path).returncode == 0
        again = run_falctl("init", "digits", cwd=tmp_path)
        assert again.returncode == 1
        assert "app.toml exists" in again.stderr

    def test_init_refuses_a_bad_name(self, tmp_path: Path) -> None:
        done = run_falctl("init", "Not A Name", cwd=tmp_path)
        assert done.returncode == 1
        assert "NAME" in done.stderr
        assert not (tmp_path / "app.toml").exists()

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion(self, shell: str) -> None:
        done = run_falctl("completion", shell)
        assert done.returncode == 0
        assert "_FALCTL_COMPLETE" in done.stdout

    def test_completion_of_an_unknown_shell(self) -> None:
        assert "no completion" in run_falctl("completion", "tcsh").stderr

    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom typer.testing import CliRunner\nfrom falctl.main import app\n"
            "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
            "print([m for m in ('grpc', 'google.protobuf', 'aiohttp', 'numpy', 'cryptography') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
            env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.stdout.strip() == "[]"

    def test_every_group_has_help(self) -> None:
        from falctl.main import app

        for group in ("app", "runner", "weights", "cache", "node", "gpu", "pool", "dev", "operator", "server"):
            assert CliRunner().invoke(app, [group, "--help"]).exit_code == 0, group


def test_codes_are_words() -> None:
    assert all(code.value == code.name for code in Code)
