"""The operator's command against a running cluster: wrong input, JSON, two operators at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer.main

from e2e_cluster import Cluster
from fal_contract.limits import LEASE_TTL_S
from falctl.main import app as falctl_app
from falctl_forks import Forks

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]

# Verb → wrong arguments → exit code and a word that the error must say. FILE… are written by `files`.
WRONG: dict[str, list[tuple[str, int, str]]] = {
    "init": [
        ("Bad_Name", 1, "NAME"),
        ("good --file TAKEN", 1, "exists"),
        ("good --file no/folder/x.toml", 1, "--file"),
    ],
    "app apply": [
        ("-f missing.toml", 1, "missing.toml"),
        ("-f UNKNOWN_KEY", 1, "num_gpu"),
        ("-f WRONG_TYPE", 1, "num_gpus"),
        ("-f NO_MODEL", 1, "weights add"),
        ("-f NOT_TOML", 1, "NOT_TOML.toml"),
        ("-f GOOD --expected-generation 7", 1, "generation"),
        ("-f GOOD --expected-generation x", 2, "--expected-generation"),
    ],
    "app plan": [("-f UNKNOWN_KEY", 1, "num_gpu"), ("-f TEXT", 1, "TOML")],
    "app list": [("--al", 2, "--al")],
    "app show": [("nothing", 1, "nothing"), ("Bad_Name", 1, "Bad_Name")],
    "app scale": [("here", 1, "--min"), ("nothing --min 1", 1, "nothing"), ("here --min 9", 1, "max_concurrency")],
    "app delete": [("nothing", 1, "nothing"), ("", 2, "name")],
    "run": [
        ("nothing --prompt x", 1, "nothing"),
        ("here --prompt x -o no/folder/x.png", 1, "--output"),
        ("here", 2, "--prompt"),
        ("here --prompt x --steps 100000", 1, "steps"),
        ("here --prompt x --lora nowhere", 1, "nowhere"),
    ],
    "runner list": [("--app Bad_Name", 1, "Bad_Name")],
    "runner show": [("nothing", 1, "nothing"), ("a/b/c", 1, "b/c")],
    "runner logs": [
        ("nothing", 1, "nothing"),
        ("here --tail x", 2, "--tail"),
        ("here --since soon", 1, "--since"),
        ("here --since 2026-99-01", 1, "--since"),
        ("here --since 0001-01-01", 1, "--since"),
    ],
    "runner exec": [("nothing -- true", 1, "nothing"), ("here", 2, "command"), ("here --tty -- true", 1, "--tty")],
    "runner shell": [("nothing", 1, "nothing"), ("here --tty", 1, "--tty")],
    "runner top": [("nothing", 1, "nothing"), ("here --every x", 2, "--every")],
    "runner stop": [("nothing", 1, "nothing")],
    "runner kill": [("nothing", 1, "nothing")],
    "image add": [
        ("Bad_Name docker://registry.example/x:1", 1, "Bad_Name"),
        ("i ftp://host/x", 1, "ftp"),
        ("i docker://registry.example/x:1 --size-max lots", 1, "--size-max"),
        ("i docker://registry.example/x:1 --within soon", 1, "--within"),
    ],
    "image list": [("--team x", 2, "--team")],
    "image show": [("nothing", 1, "nothing")],
    "image warm": [("nothing --to box", 1, "nothing")],
    "image where": [("nothing", 1, "nothing")],
    "image verify": [("nothing", 1, "nothing")],
    "image rm": [("nothing", 1, "nothing")],
    "secret set": [("s --from-file no/such/file", 1, "no/such/file"), ("Bad_Name --from-file TEXT", 1, "Bad_Name")],
    "secret list": [("--team x", 2, "--team")],
    "secret unset": [("nothing", 1, "nothing")],
    "weights add": [
        ("m file:///no/such/folder", 1, "/no/such/folder"),
        ("m ftp://host/m", 1, "ftp"),
        ("Bad_Name file:///", 1, "Bad_Name"),
        ("m file:///tmp --kind vae", 1, "vae"),
        ("m file:///tmp --rev main", 1, "revision"),
        ("m hf://", 1, "hf"),
        ("m push://m", 1, "push"),
    ],
    "weights list": [("--team x", 2, "--team"), ("--limit -1", 2, "--limit")],
    "weights show": [("nothing", 1, "nothing")],
    "weights stage": [
        ("nothing --replicas 1", 1, "nothing"),
        ("nothing", 1, "--to"),
        ("nothing --to pool/machines --replicas 1", 1, "--replicas"),
        ("nothing --to machines", 1, "machines"),
        ("nothing --to pool/machines --ttl soon", 1, "--ttl"),
        ("nothing --replicas x", 2, "--replicas"),
    ],
    "weights pin": [("nothing --to pool/machines", 1, "nothing"), ("nothing", 1, "--to")],
    "weights unstage": [("nothing", 1, "nothing"), ("nothing --to machines", 1, "machines")],
    "weights unpin": [("nothing", 1, "nothing")],
    "weights where": [("nothing", 1, "nothing"), ("nothing --within soon", 1, "--within")],
    "weights evict": [("nothing", 1, "nothing")],
    "weights verify": [("nothing", 1, "nothing")],
    "weights revoke": [("nothing", 1, "nothing")],
    "weights gc": [("x", 2, "x")],
    "weights push": [
        ("/no/such/folder m", 1, "/no/such/folder"),
        ("CLI Bad_Name", 1, "Bad_Name"),
        ("CLI m --kind vae", 1, "vae"),
        ("CLI m --limit soon", 1, "--limit"),
        ("CLI m --pool nowhere", 1, "nowhere"),
    ],
    "cache list": [("--namespace both", 1, "both")],
    "cache show": [("cluster nothing", 1, "nothing"), ("both nothing", 1, "both")],
    "cache lookup": [("cluster --fact x", 1, "x"), ("cluster --facts NOT_TOML", 1, "NOT_TOML.toml")],
    "cache build": [
        ("cluster --within soon true", 1, "--within"),
        ("cluster --fact dtype=bf16 true", 1, "engine_image"),
    ],
    "cache evict": [("cluster nothing", 1, "nothing"), ("cluster", 2, "key")],
    "node list": [("--pool", 2, "--pool")],
    "node show": [("nothing", 1, "nothing")],
    "node cordon": [("nothing", 1, "nothing")],
    "node uncordon": [("nothing", 1, "nothing")],
    "node revoke": [("nothing", 1, "nothing")],
    "node token create": [
        ("--pool nowhere", 1, "nowhere"),
        ("--pool machines --ttl soon", 1, "--ttl"),
        ("--pool machines --ttl 9999d", 1, "ttl"),
        ("--pool machines --uses 0", 2, "--uses"),
        ("", 2, "--pool"),
    ],
    "node token list": [("x", 2, "x")],
    "node token revoke": [("t-nothing", 1, "t-nothing")],
    "gpu list": [("--busy", 2, "--busy")],
    "gpu show": [("nothing 0", 1, "nothing"), ("box 77", 1, "77"), ("box", 2, "GPU")],
    "gpu topo": [("nothing", 1, "nothing")],
    "gpu quarantine": [
        ("nothing 0 -m x", 1, "nothing"),
        ("box GPU-none -m x", 1, "GPU-none"),
        ("box 0", 2, "--reason"),
    ],
    "gpu release": [("nothing 0", 1, "nothing"), ("box GPU-none", 1, "GPU-none")],
    "gpu mig": [("box 0", 1, "--layout"), ("box 0 --layout 3g", 1, "3g"), ("box 0 --layout 9x1g.5gb", 1, "--layout")],
    "pool apply": [("-f missing.toml", 1, "missing.toml"), ("-f POOL_PRICE", 1, "gpu_hour_price"), ("", 2, "--file")],
    "pool list": [("x", 2, "x")],
    "pool show": [("nothing", 1, "nothing")],
    "status": [("x", 2, "x")],
    "explain": [("nothing", 1, "nothing")],
    "events": [("--after x", 2, "--after")],
    "dev up": [
        ("--dir DIR --driver vm", 1, "vm"),
        ("--dir DIR --store dbm", 1, "dbm"),
        ("--nodes 0", 2, "--nodes"),
        ("--warm-workers 17", 2, "--warm-workers"),
    ],
    "dev down": [("--dir no-such-folder", 1, "no-such-folder")],
    "dev restart": [("scheduler --dir no-such-folder", 1, "scheduler")],
    "dev status": [("--dir", 2, "--dir")],
    "operator revoke": [("nothing", 1, "nothing"), ("node/box", 1, "node"), ("", 2, "ROLE/NAME")],
    "operator confirm": [("everything", 1, "everything"), ("", 2, "what")],
    "server init": [("--data-dir DATA", 1, "DATA"), ("", 2, "--data-dir")],
    "completion": [("powershell", 1, "powershell")],
    "app revisions": [("nothing", 1, "nothing")],
    "app set-rev": [("nothing 1", 1, "nothing"), ("here 9", 1, "9"), ("here first", 2, "revision")],
    "app rollback": [("nothing", 1, "nothing"), ("here", 1, "is not kept")],
    "app rollout status": [("nothing", 1, "nothing"), ("Bad_Name", 1, "Bad_Name")],
    "app rollout pause": [("nothing", 1, "nothing"), ("here", 1, "no rollout under way")],
    "app rollout resume": [("nothing", 1, "nothing"), ("here", 1, "no rollout under way")],
    "app rollout promote": [("nothing", 1, "nothing"), ("here", 1, "no rollout under way")],
    "app rollout abort": [("nothing", 1, "nothing"), ("here", 1, "no rollout under way")],
    "plan": [("UNKNOWN_KEY", 2, "num_gpu"), ("missing.toml", 2, "missing.toml"), ("TEXT", 2, "TOML")],
    "node drain": [
        ("nothing", 1, "nothing"),
        ("box --deadline soon", 1, "--deadline"),
        ("box --no-deadline --force", 1, "--no-deadline"),
    ],
    "node maintenance": [("nothing", 1, "nothing"), ("nothing --off", 1, "nothing")],
    "node reboot": [("nothing", 1, "nothing"), ("box", 1, "reboot_command"), ("box --deadline soon", 1, "--deadline")],
    "node rm": [("nothing", 1, "nothing"), ("box", 1, "box")],
    "node label": [("nothing a=b", 1, "nothing"), ("box a", 1, "'a'"), ("box a=1 a=2", 1, "again"), ("box", 2, "NAME")],
    "pool declare-lost": [("nothing --yes", 1, "nothing"), ("machines --yes", 1, "silent"), ("machines", 1, "--yes")],
    "quota set": [
        ("Bad_Name --gpus 1", 1, "Bad_Name"),
        ("t --gpus=-1", 1, "--gpus"),
        ("t --gpus 0.0001", 1, "--gpus"),
        ("t --gpus many", 2, "--gpus"),
    ],
    "quota list": [("x", 2, "x")],
    "quota show": [("nothing", 1, "nothing")],
    "quota unset": [("nothing", 1, "nothing")],
    "cost": [
        ("--by colour", 1, "--by"),
        ("--since soon", 1, "--since"),
        ("--since 1h --until 2h", 1, "--until"),
        ("--csv no/folder/x.csv", 1, "no/folder/x.csv"),
    ],
    "operator leader": [("x", 2, "x")],
    "operator snapshot save": [("no/folder/x", 1, "no/folder/x"), ("TAKEN", 1, "exists")],
    "operator snapshot show": [("missing", 1, "missing"), ("TAKEN", 1, "no whole snapshot")],
    "operator snapshot restore": [("x", 1, "--data-dir"), ("missing --data-dir DATA", 1, "missing"), ("", 2, "FILE")],
    "operator migrate-store": [
        ("--to redis://x --data-dir DATA", 1, "redis://x"),
        ("--to sqlite:///no-such-folder/store.db --data-dir DATA", 1, "no existing folder"),
        ("", 2, "--to"),
    ],
    "sim": [
        ("place --nodes missing.csv --pods missing.csv", 1, "missing.csv"),
        ("serve --trace TAKEN", 1, "column"),
        ("replay missing", 1, "missing"),
        ("whatif missing --add-nodes 1xH200-141GB", 1, "missing"),
    ],
}
READING = {
    "app list": "apps", "app show here": "app", "app plan -f GOOD": "plan", "runner list": "runners",
    "runner list --all-teams --node box": "runners", "runner show RUNNER": "runner",
    "image list": "images", "secret list": "secrets", "weights list": "models",
    "weights gc --dry-run": "collected", "cache list": "entries",
    "node list": "nodes", "node show box": "node", "node token list": "tokens", "gpu list": "gpus",
    "gpu list --free": "gpus", "gpu show box 0": "gpu", "gpu topo box": "topology",
    "pool list": "pools", "pool show machines": "pool", "status": "status",
    "app revisions here": "revisions", "app rollout status here": "app", "quota list": "quotas", "cost": "cost",
    "cost --details": "cost", "operator leader": "leader", "explain app here": "explanation",
    "explain here": "explanation", "explain RUNNER": "explanation", "explain box": "explanation", "events": "events",
    "dev status --dir DIR": "dev",
}  # fmt: skip
MANIFESTS = {
    "GOOD.toml": 'name = "second"\ncommand = ["true"]\n',
    "UNKNOWN_KEY.toml": 'name = "x"\ncommand = ["true"]\nnum_gpu = 1\n',
    "WRONG_TYPE.toml": 'name = "x"\ncommand = ["true"]\nnum_gpus = "two"\n',
    "NO_MODEL.toml": 'name = "x"\nmodel = "unregistered"\n',
    "NOT_TOML.toml": 'name = "x\n',
    "TEXT.txt": "name: x\n",
    "TAKEN.toml": "",
    "POOL_PRICE.yaml": "name: x\ngpu_hour_price: -1\n",
}


@pytest.fixture(scope="module")
def folder(shared_cluster: Cluster) -> Path:
    """Where the commands run, with the manifests above."""
    made = shared_cluster.root / "cli"
    made.mkdir()
    for name, text in MANIFESTS.items():
        (made / name).write_text(text)
    return made


@pytest.fixture(scope="module")
def falctl(shared_cluster: Cluster, folder: Path) -> Iterator[Forks]:
    forks = Forks(shared_cluster.falctl_env, folder)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def words(shared_cluster: Cluster, folder: Path) -> Iterator[dict[str, str]]:
    """What capitals in the tables stand for; an app `here` with one runner exists meanwhile."""
    [runner] = shared_cluster.apply("here", driver="process", max_concurrency=2)
    files = {name.partition(".")[0]: str(folder / name) for name in MANIFESTS}
    yield files | {"RUNNER": runner, "DIR": str(folder / "dev"), "CLI": str(folder), "DATA": str(shared_cluster.data)}
    shared_cluster.delete("here")


def line(text: str, words: dict[str, str]) -> list[str]:
    return [words.get(word, word) for word in text.split()]


def verbs(command: Any = None, path: str = "") -> set[str]:
    """Every verb that falctl has."""
    command = command or typer.main.get_command(falctl_app)
    below = getattr(command, "commands", None)
    if below is None:
        return {path}
    return {verb for name, one in below.items() for verb in verbs(one, f"{path} {name}".strip())}


def test_the_table_has_every_verb() -> None:
    assert set(WRONG) == verbs()


@pytest.mark.parametrize(
    ("verb", "arguments", "code", "word"),
    [(verb, *case) for verb, cases in WRONG.items() for case in cases],
    ids=lambda value: str(value) if not isinstance(value, int) else "",
)
def test_wrong_input_gets_one_clear_error(
    falctl: Forks, words: dict[str, str], verb: str, arguments: str, code: int, word: str
) -> None:
    done = falctl(*verb.split(), *line(arguments, words))
    assert done.code == code, done
    assert done.stdout == ""
    *before, last = done.stderr.strip().splitlines()
    assert words.get(word, word) in last, done.stderr
    if code == 1:
        assert before == []
        assert last.startswith("error: ")
        what, _, remedy = last.partition(". ")
        assert what
        assert remedy.endswith((".", "`", "'", "…")) or " " in remedy, f"no remedy: {last}"
    else:
        assert last.lower().startswith("error: ")


@pytest.mark.parametrize(("arguments", "noun"), READING.items(), ids=lambda value: str(value))
def test_json_is_one_object_under_one_noun(falctl: Forks, words: dict[str, str], arguments: str, noun: str) -> None:
    done = falctl(*line(arguments, words), "--json")
    assert (done.code, done.stderr) == (0, "")
    assert list(json.loads(done.stdout)) == [noun]


def test_logs_as_json_are_one_object_a_line(falctl: Forks, words: dict[str, str]) -> None:
    done = falctl("runner", "logs", words["RUNNER"], "--json")
    assert done.code == 0
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert lines
    assert all({"text", "stream"} <= set(each) for each in lines)


def test_a_client_that_ends_leaves_its_slot_to_the_next(falctl: Forks, words: dict[str, str], folder: Path) -> None:
    """The runner has one slot: were it kept until the lease expires, each of these would wait half a minute."""
    began_s = time.monotonic()
    for number in range(3):
        done = falctl("run", "here", "--prompt", "seven", "-o", str(folder / f"{number}.png"))
        assert done.code == 0, (words["RUNNER"], done)
    assert time.monotonic() - began_s < 2 * LEASE_TTL_S  # two of them would wait


def test_of_two_operators_at_once_exactly_one_wins(real: Cluster) -> None:
    def apply(file: Path, generation: int) -> Any:
        return real.falctl("app", "apply", "-f", str(file), "--expected-generation", str(generation), "--detach")

    for generation in (0, 1):  # a new app, then a change of it
        files = []
        for steps in (0, 1):
            file = real.manifest("rivals", min_concurrency=0, env={"STEPS": f"{generation} {steps}"})
            files.append(file.rename(file.with_name(f"rivals-{steps}.yaml")))
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(apply, files, [generation] * 2))
        assert sorted(done.returncode for done in both) == [0, 1], [done.stderr for done in both]
        [loser] = [done for done in both if done.returncode == 1]
        assert loser.stdout == ""
        assert loser.stderr.startswith("error: ")
        assert "has generation" in loser.stderr
        shown = real.ask("app", "app", "show", "rivals")
        assert (shown["app"]["generation"], shown["app"]["revision"]) == (generation + 1, generation + 1)
