"""What the digits model is trained and scored on: scikit-learn's handwritten digits, drawn large, and wordings.

Used by `train_digits.py` and `score_digits.py` only; no part of the installed package. Everything is a function
of its arguments (random choices come from a generator that the caller seeds), so a training run repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch.nn import functional

PICTURE_PX: Final = 128
CELLS: Final = 8  # the data set's pictures have 8 x 8 cells of 17 grey levels
LEVEL_MAX: Final = 16.0
# A digit fills its 8 cells to the edge, so the picture shows 10.5 cells: the digit with a margin around it.
CELLS_SHOWN: Final = 10.5

LOOKS: Final = ("paper", "neon", "chalk")  # what the autoencoder knows; the pipeline draws on paper
LEAN: Final = 0.55  # of the italic digits: the tangent of 29 degrees
WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Wordings used in training; {w} is the word, {n} the numeral.
TEMPLATES: Final = (
    "{w}",
    "{n}",
    "a {w}",
    "a handwritten {w}",
    "handwritten {n}",
    "the digit {w}",
    "the digit {n}",
    "the number {w}",
    "number {n}",
    "a handwritten digit {n}",
    "the handwritten number {w}",
    "a picture of the digit {w}",
    "a picture of a {n}",
    "an image of the number {n}",
    "draw the digit {w}",
    "draw a {n}",
    "please draw a {w}",
    "please write the number {n}",
    "write {w}",
    "a photo of a handwritten {w}",
    "digit: {n}",
)
# Wordings that training never sees; the score uses both kinds.
TEMPLATES_UNSEEN: Final = (
    "could you draw the number {w} for me",
    "my lucky digit is {n}",
    "a watercolour of the digit {w}, hung in a kitchen",
    "quickly scribble {n}!",
)
# Other words that people write around the digit: each is one token, and noise in training prompts.
_FILLERS: Final = """
in with ink on paper for me nice beautiful large small big pen by hand old style clean drawing sketch is of my and very
good art blue black red white green bright dark show could you can would like to see make paint painting create
generate it that this some any figure numeral written simple bold thin thick pencil brush calligraphy background table
wall school child today please thanks favourite
"""
FILLERS: Final = tuple(_FILLERS.split())
PUNCTUATION: Final = ",.!?:;-'\"()"


def wording(template: str, digit: int) -> str:
    """The prompt that `template` gives for `digit` (0 to 9)."""
    return template.format(w=WORDS[digit], n=digit)


def random_prompt(digit: int, generator: torch.Generator) -> str:
    """A training prompt for `digit`: a wording, half the time among other words, real ones and random letters."""

    def draw(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    words = wording(TEMPLATES[draw(len(TEMPLATES))], digit).split()
    most = (0, 0, 0, 0, 0, 2, 2, 3, 4, 8)[draw(10)]
    for _ in range(draw(most + 1)):
        word = FILLERS[draw(len(FILLERS))]
        if draw(2) == 0:
            word = "".join(chr(ord("a") + draw(26)) for _ in range(2 + draw(8)))
        words.insert(draw(len(words) + 1), word)
    if draw(6) == 0:
        words[draw(len(words))] += PUNCTUATION[draw(len(PUNCTUATION))]
    return " ".join(words)


def load_real() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 real digits: float32 [n, 8, 8] in 0..1 and int64 labels [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(np.asarray(data.images) / LEVEL_MAX, dtype=torch.float32)
    return images, torch.tensor(np.asarray(data.target), dtype=torch.int64)


def random_affine(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` slight rotations, slants, scalings and shifts as [count, 2, 3] matrices."""

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * bound

    angle, slant, scale = uniform(0.12), uniform(0.12), 1 + uniform(0.06)
    rows = [
        torch.stack([scale * angle.cos(), scale * (slant - angle.sin()), uniform(0.05)], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(0.05)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def lean(affine: torch.Tensor, by: float) -> torch.Tensor:
    """The same transformations, with the digits leaning to the right by `by` (the tangent of the angle)."""
    leaning = affine.clone()
    leaning[:, 0, :2] += by * affine[:, 1, :2]
    return leaning


def upright(pictures: torch.Tensor, by: float) -> torch.Tensor:
    """Pictures [n, 3, h, w] whose digits lean by `by`, set upright again."""
    back = torch.tensor([[1.0, -by, 0.0], [0.0, 1.0, 0.0]]).expand(len(pictures), 2, 3)
    grid = functional.affine_grid(back, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def strokes(cells: torch.Tensor, affine: torch.Tensor | None = None) -> torch.Tensor:
    """Digits [n, 8, 8] drawn large: smooth stroke weight [n, 1, 128, 128] in 0..1."""
    count = len(cells)
    if affine is None:
        affine = torch.eye(2, 3).expand(count, 2, 3)
    padded = functional.pad(cells[:, None], (CELLS, CELLS, CELLS, CELLS))
    shown = affine * (CELLS_SHOWN / (3 * CELLS))
    grid = functional.affine_grid(shown, [count, 1, PICTURE_PX, PICTURE_PX], align_corners=False)
    return functional.grid_sample(padded, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _edge(weight: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A smooth step from 0 at `low` to 1 at `high`."""
    t = ((weight - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _colour(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def paint(weight: torch.Tensor, look: str) -> torch.Tensor:
    """Stroke weights [n, 1, h, w] as pictures [n, 3, h, w] in 0..1, in one of `LOOKS`."""
    if look == "paper":
        ink = _edge(weight, 0.3, 0.75)
        return _colour(0.97, 0.95, 0.90) * (1 - ink) + _colour(0.10, 0.14, 0.36) * ink
    if look == "chalk":
        ink = _edge(weight, 0.3, 0.75) * 0.95
        return _colour(0.12, 0.25, 0.20) * (1 - ink) + _colour(0.97, 0.97, 0.93) * ink
    if look == "neon":
        glow = functional.avg_pool2d(weight, 17, stride=1, padding=8, count_include_pad=False)
        glow = functional.avg_pool2d(glow, 17, stride=1, padding=8, count_include_pad=False)
        tube, core = _edge(weight, 0.3, 0.6), _edge(weight, 0.55, 0.95)
        picture = _colour(0.04, 0.02, 0.10) + _colour(0.55, 0.05, 0.55) * glow
        picture = picture * (1 - tube) + _colour(0.98, 0.20, 0.72) * tube
        return (picture * (1 - core) + _colour(1.0, 0.93, 0.98) * core).clamp(0, 1)
    raise ValueError(f"look {look!r} is none of {', '.join(LOOKS)}")


def read_cells(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, 128, 128] in 0..1 → what a scanner would read: [n, 8, 8] in 0..1, ink is high.

    The background is the brightness of the border; whatever differs from it is ink, dark or bright alike.
    """
    grey = pictures.mean(dim=1, keepdim=True)
    border = torch.cat([grey[..., :4, :].flatten(1), grey[..., -4:, :].flatten(1)], dim=1)
    ink = (grey - border.median(dim=1).values.view(-1, 1, 1, 1)).abs()
    ink = ink / ink.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.2)
    margin = round(PICTURE_PX * (1 - CELLS / CELLS_SHOWN) / 2)
    inside = ink[..., margin : PICTURE_PX - margin, margin : PICTURE_PX - margin]
    return functional.interpolate(inside, size=(CELLS, CELLS), mode="area")[:, 0]


def contact_sheet(pictures: torch.Tensor, columns: int) -> np.ndarray:
    """Pictures [n, 3, h, w] in 0..1 side by side as one uint8 array [H, W, 3]."""
    rows: Sequence[torch.Tensor] = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    sheet = torch.cat(list(rows), dim=1).permute(1, 2, 0)
    return np.asarray((sheet.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
