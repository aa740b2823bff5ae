"""App specs and scaling between records and messages, field by field. Used by `codec` and by the APIs."""

from __future__ import annotations

from fal_contract.v1 import state_pb2 as pb
from fal_scheduler.core.records import (
    BuildTask,
    PlacementRules,
    Probe,
    Resources,
    RolloutPolicy,
    ScaleOverride,
    Scaling,
    Spec,
)


def scale_from_pb(scale: pb.ScaleOverride) -> ScaleOverride:
    """Scaling values from the wire; unset ones are None."""
    return ScaleOverride(
        scale.min_concurrency if scale.HasField("min_concurrency") else None,
        scale.max_concurrency if scale.HasField("max_concurrency") else None,
        scale.keep_alive_s if scale.HasField("keep_alive_s") else None,
        scale.concurrency_buffer if scale.HasField("concurrency_buffer") else None,
        scale.concurrency_buffer_perc if scale.HasField("concurrency_buffer_perc") else None,
        scale.scaling_delay_s if scale.HasField("scaling_delay_s") else None,
        scale.request_timeout_s if scale.HasField("request_timeout_s") else None,
        scale.forecast_concurrency if scale.HasField("forecast_concurrency") else None,
    )


def scale_to_pb(scale: ScaleOverride) -> pb.ScaleOverride:
    """Scaling values for the wire; None stays unset."""
    return pb.ScaleOverride(
        min_concurrency=scale.min_concurrency,
        max_concurrency=scale.max_concurrency,
        keep_alive_s=scale.keep_alive_s,
        concurrency_buffer=scale.concurrency_buffer,
        concurrency_buffer_perc=scale.concurrency_buffer_perc,
        scaling_delay_s=scale.scaling_delay_s,
        request_timeout_s=scale.request_timeout_s,
        forecast_concurrency=scale.forecast_concurrency,
    )


def scaling_to_pb(scaling: Scaling) -> pb.Scaling:
    """Scaling for the wire."""
    return pb.Scaling(
        keep_alive_s=scaling.keep_alive_s,
        min_concurrency=scaling.min_concurrency,
        max_concurrency=scaling.max_concurrency,
        concurrency_buffer=scaling.concurrency_buffer,
        concurrency_buffer_perc=scaling.concurrency_buffer_perc,
        scaling_delay_s=scaling.scaling_delay_s,
        max_multiplexing=scaling.max_multiplexing,
        request_timeout_s=scaling.request_timeout_s,
        startup_timeout_s=scaling.startup_timeout_s,
        forecast_concurrency=scaling.forecast_concurrency,
    )


def _scaling_from_pb(scaling: pb.Scaling) -> Scaling:
    return Scaling(
        keep_alive_s=scaling.keep_alive_s,
        min_concurrency=scaling.min_concurrency,
        max_concurrency=scaling.max_concurrency,
        concurrency_buffer=scaling.concurrency_buffer,
        concurrency_buffer_perc=scaling.concurrency_buffer_perc,
        scaling_delay_s=scaling.scaling_delay_s,
        max_multiplexing=scaling.max_multiplexing,
        request_timeout_s=scaling.request_timeout_s,
        startup_timeout_s=scaling.startup_timeout_s,
        forecast_concurrency=scaling.forecast_concurrency,
    )


def spec_to_pb(spec: Spec) -> pb.AppSpec:
    """A spec for the wire."""
    resources, probe = spec.resources, spec.probe
    return pb.AppSpec(
        image=spec.image,
        command=spec.command,
        env=spec.env,
        model=spec.model,
        loras=spec.loras,
        machine_type=spec.machine_type,
        num_gpus=spec.num_gpus,
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        resources=pb.Resources(
            cpu_milli=resources.cpu_milli,
            memory_bytes=resources.memory_bytes,
            pids_max=resources.pids_max,
            shm_bytes=resources.shm_bytes,
            open_files_max=resources.open_files_max,
            locked_memory_bytes=resources.locked_memory_bytes,
            io_bytes_s=resources.io_bytes_s,
            scratch_bytes=resources.scratch_bytes,
        ),
        pools=spec.pools,
        labels=spec.labels,
        network=spec.network,
        scaling=scaling_to_pb(spec.scaling),
        probe=pb.Probe(
            ready_path=probe.ready_path,
            live_path=probe.live_path,
            interval_s=probe.interval_s,
            timeout_s=probe.timeout_s,
            failures_max=probe.failures_max,
        ),
        termination_grace_s=spec.termination_grace_s,
        share_group=spec.share_group,
        stream_weights=spec.stream_weights,
        allow_provisional=spec.allow_provisional,
        compile_caches=spec.compile_caches,
        build=_task_to_pb(spec.build) if spec.build is not None else None,
        port=spec.port,
        socket=spec.socket,
        driver_version_min=spec.driver_version_min,
        cuda_version_min=spec.cuda_version_min,
        egress_allow=spec.egress_allow,
        egress_deny=spec.egress_deny,
        secrets=spec.secrets,
        gpu_milli=spec.gpu_milli,
        mig_profile=spec.mig_profile,
        priority=spec.priority,
        placement=_placement_to_pb(spec.placement) if spec.placement != PlacementRules() else None,
        rollout=_policy_to_pb(spec.rollout) if spec.rollout != RolloutPolicy() else None,
    )


def spec_from_pb(spec: pb.AppSpec) -> Spec:
    """A spec from the wire; validation is the caller's (`fal_contract.manifest`)."""
    resources, probe = spec.resources, spec.probe
    return Spec(
        image=spec.image,
        command=tuple(spec.command),
        env=dict(spec.env),
        model=spec.model,
        loras=tuple(spec.loras),
        machine_type=tuple(spec.machine_type),
        num_gpus=spec.num_gpus,
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        resources=_resources_from_pb(resources),
        pools=tuple(spec.pools),
        labels=dict(spec.labels),
        network=spec.network,
        scaling=_scaling_from_pb(spec.scaling),
        probe=Probe(probe.ready_path, probe.live_path, probe.interval_s, probe.timeout_s, probe.failures_max),
        termination_grace_s=spec.termination_grace_s,
        share_group=spec.share_group,
        stream_weights=spec.stream_weights,
        allow_provisional=spec.allow_provisional,
        compile_caches=tuple(spec.compile_caches),
        build=_task_from_pb(spec.build) if spec.HasField("build") else None,
        port=spec.port,
        socket=spec.socket,
        driver_version_min=spec.driver_version_min,
        cuda_version_min=spec.cuda_version_min,
        egress_allow=tuple(spec.egress_allow),
        egress_deny=tuple(spec.egress_deny),
        secrets=tuple(spec.secrets),
        gpu_milli=spec.gpu_milli,
        mig_profile=spec.mig_profile,
        priority=spec.priority,
        placement=_placement_from_pb(spec.placement) if spec.HasField("placement") else PlacementRules(),
        rollout=_policy_from_pb(spec.rollout) if spec.HasField("rollout") else RolloutPolicy(),
    )


def _placement_to_pb(rules: PlacementRules) -> pb.PlacementRules:
    return pb.PlacementRules(
        labels_preferred=rules.labels_preferred,
        affinity=rules.affinity,
        affinity_preferred=rules.affinity_preferred,
        anti_affinity=rules.anti_affinity,
        anti_affinity_preferred=rules.anti_affinity_preferred,
        spread=rules.spread,
        gpu_topology=rules.gpu_topology,
        wait_value_micros_s=rules.wait_value_micros_s,
    )


def _placement_from_pb(rules: pb.PlacementRules) -> PlacementRules:
    return PlacementRules(
        dict(rules.labels_preferred),
        tuple(rules.affinity),
        tuple(rules.affinity_preferred),
        tuple(rules.anti_affinity),
        tuple(rules.anti_affinity_preferred),
        rules.spread,
        rules.gpu_topology,
        rules.wait_value_micros_s,
    )


def _policy_to_pb(policy: RolloutPolicy) -> pb.RolloutPolicy:
    return pb.RolloutPolicy(
        strategy=policy.strategy,
        canary_perc=policy.canary_perc,
        max_disturbed_perc=policy.max_disturbed_perc,
        no_rollback=policy.no_rollback,
        deadline_s=policy.deadline_s,
        canary_hold_s=policy.canary_hold_s,
    )


def _policy_from_pb(policy: pb.RolloutPolicy) -> RolloutPolicy:
    return RolloutPolicy(
        policy.strategy,
        policy.canary_perc,
        policy.max_disturbed_perc,
        policy.no_rollback,
        policy.deadline_s,
        policy.canary_hold_s,
    )


def _resources_from_pb(resources: pb.Resources) -> Resources:
    return Resources(
        cpu_milli=resources.cpu_milli,
        memory_bytes=resources.memory_bytes,
        pids_max=resources.pids_max,
        shm_bytes=resources.shm_bytes,
        open_files_max=resources.open_files_max,
        locked_memory_bytes=resources.locked_memory_bytes,
        io_bytes_s=resources.io_bytes_s,
        scratch_bytes=resources.scratch_bytes if resources.HasField("scratch_bytes") else None,
    )


def _task_to_pb(task: BuildTask) -> pb.BuildTask:
    return pb.BuildTask(
        namespace=task.namespace,
        key=task.key,
        bytes_max=task.bytes_max,
        facts=task.facts,
        image=task.image,
        source=task.source,
        auth_secret=task.auth_secret,
        platform=task.platform,
    )


def _task_from_pb(task: pb.BuildTask) -> BuildTask:
    return BuildTask(
        task.namespace,
        task.key,
        task.bytes_max,
        dict(task.facts),
        task.image,
        task.source,
        task.auth_secret,
        task.platform,
    )
