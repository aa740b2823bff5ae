"""The real worker, the real little model: a process on a unix socket that draws digits."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fal_runtime.worker.main import EXIT_LOAD_FAILED
from worker_client import Client, connected, is_ready, until

MODELS = Path(__file__).resolve().parents[2] / "ops" / "models"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the worker extra"),
]

DAMAGES = ("truncated", "no index", "pickle only")
T = TypeVar("T")


@dataclass(frozen=True)
class Atelier:
    """What the process of that name left and said. `failures` by damage: exit code and stderr."""

    folder: Path
    failures: dict[str, tuple[int, str]]
    scores: dict[str, dict[str, Any]]
    held_out: float


class Worker:
    """A worker process, its socket, and the log it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
        self.process, self._socket, self._log = process, socket, log

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def ask(self, body: Callable[[Client], Awaitable[T]]) -> T:
        """Run `body` with a client of this worker."""

        async def main() -> T:
            async with connected(self._socket) as client:
                return await body(client)

        return asyncio.run(main())

    def draw(self, **keys: Any) -> bytes:
        """A picture as PNG bytes."""

        async def body(client: Client) -> bytes:
            status, png, _ = await client.post("/infer", keys)
            assert status == 200, png
            return bytes(png)

        return self.ask(body)


@contextlib.contextmanager
def serving(folder: Path, model: Path, *flags: str) -> Iterator[Worker]:
    """A worker process that is ready; its socket and log lie in `folder`."""
    command = [sys.executable, "-m", "fal_runtime.worker", "--model", str(model), "--socket", str(folder / "s")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--threads", "1", *flags], env=ENVIRONMENT, stdout=log)
    try:
        started = Worker(process, folder / "s", folder / "log")
        started.ask(_wait_ready)
        yield started
    finally:
        process.kill()
        process.wait(20)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("w")
    lora = f"team/italic={MODELS / 'digits-lora'}"
    with serving(folder, MODELS / "digits", "--lora", lora, "--grace", "60") as started:
        yield started


async def _wait_ready(client: Client) -> None:
    await until(lambda: is_ready(client), "ready", deadline_s=120)


def leaning(png: bytes) -> float:
    """How far the ink leans to the right: the slope of its columns over its rows."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (128, 128)
        grey = np.asarray(picture.convert("L"), dtype=float)
    ink = np.clip(grey[0, 0] - 30 - grey, 0, None)
    assert ink.sum() > 0, "an empty page"
    rows, columns = np.mgrid[:128, :128]
    rows, columns = rows - (ink * rows).sum() / ink.sum(), columns - (ink * columns).sum() / ink.sum()
    return float(-(ink * rows * columns).sum() / (ink * rows**2).sum())


def test_it_says_where_the_seconds_went(worker: Worker) -> None:
    lines = worker.log()
    assert lines[0]["event"] == "start"
    phases = {line["phase"]: line["seconds"] for line in lines if line["event"] == "phase"}
    assert list(phases)[:4] == ["start", "import", "load", "warm"]
    assert phases["import"] > 0
    ready = next(line for line in lines if line["event"] == "ready")
    assert lines[0]["up_s"] + phases["import"] <= ready["up_s"], "the first line comes before the imports"
    assert (ready["pipeline"], ready["loras"]) == ("StableDiffusionPipeline", ["team/italic"])
    assert ready["options"] == ["guidance", "height", "lora", "steps", "width"]


def test_a_seed_is_a_picture(worker: Worker) -> None:
    seven = worker.draw(prompt="a handwritten seven", seed=1)
    assert worker.draw(prompt="a handwritten seven", seed=1) == seven
    assert worker.draw(prompt="a handwritten seven", seed=2) != seven
    assert worker.draw(prompt="a handwritten two", seed=1) != seven
    assert worker.draw(prompt="a handwritten seven", seed=1, steps=2) != seven


def test_the_adapter_changes_the_look_and_does_not_leak(worker: Worker) -> None:
    italic = {"name": "team/italic", "scale": 1.0}
    pairs = [
        (worker.draw(prompt=prompt, seed=5), worker.draw(prompt=prompt, seed=5, lora=italic))
        for prompt in ("one", "three", "six", "eight")
    ]
    leans = [leaning(with_adapter) - leaning(plain) for plain, with_adapter in pairs]
    assert sum(leans) / len(leans) > 0.25, leans
    assert worker.draw(prompt="eight", seed=5) == pairs[-1][0]
    assert worker.draw(prompt="eight", seed=5, lora=italic | {"scale": 0.5}) not in pairs[-1]


def test_another_size(worker: Worker) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(worker.draw(prompt="one", seed=1, width=160, height=128, steps=2))) as picture:
        assert picture.size == (160, 128)


def test_progress_and_cancellation_within_one_step(worker: Worker) -> None:
    async def body(client: Client) -> list[tuple[str, Any]]:
        seen = []
        async for name, data in client.events({"prompt": "nine", "steps": 200}, x_fal_request_id="long"):
            seen.append((name, data))
            if (name, data) == ("step", {"i": 3, "n": 200}):
                assert (await client.post("/cancel/long"))[0] == 202
        return seen

    seen = worker.ask(body)
    assert [data["i"] for name, data in seen if name == "step"][:3] == [1, 2, 3]
    assert (seen[-1][0], seen[-1][1]["code"]) == ("error", "CANCELLED")
    ended = next(line for line in worker.log() if line.get("request_id") == "long")
    assert ended["outcome"] == "cancelled"
    assert ended["steps"] < 150, "it went on for much longer than it takes to send a request"
    worker.draw(prompt="nine", seed=1)


def test_a_bad_request_is_refused_and_the_next_one_served(worker: Worker) -> None:
    async def body(client: Client) -> None:
        status, answer, _ = await client.post("/infer", {"prompt": "nine", "width": 100})
        assert (status, answer["error"]["field"], answer["error"]["remedy"]) == (400, "width", "Use 96, for instance.")
        status, answer, _ = await client.post("/infer", {"prompt": "nine", "lora": {"name": "oil"}})
        assert (status, answer["error"]["remedy"]) == (400, "Loaded: team/italic.")

    worker.ask(body)
    worker.draw(prompt="any words at all, even ünknown ones: 9 🎨" * 20, seed=1)


def test_another_model_and_a_lora_come_and_go_while_it_serves(worker: Worker) -> None:
    async def change(client: Client, verb: str, **body: Any) -> dict[str, Any]:
        status, answer, _ = await client.post(f"/{verb}", body, x_fal_control="1")
        assert status == 200, answer
        return {one["model"]: one for one in answer["resident"]}

    async def draw(client: Client, model: str, **body: Any) -> bytes:
        status, png, _ = await client.post("/infer", {"prompt": "six", "seed": 5, **body}, x_fal_model=model)
        assert status == 200, png
        return bytes(png)

    async def body(client: Client) -> None:
        before = await draw(client, "")
        loaded = await change(client, "load", model="team/twin", path=str(MODELS / "digits"))
        assert loaded["team/twin"]["bytes"] > 1_000_000
        assert await draw(client, "team/twin") == before, "the same weights and seed"
        lora = {"name": "slanted", "path": str(MODELS / "digits-lora")}
        loaded = await change(client, "load", model="team/twin", lora=lora)
        assert (loaded["team/twin"]["loras"], loaded[""]["loras"]) == (["slanted"], ["team/italic"])
        own = await draw(client, "team/twin", lora={"name": "slanted"})
        assert own == await draw(client, "", lora={"name": "team/italic"})
        assert await draw(client, "team/twin") == before, "without asking for it, it does not act"
        loaded = await change(client, "unload", model="team/twin", lora={"name": "slanted"})
        assert loaded["team/twin"]["loras"] == []
        status, _, _ = await client.post("/load", {"model": "team/none", "path": "/nowhere"}, x_fal_control="1")
        assert status == 404
        assert list(await change(client, "unload", model="team/twin")) == [""]
        assert await draw(client, "") == before

    worker.ask(body)


def test_sigterm_ends_it_cleanly(worker: Worker) -> None:
    """Last in this file: it stops the module's worker."""

    async def body(client: Client) -> list[str]:
        names = []
        async for name, _ in client.events({"prompt": "four", "steps": 20}):
            if not names:
                worker.process.send_signal(signal.SIGTERM)
            names.append(name)
        return names

    assert worker.ask(body)[-2:] == ["output", "completed"]
    assert worker.process.wait(60) == 0
    assert worker.log()[-1]["event"] == "stopped"


# What needs the libraries and no server of its own, in one process, for importing them is most of the work: folders
# that do not load (each in a fork that becomes a worker), another stock pipeline, of another shape (two text encoders),
# with weights that mean nothing, and the classifier's opinion of pictures with and without the adapter.
ATELIER = """
import json, os, sys
from pathlib import Path
models, folder, *damaged = sys.argv[1:]
sys.path.insert(0, models)
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from fal_runtime.worker import __main__ as worker

failures = {}
for name in damaged:
    said = os.path.join(folder, "stderr")
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), 2)
        sys.argv = ["worker", "--model", os.path.join(folder, name), "--socket", os.path.join(folder, "s")]
        worker.main()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    failures[name] = [code, Path(said).read_text()]

digits = os.path.join(models, "digits")
text = CLIPTextModel.from_pretrained(digits, subfolder="text_encoder")
config = CLIPTextConfig.from_pretrained(digits, subfolder="text_encoder", projection_dim=32)
tokenizer = CLIPTokenizer.from_pretrained(digits, subfolder="tokenizer")
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=32 + 6 * 8, cross_attention_dim=2 * config.hidden_size,
)
StableDiffusionXLPipeline(
    vae=AutoencoderKL.from_pretrained(digits, subfolder="vae"), text_encoder=text, tokenizer=tokenizer,
    text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer, unet=unet,
    scheduler=EulerDiscreteScheduler(), add_watermarker=False,
).save_pretrained(os.path.join(folder, "sdxl"))

import score_digits
engine = score_digits.load_engine(Path(digits), Path(models, "digits-lora"), threads=1)
defaults = json.loads(Path(digits, "fal.json").read_bytes())
options = {"steps": defaults["steps"], "guidance": defaults["guidance"]}
scores = {
    look: score_digits.score(engine, range(10), range(2), lora=look == "italic", **options)["report"]
    for look in ("upright", "italic")
}
print(json.dumps({"failures": failures, "scores": scores, "held_out": score_digits.held_out_accuracy()}))
"""


@pytest.fixture(scope="module")
def atelier(tmp_path_factory: pytest.TempPathFactory) -> Atelier:
    folder = tmp_path_factory.mktemp("a")
    for name in DAMAGES:
        model = folder / name
        shutil.copytree(MODELS / "digits", model)
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        if name == "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif name == "no index":
            (model / "model_index.json").unlink()
        else:
            weights.rename(weights.with_suffix(".bin"))
    command = [sys.executable, "-c", ATELIER, str(MODELS), str(folder), *DAMAGES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return Atelier(folder, **json.loads(done.stdout.splitlines()[-1]))


def test_another_stock_pipeline(atelier: Atelier, tmp_path_factory: pytest.TempPathFactory) -> None:
    async def body(client: Client) -> list[tuple[str, Any]]:
        return [event async for event in client.events({"prompt": "x", "seed": 1, "steps": 3})]

    with serving(tmp_path_factory.mktemp("w"), atelier.folder / "sdxl") as started:
        seen = started.ask(body)
    assert [data for name, data in seen if name == "step"] == [{"i": i, "n": 3} for i in (1, 2, 3)]
    assert [(data["width"], data["height"]) for name, data in seen if name == "output"] == [(128, 128)]
    ready = next(line for line in started.log() if line["event"] == "ready")
    assert ready["pipeline"] == "StableDiffusionXLPipeline"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_does_not_load_exits_3_with_one_line(atelier: Atelier, damage: str) -> None:
    code, stderr = atelier.failures[damage]
    assert code == EXIT_LOAD_FAILED
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(atelier.folder / damage) in errors[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("look", ["upright", "italic"])
def test_an_independent_classifier_names_the_digits_right(atelier: Atelier, look: str) -> None:
    report = atelier.scores[look]
    assert report["of"] == 20
    assert report["right"] >= 18, report
    assert atelier.held_out > 0.9
