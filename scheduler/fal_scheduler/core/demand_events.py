"""What gateways ask for, as news for the core. Pure.

Made by `fal_scheduler.demand_teller` from the streams of gateways; taken in by `core.demand`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AppDemand:
    """One gateway's demand for one app, model and LoRA.

    `in_flight`: slots that it holds for the app, told with the first demand of an app, 0 with its others; `queued`:
    requests that wait for a slot, the oldest since `oldest_age_ms`; `arrived`: requests that came since the last word.
    """

    app: str
    model: str = ""
    lora: str = ""
    in_flight: int = 0
    queued: int = 0
    oldest_age_ms: int = 0
    priority: int = 0
    arrived: int = 0


@dataclass(frozen=True, slots=True)
class DemandTold:
    """Everything that a gateway asks for now; apps left out are asked for no more. `arrived_s`: monotonic."""

    gateway_id: str
    demands: tuple[AppDemand, ...]
    arrived_s: float


__all__ = ["AppDemand", "DemandTold"]
