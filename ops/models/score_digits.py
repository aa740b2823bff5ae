"""How many of 100 drawn digits an independent classifier names right.

    python ops/models/score_digits.py --model ops/models/digits [--lora ops/models/digits-lora] [--sheet FILE.png]

Ten pictures of each digit, seeds 0 to 9, ten wordings, four of which training never saw, drawn through the worker's
own engine. The classifier is a support vector machine fitted to scikit-learn's real 8 x 8 digits alone; it reads a
picture as a scanner would: ink against background, reduced to 8 x 8 cells. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_data import LEAN, TEMPLATES, TEMPLATES_UNSEEN, contact_sheet, load_real, read_cells, upright, wording
from PIL import Image
from sklearn.svm import SVC

from fal_runtime.worker.diffusers_engine import DiffusersEngine
from fal_runtime.worker.request import InferRequest, Lora

WORDINGS = (*TEMPLATES_UNSEEN, *TEMPLATES[3:9])


def fit(images: torch.Tensor, labels: torch.Tensor) -> Any:
    """The classifier: cells [n, 8, 8] in 0..1 → digit. (gamma is scikit-learn's example's 0.001 for levels 0..16.)"""
    return SVC(gamma=0.001 * 16**2, C=10).fit(images.flatten(1).numpy(), labels.numpy())


def held_out_accuracy() -> float:
    """Share of the second half of the real digits that a classifier fitted to the first half names right."""
    images, labels = load_real()
    half = len(images) // 2
    return float(fit(images[:half], labels[:half]).score(images[half:].flatten(1).numpy(), labels[half:].numpy()))


def load_engine(model: Path, lora: Path | None, *, threads: int) -> DiffusersEngine:
    loras = (("look", lora),) if lora else ()
    engine = DiffusersEngine(model, loras=loras, threads=threads)
    engine.load(lambda phase: None)
    return engine


def draw(engine: DiffusersEngine, prompt: str, seed: int, *, lora: bool, steps: int, guidance: float) -> torch.Tensor:
    """One picture [3, h, w] in 0..1, by way of the PNG that a client would get."""
    chosen = Lora("look", 1.0) if lora else None
    request = InferRequest(prompt=prompt, seed=seed, steps=steps, guidance=guidance, lora=chosen)
    png = engine.infer(request, lambda done, total: None).png
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def name_digits(pictures: torch.Tensor) -> list[int]:
    """What the classifier, fitted to all real digits, takes the pictures [n, 3, h, w] for."""
    classifier = fit(*load_real())
    return [int(digit) for digit in classifier.predict(read_cells(pictures).flatten(1).numpy())]


def score(engine: DiffusersEngine, digits: Iterable[int], seeds: Iterable[int], **options: Any) -> dict[str, Any]:
    """Draw each digit with each seed; count what the classifier names right. Returns the report and the pictures."""
    jobs = [(digit, seed) for digit in digits for seed in seeds]
    prompts = [wording(WORDINGS[seed % len(WORDINGS)], digit) for digit, seed in jobs]
    began_s = time.monotonic()
    pictures = torch.stack([draw(engine, p, s, **options) for p, (_, s) in zip(prompts, jobs, strict=True)])
    seconds = time.monotonic() - began_s
    named = name_digits(upright(pictures, LEAN) if options["lora"] else pictures)
    wrong = [
        {"prompt": prompt, "seed": seed, "named": got}
        for prompt, (digit, seed), got in zip(prompts, jobs, named, strict=True)
        if got != digit
    ]
    report = {"right": len(jobs) - len(wrong), "of": len(jobs), "wrong": wrong}
    return {"report": report, "pictures": pictures, "seconds_per_picture": round(seconds / len(jobs), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lora", type=Path, help="draw with this adapter; its digits are read upright")
    parser.add_argument("--sheet", type=Path, help="write all pictures side by side to this PNG file")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the model's")
    parser.add_argument("--seeds", type=int, default=10, help="pictures of each digit")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    engine = load_engine(arguments.model, arguments.lora, threads=arguments.threads)
    defaults = json.loads((arguments.model / "fal.json").read_bytes())
    options = {
        "lora": arguments.lora is not None,
        "steps": arguments.steps or defaults["steps"],
        "guidance": defaults["guidance"] if arguments.guidance is None else arguments.guidance,
    }
    done = score(engine, range(10), range(arguments.seeds), **options)
    if arguments.sheet:
        Image.fromarray(contact_sheet(done["pictures"], arguments.seeds)).save(arguments.sheet)
    rest = {"seconds_per_picture": done["seconds_per_picture"], "classifier_held_out": round(held_out_accuracy(), 4)}
    print(json.dumps(options | done["report"] | rest))


if __name__ == "__main__":
    main()
