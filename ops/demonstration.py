"""The demonstration behind `ops/demo`: drives the real commands as a person would and times each phase.

Everything it starts lives in one folder and is ended by `falctl dev down`, also after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demonstration_s3 import RATE, S3Server

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PROMPTS = ("a handwritten seven", "the digit 3", "a drawing of zero")
MANIFEST = """\
name = "digits"
model = "digits"
loras = ["digits-look"]
num_gpus = 1
min_concurrency = 2
# The container starts while its weights are still arriving, and may read bytes that nobody has attested yet.
stream_weights = true
allow_provisional = true
[resources]
cpu = 1.0
memory_gib = 2.0
"""


class Demo:
    """One run of the demonstration."""

    def __init__(self, folder: Path, out: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.out = out
        self.options = options
        self.phases: list[tuple[str, float]] = []
        self.s3: S3Server | None = None
        self.env = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "OMP_NUM_THREADS": "1"}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a step and say what it is."""
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        yield
        self.phases.append((name, time.monotonic() - began))

    def falctl(self, *arguments: str, shown: bool = True) -> str:
        """Run falctl as a person would; returns its output."""
        if shown:
            print(f"$ falctl {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [str(BIN / "falctl"), *arguments], env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            raise SystemExit(f"demo: falctl {' '.join(arguments)} ended with {done.returncode}")
        return done.stdout

    def ask(self, noun: str, *arguments: str) -> Any:
        """One falctl verb with --json; returns what is under the noun."""
        return json.loads(self.falctl(*arguments, "--json", shown=False))[noun]

    def say(self, text: str) -> None:
        print(text.rstrip(), flush=True)

    def run(self) -> None:
        """The main job."""
        dev = str(self.folder / "dev")
        with self.phase("start an S3 server, a scheduler, three agents, a gateway"):
            bucket = REPOSITORY / "ops" / "models"
            self.s3 = S3Server(bucket.parent)
            self.say(f"S3 server over {bucket} as bucket {bucket.name!r}, at most {RATE} bytes per second")
            up = ["dev", "up", "--dir", dev, "--nodes", "3", "--sim-gpus", "2xH100-80GB"]
            up += ["--credentials", str(self.s3.credentials(self.folder / "credentials.toml"))]
            self.say(self.falctl(*up, "--driver", self.options.driver, "--store", self.options.store))
            self.say(self.falctl("node", "list"))
        with self.phase("register the model and its LoRA: names and sizes"):
            self.say(self.falctl("weights", "add", "digits", "s3://models/digits"))
            self.say(self.falctl("weights", "add", "digits-look", "s3://models/digits-lora", "--kind", "lora"))
        mounts = os.geteuid() == 0 and os.path.exists("/dev/fuse")
        with self.phase(
            "deploy: two runners start " + ("while weights arrive" if mounts else "once weights are there")
        ):
            if not mounts:
                self.say("unfinished weights cannot be mounted without root: containers wait until the model is ready")
            manifest = self.folder / "app.toml"
            manifest.write_text(MANIFEST)
            self.say(self.falctl("app", "apply", "-f", str(manifest), "--detach"))
            self.say(self.falctl("weights", "stage", "digits", "--replicas", "3"))
            self.watch_weights()
            self.say(self.falctl("runner", "list"))
        with self.phase("all three nodes have the model; the origin was read once"):
            self.say(self.falctl("weights", "stage", "digits", "--replicas", "3", "--watch"))
            self.say(self.falctl("weights", "where", "digits"))
            self.origin_bytes()
        with self.phase("draw three prompts"):
            for number, prompt in enumerate(PROMPTS):
                self.draw(prompt, f"{number}-{prompt.replace(' ', '-')}.png")
        if self.isolates():
            with self.phase("any server: an image of one static binary, without a network"):
                self.serve_an_image()
        with self.phase("kill a container; it is replaced"):
            self.kill_a_container()
        with self.phase("kill the scheduler; runners go on; it comes back"):
            self.kill_the_scheduler(dev)
        with self.phase("draw once more, with the LoRA"):
            self.draw("a handwritten five", "3-five-with-lora.png", "--lora", "digits-look")

    def isolates(self) -> bool:
        """Whether the nodes run real containers."""
        return all(node["capabilities"]["isolates"] for node in self.ask("nodes", "node", "list"))

    def serve_an_image(self) -> None:
        """Pack a root file system, start it as it stands, ask it through the gateway, run a command in it."""
        example, root = REPOSITORY / "ops" / "examples" / "static-binary", self.folder / "static-root"
        subprocess.run([str(example / "build.sh"), str(root)], check=True, timeout=60)
        self.say(self.falctl("image", "add", "static", f"rootfs:{root}"))
        self.say(self.falctl("app", "apply", "-f", str(example / "app.toml")))
        state = json.loads((self.folder / "dev" / "dev.json").read_text())
        url = f"{state['gateway']}/v1/run/default/static-binary/"
        with urllib.request.urlopen(url, timeout=60) as answer:
            self.say(f"GET {url} → {answer.read().decode()}")
        runner = self.ask("runners", "runner", "list", "--app", "static-binary")[0]["runner"]["id"]
        self.say(self.falctl("runner", "exec", runner, "--", "/bin/busybox", "ip", "address"))
        self.falctl("app", "delete", "static-binary")

    def watch_weights(self) -> None:
        """Say how much of the model each node had when its container started, and when the runner was ready."""
        started: dict[str, str] = {}
        began = time.monotonic()

        def look() -> bool:
            runners = self.ask("runners", "runner", "list", "--app", "digits")
            nodes = {one["node_id"]: one for one in self.ask("where", "weights", "where", "digits")["nodes"]}
            for one in runners:
                name, node = one["runner"]["id"], nodes.get(one["runner"]["node"])
                if one["state"] in ("SETUP", "IDLE", "RUNNING") and name not in started and node is not None:
                    here, size = int(node["cached"]["bytes_disk"]), int(node["cached"]["bytes"])
                    started[name] = f"{here / 1e6:.1f} of {size / 1e6:.1f} MB of its weights are there"
                    self.say(
                        f"{time.monotonic() - began:5.1f} s  {name} has started on {node['node']}: {started[name]}"
                    )
            return len(self.ready_runners()) == 2

        self.until(look, "two runners are ready", 180)
        self.say(f"{time.monotonic() - began:5.1f} s  both are ready")

    def origin_bytes(self) -> None:
        """How often the origin was read, over all nodes."""
        where = self.ask("where", "weights", "where", "digits")
        read, size = int(where["bytes_from_origin"]), int(where["bytes_total"])
        self.say(f"origin bytes ÷ model bytes over {len(where['nodes'])} nodes: {read / size:.2f} ({read} ÷ {size})")

    def draw(self, prompt: str, name: str, *more: str) -> None:
        """One picture through the serving API."""
        self.say(self.falctl("run", "digits", "--prompt", prompt, "--seed", "1", "-o", str(self.out / name), *more))

    def kill_a_container(self) -> None:
        """SIGKILL the worker of one runner, as a crash would; wait until two are ready again."""
        before = self.ready_runners()
        victim = sorted(before)[0]
        pid = worker_pid(victim)
        self.say(f"kill -9 {pid}, the worker of {victim}")
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: victim not in self.ready_runners(), "the crash is seen", 30)
        self.say(self.falctl("explain", victim))
        self.until(lambda: len(self.ready_runners()) == 2, "two runners are ready again", 180)
        self.say(self.falctl("runner", "list"))

    def ready_runners(self) -> set[str]:
        runners = self.ask("runners", "runner", "list", "--app", "digits")
        return {one["runner"]["id"] for one in runners if one["state"] in ("IDLE", "RUNNING")}

    def kill_the_scheduler(self, dev: str) -> None:
        """SIGKILL the scheduler; the gateway draws without it; started again it takes over what runs."""
        before = self.ready_runners()
        pids = {row["name"]: row["pid"] for row in self.ask("dev", "dev", "status", "--dir", dev)}
        state = json.loads((self.folder / "dev" / "dev.json").read_text())
        self.say(f"kill -9 {pids['scheduler']}, the scheduler")
        os.kill(pids["scheduler"], signal.SIGKILL)
        body = json.dumps({"prompt": "a handwritten nine", "seed": 1, "format": "png"}).encode()
        url = f"{state['gateway']}/v1/run/default/digits"
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            picture = self.out / "nine-without-a-scheduler.png"
            picture.write_bytes(answer.read())
        self.say(f"drawn while no scheduler ran: {picture}")
        self.falctl("dev", "restart", "scheduler", "--dir", dev)
        self.until(lambda: self.ready_runners() == before, "the same runners are known again", 60)
        self.say(self.falctl("status"))

    def until(self, done: Any, what: str, timeout_s: float) -> None:
        """Poll until it is true."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit(f"demo: after {timeout_s:g} s not yet so: {what}")
            time.sleep(0.5)

    def report(self) -> None:
        """Pictures and phases."""
        print("\npictures:")
        for picture in sorted(self.out.glob("*.png")):
            print(f"  {picture}")
        print("\nphase                                                seconds")
        for name, seconds in [*self.phases, ("in all", sum(s for _, s in self.phases))]:
            print(f"{name:<52} {seconds:7.1f}")


def worker_pid(runner: str) -> int:
    """The process of a runner's worker, found by the name that its agent gave it."""
    wanted = f"FAL_RUNNER_ID={runner}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or it is not ours to read
        if wanted in environment and b"fal_runtime.worker" in command:
            return int(folder.name)
    raise SystemExit(f"demo: the worker of {runner} is not among the processes")


def main() -> None:
    """Run it, always tear down, then report."""
    parser = argparse.ArgumentParser(prog="ops/demo", description=__doc__)
    parser.add_argument("--setup-began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out", help="folder for the pictures")
    parser.add_argument("--driver", default="auto", choices=("auto", "oci", "process"))
    parser.add_argument("--store", default="sqlite", choices=("sqlite", "etcd"))
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    folder = Path(tempfile.mkdtemp(prefix="falctl-"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that it is torn down then, too
    demo = Demo(folder, out, options)
    if options.setup_began is not None:
        demo.phases.append(("set up", time.time() - options.setup_began))  # noqa: TID251
    try:
        demo.run()
    finally:
        if demo.s3 is not None:
            demo.s3.close()
        if not options.keep and (folder / "dev").exists():
            with demo.phase("tear down"):
                demo.falctl("dev", "down", "--dir", str(folder / "dev"))
    demo.report()


if __name__ == "__main__":
    main()
