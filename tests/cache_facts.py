"""What a compile cache's key is made of, for tests."""

from __future__ import annotations

GOOD = {
    "engine_image": "sha256:1f", "torch": "2.13.0", "cuda": "12.8", "triton": "3.4.0", "driver": "570.1",
    "gpu_name": "NVIDIA H100 80GB HBM3", "gpu_capability": "9.0", "component_class": "diffusers.UNet2DConditionModel",
    "component_config": "ab" * 32, "dtype": "bfloat16", "compile_options": "mode=max-autotune", "lora_slot": "none",
}  # fmt: skip
