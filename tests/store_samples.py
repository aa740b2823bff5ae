"""Records of each kind, as releases stored them, and how the files `tests/data/store/*/store.sqlite` were made of them.

A file is recorded once, by `python tests/store_samples.py FOLDER FILE`, and is never made anew: a later release must
read what an earlier one wrote. For a new format, kind or record version, record a new file in a folder of its own.
`v1`: release 0.1. `v1-weights`: models with artifacts, wishes, entries of the compile cache, specs that stream.
`v1-caches`: a build task of the compile cache, an app that names entries. `v1-images`: a task that packs an image, an
image, a secret, an app with image, network, port and bounds of drivers and resources. `v1-learnt`: a shard of what was
learnt of starts. `v1-operated`: a node that is drained, a quota, a rollout, shares of GPUs, rules of placement, usage.
`v1-shared`: a runner that two apps share, one with a LoRA.
`v1-rebooted`: a node that was told to reboot. `v1-noticed`: a node that is drained while its cloud takes it back, and a
rollout that has come some way.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from fal_scheduler.codec import encode
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    BuildTask,
    CacheEntry,
    Drain,
    Goal,
    ImageFacts,
    Meta,
    Model,
    ModelState,
    Node,
    PlacementRules,
    Pool,
    Probe,
    Quota,
    Record,
    Residency,
    Resources,
    Revision,
    Revocation,
    Rollout,
    RolloutPolicy,
    Runner,
    ScaleOverride,
    Scaling,
    Secret,
    Spec,
    Usage,
    UsageDay,
    Wish,
    key_of,
)
from fal_scheduler.core.tokens import JoinToken
from fal_scheduler.core.usage_records import UsageRow
from fal_scheduler.store.interface import Write
from fal_scheduler.store.sqlite import SqliteStore

MADE_AT_S: Final = 1_700_000_000.0
SPEC: Final = Spec(
    image="host",
    command=("serve", "--x"),
    env={"A": "b"},
    model="team1/digits-model",
    loras=("team1/ink",),
    machine_type=("H100-80GB", "A100-80GB"),
    num_gpus=2,
    gpu_memory_bytes_min=40 << 30,
    resources=Resources(cpu_milli=4000, memory_bytes=8 << 30, pids_max=512, shm_bytes=1 << 30),
    pools=("metal",),
    labels={"disk": "nvme"},
    network="egress",
    scaling=Scaling(
        keep_alive_s=10.0,
        min_concurrency=1,
        max_concurrency=4,
        concurrency_buffer=1,
        concurrency_buffer_perc=20,
        scaling_delay_s=0.5,
        max_multiplexing=2,
        request_timeout_s=60.0,
        startup_timeout_s=300.0,
    ),
    probe=Probe(ready_path="/r", live_path="/l", interval_s=1.0, timeout_s=2.0, failures_max=4),
    termination_grace_s=7.5,
    share_group="shared",
)
RECORDS: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S, ("c-other",)),
    Pool(
        name="metal",
        cloud="metal",
        region="eu",
        zone="room1",
        gpu_hour_price_micros=2_500_000,
        egress_gib_price_micros=90_000,
        networks=("lan", "wan"),
        spot=True,
        cache_bytes=1 << 40,
        trusted_network=True,
        labels={"tier": "gold"},
        generation=4,
    ),
    Node(
        "n-4f7a20c1d9e8",
        "rack1-node3",
        "metal",
        cordoned=True,
        cordon_reason="fan",
        labels={"disk": "nvme"},
        joined_at_s=MADE_AT_S,
        token_id="tk1",
    ),
    JoinToken(
        id="tk1",
        secret_sha256=bytes(range(32)),
        pool="metal",
        expires_at_s=1_800_000_000.0,
        uses_left=7,
        revoked=False,
        created_by="admin/ada",
        created_at_s=MADE_AT_S,
    ),
    Revocation("0fa3", "node/n-4f7a20c1d9e8", MADE_AT_S, "stolen"),
    App("team1/digits", 3, ScaleOverride(min_concurrency=0, keep_alive_s=30.5), generation=9, created_at_s=MADE_AT_S),
    Revision("team1/digits", 3, SPEC, "ab" * 32, MADE_AT_S, "operator/bob"),
    Model(
        id="team1/digits-model",
        kind="model",
        uri="file:///srv/digits",
        state=ModelState.ATTESTED,
        manifest_digest="cd" * 32,
        bytes=5_000_000,
        files=7,
        created_at_s=MADE_AT_S,
        revision="main",
    ),
    Model("team1/ink", "lora", "file:///srv/ink", ModelState.REFUSED, created_at_s=MADE_AT_S, reason="a pickle"),
    Runner(
        id="team1/digits-7k2m9q4c",
        share_group="shared",
        bindings=(Binding("team1/digits", 3, "main"),),
        created_at_s=MADE_AT_S,
        node="n-4f7a20c1d9e8",
        gpus=("GPU-1", "GPU-2"),
        assignment=AssignmentRef("a1b2c3d4", 5),
        residencies=(Residency("main", "team1/digits-model", "cd" * 32),),
        goal=Goal.DRAIN,
        goal_reason="replaced by revision 4",
        memory_bytes=8 << 30,
        cpu_milli=4000,
    ),
)


WEIGHTS: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    App("team1/digits", 3, created_at_s=MADE_AT_S),
    Revision("team1/digits", 3, replace(SPEC, stream_weights=True, allow_provisional=True), "ab" * 32, MADE_AT_S),
    Model(
        id="team1/digits-model",
        kind="model",
        uri="hf://org/digits",
        state=ModelState.ATTESTED,
        manifest_digest="cd" * 32,
        bytes=5_000_000,
        files=7,
        created_at_s=MADE_AT_S,
        revision="main",
        artifact_id="ef" * 32,
        resolved_uri="hf://org/digits@0123abcd",
        attestation="digests",
        attested_by="n-4f7a20c1d9e8",
        allow_pickle=True,
    ),
    Model(
        "team1/ink",
        "lora",
        "s3://b/ink",
        ModelState.REVOKED,
        created_at_s=MADE_AT_S,
        reason="licence ended",
        artifact_id="12" * 32,
        resolved_uri="s3://b/ink",
    ),
    Wish("team1/digits-model", "pool/metal", 0, "memory", 1_800_000_000.0, "operator/ada", MADE_AT_S),
    Wish("team1/digits-model", "replicas", 3, created_by="operator/ada", created_at_s=MADE_AT_S),
    CacheEntry(
        namespace="team/team1",
        key="34" * 32,
        model="team1/cache-34",
        manifest_digest="56" * 32,
        bytes=1 << 30,
        task="team1/build-1",
        created_at_s=MADE_AT_S,
        signature=b"der",
        facts={"gpu": "H100-80GB", "torch": "2.13.0"},
    ),
)
BUILD: Final = BuildTask("cluster", "34" * 32, 4 << 30, {"gpu_name": "NVIDIA H100", "torch": "2.13.0"})
CACHES: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    App("system/build-343434343434-7k2m9q4c", 1, created_at_s=MADE_AT_S),
    Revision(
        "system/build-343434343434-7k2m9q4c",
        1,
        Spec("host", ("python3", "-m", "compile"), num_gpus=1, scaling=Scaling(min_concurrency=1), build=BUILD),
        "34" * 32,
        MADE_AT_S,
        "operator/ada",
    ),
    Runner(
        "system/build-343434343434-7k2m9q4c-1a2b3c4d",
        "system/build-343434343434-7k2m9q4c",
        (Binding("system/build-343434343434-7k2m9q4c", 1),),
        MADE_AT_S,
    ),
    App("team1/digits", 1, created_at_s=MADE_AT_S),
    Revision("team1/digits", 1, Spec("host", ("serve",), compile_caches=("34" * 32, "56" * 32)), "ab" * 32, MADE_AT_S),
)
PACK: Final = BuildTask(
    "image", "78" * 32, 64 << 30, image="team1/web-2", source="docker://registry:5000/team/web:2",
    auth_secret="registry", platform="linux/amd64",
)  # fmt: skip
IMAGES: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    Secret("team1/registry", b"nonce and ciphertext", 2, MADE_AT_S, MADE_AT_S + 60, "operator/ada", 52),
    Model(
        "team1/web", "image", "docker://registry:5000/team/web:1", ModelState.ATTESTED, "56" * 32, 200 << 20, 2,
        MADE_AT_S, artifact_id="9a" * 32, resolved_uri="push://ingest", attestation="pack",
        attested_by="n-7k2m9q4c0000",
        image=ImageFacts(
            "docker://registry:5000/team/web:1", "sha256:" + "bc" * 32, "erofs", "linux/amd64", (0, 7, 3), 90 << 20
        ),
    ),
    App("system/pack-787878787878-7k2m9q4c", 1, generation=2, created_at_s=MADE_AT_S),
    Revision(
        "system/pack-787878787878-7k2m9q4c", 1, Spec("host", network="host", build=PACK), "78" * 32, MADE_AT_S,
        "operator/ada",
    ),
    Runner(
        "system/pack-787878787878-7k2m9q4c-1a2b3c4d", "system/pack-787878787878-7k2m9q4c",
        (Binding("system/pack-787878787878-7k2m9q4c", 1),), MADE_AT_S,
    ),
    App("team1/site", 1, created_at_s=MADE_AT_S),
    Revision(
        "team1/site",
        1,
        Spec(
            "team1/web", ("serve",), resources=Resources(1000, 1 << 30, 64, 0, 1024, 1 << 20, 50 << 20, 0),
            network="egress", port=8080, driver_version_min="550.54", cuda_version_min="12.4",
            egress_allow=("10.0.0.0/8",), egress_deny=("10.9.0.0/16",), secrets=("registry",),
        ),
        "de" * 32,
        MADE_AT_S,
    ),
)  # fmt: skip
LEARNT: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    Learnt(
        "07",
        MADE_AT_S,
        (("rest", (0, 120, 1_700_000_000)), ("rest|node/n-4f7a20c1d9e8", (1_700_000_000, 950, 1100))),
    ),
)
OPERATED: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    Pool("spot", zone="room2", spot=True, generation=3, reclaim_per_hour_ppm=50_000, lost_declared_at_s=MADE_AT_S),
    Node(
        "n-4f7a20c1d9e8", "rack1-node3", "spot", cordoned=True, cordon_reason="fan", joined_at_s=MADE_AT_S,
        drain=Drain("maintenance", "fan", MADE_AT_S, MADE_AT_S + 3600.0, True, True, "operator/ada"),
        quarantined_gpus={"GPU-1": "falls off the bus"},
    ),
    Quota("team1", 8000, borrow=False, generation=2),
    App(
        "team1/canary", 2,
        ScaleOverride(0, 8, 30.5, 1, 20, 0.5, 60.0, 2), generation=9, created_at_s=MADE_AT_S,
        rollout=Rollout(1, 2, "canary", True, "exit code 1", MADE_AT_S, MADE_AT_S + 9.0, 1, 25),
    ),
    Revision(
        "team1/canary",
        2,
        Spec(
            "host", ("serve",), num_gpus=1, gpu_milli=250, priority=-20, scaling=Scaling(forecast_concurrency=2),
            placement=PlacementRules(
                {"disk": "nvme"}, ("team1/a",), ("team1/b",), ("team1/c",), ("team1/d",), "domain", "nvlink", 5000
            ),
            rollout=RolloutPolicy("", 25, 50, True, 600.0, 300.0),
        ),
        "ef" * 32,
        MADE_AT_S,
    ),
    Revision("team1/canary", 1, Spec("host", ("serve",), num_gpus=1, mig_profile="1g.10gb"), "fe" * 32, MADE_AT_S),
    Runner(
        "team1/canary-7k2m9q4c", "team1/canary", (Binding("team1/canary", 2),), MADE_AT_S, "n-4f7a20c1d9e8", ("GPU-2",),
        AssignmentRef("a1b2c3d4", 5, 17), gpu_milli=250, priority=-20,
    ),
    Usage(
        "a0", "team1/canary", 1, "team1/canary-1a2b3c4d", "spot", "n-4f7a20c1d9e8", "H100-80GB", 2, 0, MADE_AT_S,
        MADE_AT_S + 90.5, 181_000, 60_000, 12, 2_500_000, True,
    ),
    UsageDay("2023-11-14", 0, (UsageRow("team1/canary", "spot", "H100-80GB", 181_000, 60_000, 12, 125_694, 1),)),
)  # fmt: skip
REBOOTED: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    Pool("p", generation=1),
    Node(
        "n-4f7a20c1d9e8", "rack1-node3", "p", cordoned=True, cordon_reason="reboot by an operator",
        joined_at_s=MADE_AT_S,
        drain=Drain("reboot", "", MADE_AT_S, 0.0, False, True, "operator/ada", "0c3a6f3e-2f0a-4f6e-8d8b-6f6a1f3b2c1d"),
    ),
)  # fmt: skip
NOTICED: Final[tuple[Record, ...]] = (
    Meta("c-7k2m", 3, "i-9q4c", MADE_AT_S),
    Pool("p", generation=1),
    Node(
        "n-4f7a20c1d9e8", "rack1-node3", "p", cordoned=True, cordon_reason="fan", joined_at_s=MADE_AT_S,
        drain=Drain(
            "drain", "fan", MADE_AT_S, 0.0, False, True, "operator/ada",
            notice="spot", notice_reason="taken back", notice_at_s=MADE_AT_S + 120.0,
        ),
    ),
    App("team1/flux", 2, rollout=Rollout(1, 2, "rolling", began_at_s=MADE_AT_S, progress_at_s=MADE_AT_S + 40.0)),
    *(Revision("team1/flux", number, Spec(image="host", num_gpus=1), f"{number}" * 64) for number in (1, 2)),
)  # fmt: skip
_ATELIER: Final = Spec(image="host", model="team1/base", num_gpus=1, share_group="atelier")
SHARED: Final[tuple[Record, ...]] = (
    *(
        Revision(f"team1/{name}", 1, replace(_ATELIER, loras=loras), "ab" * 32)
        for name, loras in (("plain", ()), ("inked", ("team1/ink",)))
    ),
    App("team1/plain", 1),
    App("team1/inked", 1),
    Model("team1/base", "model", "file:///srv/base", created_at_s=MADE_AT_S),
    Model("team1/ink", "lora", "file:///srv/ink", created_at_s=MADE_AT_S),
    Runner(
        id="team1/plain-7k2m9q4c",
        share_group="atelier",
        bindings=(Binding("team1/plain", 1, "team1/base"), Binding("team1/inked", 1, "team1/base")),
        created_at_s=MADE_AT_S,
        residencies=(
            Residency("team1/base", "team1/base", "cd" * 32),
            Residency("team1/ink@team1/base", "team1/ink", "", "team1/base"),
        ),
    ),
)
SETS: Final[dict[str, tuple[Record, ...]]] = {
    "v1": RECORDS,
    "v1-weights": WEIGHTS,
    "v1-caches": CACHES,
    "v1-images": IMAGES,
    "v1-learnt": LEARNT,
    "v1-operated": OPERATED,
    "v1-rebooted": REBOOTED,
    "v1-noticed": NOTICED,
    "v1-shared": SHARED,
}


async def record(path: Path, records: Sequence[Record] = RECORDS) -> None:
    """Write a store that holds `records`, as a scheduler of term 5 would."""
    store = SqliteStore(path)
    await store.open()
    guard = await store.campaign("sample", term_min=5)
    await store.commit(guard, [Write(key_of(one), encode(one)) for one in records])
    await store.resign(guard)
    await store.close()


if __name__ == "__main__":
    asyncio.run(record(Path(sys.argv[2]), SETS[sys.argv[1]]))
