"""Train the small text-to-image pipeline `digits/` and its LoRA `digits-lora/` from scikit-learn's digits.

    OMP_NUM_THREADS=1 python ops/models/train_digits.py --out ops/models --work /tmp/digits-work

Five phases, in order: `vae` (picture 128 x 128 → latent 8 x 8 x 4), `decoder` (its second half once more), `unet`
(tokenizer, text encoder and denoiser, on the "paper" look), `export` (a stock `StableDiffusionPipeline` folder) and
`lora` (a low-rank adapter of the denoiser for italic digits). Seeded: step k draws the same batch in every run.
Resumable: each phase saves its state to `--work` every 50 steps, and a second start goes on from there. The seconds
each phase took are printed and written to `training.json` beside the pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from digits_data import (
    FILLERS,
    LEAN,
    TEMPLATES,
    lean,
    load_real,
    paint,
    random_affine,
    random_prompt,
    strokes,
    wording,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional
from training_run import SEED, Run, generator_at, keep_memory, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPT_TOKENS_MAX = 77  # CLIP's
TRAIN_TIMESTEPS = 1000
STEPS = {"vae": 400, "decoder": 600, "unet": 1000, "lora": 200}
BATCH = {"vae": 8, "decoder": 8, "unet": 48, "lora": 48}
VARIANTS = 3  # differently slanted and turned copies of each real digit
LORA_RANK = 4
LORA_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"]
DEFAULTS = {"steps": 12, "guidance": 3.0}  # what the worker uses where a request says nothing


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 24, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
    )


def make_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=text_width,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS_MAX,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's format: all 256 bytes, and one token for each word of the training prompts."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    prompts = [wording(template, digit) for template in TEMPLATES for digit in range(10)]
    for word in dict.fromkeys(" ".join([*prompts, *FILLERS]).split()):
        if not word.isalpha():
            continue
        left = word[0] if len(word) > 1 else word + "</w>"
        for at, letter in enumerate(word[1:], start=2):
            right = letter + ("</w>" if at == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS_MAX)


def train_vae(run: Run) -> AutoencoderKL:
    """Pictures in every look ↔ latents; afterwards the "paper" latents have mean 0 and deviation 1 per channel."""
    vae = make_vae()
    cells, _ = load_real()

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(cells), (BATCH["vae"],), generator=generator)
        weight = strokes(cells[chosen], random_affine(len(chosen), generator))
        looks = torch.randint(20, (len(chosen),), generator=generator).tolist()
        names = ["paper" if n < 10 else "neon" if n < 17 else "chalk" for n in looks]
        pictures = torch.cat([paint(w[None], look) for w, look in zip(weight, names, strict=True)]) * 2 - 1
        latents = vae.encode(pictures).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator)
        seen = vae.decode(latents.mean + latents.std * noise).sample
        return (
            functional.l1_loss(seen, pictures) + functional.mse_loss(seen, pictures) + 2e-3 * latents.kl().mean() / 256
        )

    train(run, "vae", {"vae": vae}, loss_at, rate=3e-3, average=0.98)
    with torch.no_grad():
        pictures = paint(strokes(cells[:256]), "paper") * 2 - 1
        latents = vae.encode(pictures).latent_dist.mean
        whiten(vae, mean=latents.mean(dim=(0, 2, 3)), deviation=latents.std(dim=(0, 2, 3)))
        error = functional.l1_loss(vae.decode(vae.encode(pictures).latent_dist.mean).sample, pictures)
    print(
        f"vae: deviation {latents.std(dim=(0, 2, 3)).tolist()}, error {error.item() / 2:.4f} of the range", flush=True
    )
    return vae.eval().requires_grad_(False)


def train_decoder(run: Run, vae: AutoencoderKL) -> None:
    """Go on with the decoder alone, on the two looks that are drawn: the latents stay what they are."""
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    cells, _ = load_real()

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(cells), (BATCH["decoder"],), generator=generator)
        weight = strokes(cells[chosen], random_affine(len(chosen), generator))
        half = len(chosen) // 2
        pictures = torch.cat([paint(weight[:half], "paper"), paint(weight[half:], "neon")]) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean
        # A denoised latent is never exact: the decoder must forgive as much.
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        seen = vae.decode(latents).sample
        return functional.l1_loss(seen, pictures) + functional.mse_loss(seen, pictures)

    train(run, "decoder", {"vae": vae}, loss_at, rate=2e-3, average=0.98)
    vae.requires_grad_(False)


def whiten(vae: AutoencoderKL, *, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Fold `(z - mean) / deviation` into the 1 x 1 convolutions around the latent, so that pipelines need not know."""
    channels = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(dim=1)
    out_of.weight *= deviation.view(1, -1, 1, 1)


def encode_all(vae: AutoencoderKL, variants: int, *, leaning: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n, 4, 8, 8] of `variants` copies of each real digit on paper, and their labels [n]."""
    cells, labels = load_real()
    parts = []
    with torch.no_grad():
        for variant in range(variants):
            affine = lean(random_affine(len(cells), generator_at("variants", variant)), leaning)
            for chunk, turned in zip(cells.split(64), affine.split(64), strict=True):
                parts.append(vae.encode(paint(strokes(chunk, turned), "paper") * 2 - 1).latent_dist.mean)
    return torch.cat(parts), labels.repeat(variants)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        clip_sample=False,
    )


@dataclass
class Denoiser:
    """The parts that turn a prompt and noise into a latent, and their loss."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def loss(self, latents: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the predicted velocity for a random batch; one prompt in ten is left empty."""
        chosen = torch.randint(len(latents), (size,), generator=generator)
        clean = latents[chosen]
        prompts = [random_prompt(int(label), generator) for label in labels[chosen]]
        dropped = torch.rand(size, generator=generator) < 0.1
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=PROMPT_TOKENS_MAX, truncation=True, return_tensors="pt"
        )
        states = self.text_encoder(tokens.input_ids)[0]
        times = torch.randint(TRAIN_TIMESTEPS, (size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = self.scheduler.add_noise(clean, noise, times)
        velocity = self.scheduler.get_velocity(clean, noise, times)
        return functional.mse_loss(self.unet(noisy, times, states).sample, velocity)


def train_unet(run: Run, vae: AutoencoderKL) -> Denoiser:
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    denoiser = Denoiser(tokenizer, text_encoder, make_unet(48), make_scheduler())
    latents, labels = encode_all(vae, VARIANTS, leaning=0.0)
    train(
        run,
        "unet",
        {"text_encoder": text_encoder, "unet": denoiser.unet},
        lambda generator: denoiser.loss(latents, labels, BATCH["unet"], generator),
        rate=2e-3,
        average=0.995,
    )
    return denoiser


def train_lora(run: Run, vae: AutoencoderKL, denoiser: Denoiser, out: Path) -> None:
    """Low-rank updates of the frozen denoiser for italic digits, saved in diffusers' LoRA format."""
    denoiser.text_encoder.requires_grad_(False)
    denoiser.unet.requires_grad_(False)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_MODULES, init_lora_weights="gaussian")
    denoiser.unet.add_adapter(config)
    latents, labels = encode_all(vae, 1, leaning=LEAN)
    train(
        run,
        "lora",
        {"unet": denoiser.unet},
        lambda generator: denoiser.loss(latents, labels, BATCH["lora"], generator),
        rate=1e-3,
        average=0.97,
    )
    StableDiffusionPipeline.save_lora_weights(
        out, unet_lora_layers=get_peft_model_state_dict(denoiser.unet), safe_serialization=True
    )


def export(vae: AutoencoderKL, denoiser: Denoiser, out: Path) -> None:
    """Write the folder that `DiffusionPipeline.from_pretrained` loads with stock classes only."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet,
        scheduler=denoiser.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    (out / "fal.json").write_text(json.dumps(DEFAULTS) + "\n")


def phases(run: Run, out: Path) -> Iterator[tuple[str, Any]]:
    """Run all phases in order; yields each phase's name as it ends."""
    torch.manual_seed(SEED)
    vae = train_vae(run)
    yield "vae", vae
    train_decoder(run, vae)
    yield "decoder", vae
    torch.manual_seed(SEED + 1)
    denoiser = train_unet(run, vae)
    yield "unet", denoiser
    export(vae, denoiser, out / "digits")
    yield "export", out / "digits"
    torch.manual_seed(SEED + 2)
    train_lora(run, vae, denoiser, out / "digits-lora")
    yield "lora", out / "digits-lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets digits/ and digits-lora/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of an interrupted run")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of steps (to try things)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(arguments.threads)
    keep_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.work, {phase: max(2, round(full * arguments.share)) for phase, full in STEPS.items()})
    began_s = time.monotonic()
    for phase, _ in phases(run, arguments.out):
        print(f"{phase}: done after {time.monotonic() - began_s:.0f} s", flush=True)
    report = {
        "seconds": run.seconds,
        "seconds_total": round(sum(run.seconds.values()), 1),
        "steps": run.totals,
        "threads": arguments.threads,
        "seed": SEED,
        "torch": torch.__version__,
    }
    (arguments.out / "digits" / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
