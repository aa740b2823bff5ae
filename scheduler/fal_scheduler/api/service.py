"""The gRPC servicers: find the term's parts, name the caller, hand over. Nothing is decided here.

Errors leave as `FalError` and become gRPC statuses in the guard in front of every method.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from fal_contract.errors import Code, FalError
from fal_contract.leader_search import WAIT_KEY
from fal_contract.limits import MESSAGE_BYTES_MAX, STANDBY_HOLD_S
from fal_contract.rpc_guard import current_peer
from fal_contract.v1 import agent_pb2, cluster_pb2, cluster_pb2_grpc, state_pb2, weights_pb2
from fal_contract.v1.agent_pb2_grpc import AgentServiceServicer
from fal_contract.v1.serving_pb2_grpc import ServingServicer
from fal_contract.v1.weights_pb2_grpc import CacheServiceServicer
from fal_scheduler import pushes
from fal_scheduler.api import (
    apps,
    caches,
    callers,
    compile_caches,
    execs,
    explain,
    gpus,
    images,
    join_tokens,
    nodes,
    plans,
    pools,
    quotas,
    rollouts,
    runners,
    secrets,
    status,
    usage,
    weights,
)
from fal_scheduler.leadership import CurrentLeadership, Leadership

M = TypeVar("M", bound=Message)
Context = Any  # grpc.aio.ServicerContext; generic in the stubs only


def _actor() -> str:
    return current_peer().subject


def _sized(reply: M, remedy: str) -> M:
    """A list is complete or refused with a clear error; gRPC's own for a large message names no remedy."""
    size = reply.ByteSize()
    if size > MESSAGE_BYTES_MAX:
        what = f"the answer has {size} bytes, a message holds {MESSAGE_BYTES_MAX}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy)
    return reply


async def held(current: CurrentLeadership, context: Context) -> Leadership:
    """The term's parts; who asks to wait, having failed to reach the leader, is held until there is another."""
    failed = next((value for key, value in context.invocation_metadata() or () if key == WAIT_KEY), "")
    return await current.soon(STANDBY_HOLD_S, failed=failed) if failed and not current.leads else current.get()


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """`fal.v1.Cluster`."""

    def __init__(self, current: CurrentLeadership) -> None:
        self._current = current

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Context) -> cluster_pb2.ClusterStatus:
        return status.get_status(self._current.get(), request)

    async def ApplyPool(self, request: cluster_pb2.ApplyPoolRequest, context: Context) -> cluster_pb2.ApplyPoolReply:
        return await pools.apply_pool(self._current.get(), request, _actor())

    async def ListPools(self, request: cluster_pb2.ListPoolsRequest, context: Context) -> cluster_pb2.ListPoolsReply:
        return pools.list_pools(self._current.get(), request)

    async def ListNodes(self, request: cluster_pb2.ListNodesRequest, context: Context) -> cluster_pb2.ListNodesReply:
        return _sized(
            nodes.list_nodes(self._current.get(), request), "Ask for pages with `limit`, or name a pool or a node."
        )

    async def CordonNode(self, request: cluster_pb2.CordonNodeRequest, context: Context) -> cluster_pb2.NodeView:
        return await nodes.cordon_node(self._current.get(), request, _actor())

    async def RevokeNode(self, request: cluster_pb2.RevokeNodeRequest, context: Context) -> cluster_pb2.NodeView:
        return await nodes.revoke_node(self._current.get(), request, _actor())

    async def Revoke(self, request: cluster_pb2.RevokeRequest, context: Context) -> cluster_pb2.RevokeReply:
        return await callers.revoke(self._current.get(), request, _actor())

    async def CreateToken(
        self, request: cluster_pb2.CreateTokenRequest, context: Context
    ) -> cluster_pb2.CreateTokenReply:
        return await join_tokens.create_token(self._current.get(), request, _actor())

    async def ListTokens(self, request: cluster_pb2.ListTokensRequest, context: Context) -> cluster_pb2.ListTokensReply:
        return join_tokens.list_tokens(self._current.get(), request)

    async def RevokeToken(self, request: cluster_pb2.RevokeTokenRequest, context: Context) -> cluster_pb2.TokenView:
        return await join_tokens.revoke_token(self._current.get(), request, _actor())

    async def AddModel(self, request: cluster_pb2.AddModelRequest, context: Context) -> cluster_pb2.ModelView:
        return await weights.add_model(self._current.get(), request, _actor())

    async def ListModels(self, request: cluster_pb2.ListModelsRequest, context: Context) -> cluster_pb2.ListModelsReply:
        return _sized(weights.list_models(self._current.get(), request), "Ask for fewer with `limit`.")

    async def GetModel(self, request: cluster_pb2.GetModelRequest, context: Context) -> cluster_pb2.ModelView:
        return weights.get_model(self._current.get(), request)

    async def StageModel(self, request: cluster_pb2.StageModelRequest, context: Context) -> cluster_pb2.StageModelReply:
        return await weights.stage_model(self._current.get(), request, _actor())

    async def UnstageModel(
        self, request: cluster_pb2.UnstageModelRequest, context: Context
    ) -> cluster_pb2.StageModelReply:
        return await weights.unstage_model(self._current.get(), request, _actor())

    async def WhereModel(self, request: cluster_pb2.WhereModelRequest, context: Context) -> cluster_pb2.WhereModelReply:
        reply = caches.where_model(self._current.get(), request)
        return _sized(reply, "Leave out `all`.")

    async def EvictModel(self, request: cluster_pb2.EvictModelRequest, context: Context) -> cluster_pb2.EvictModelReply:
        return caches.evict_model(self._current.get(), request)

    async def VerifyModel(
        self, request: cluster_pb2.EvictModelRequest, context: Context
    ) -> cluster_pb2.EvictModelReply:
        return caches.verify_model(self._current.get(), request)

    async def BeginPush(self, request: cluster_pb2.BeginPushRequest, context: Context) -> cluster_pb2.BeginPushReply:
        return await pushes.begin(self._current.get(), request, _actor())

    async def EndPush(self, request: cluster_pb2.EndPushRequest, context: Context) -> cluster_pb2.ModelView:
        await pushes.end(self._current.get(), request, _actor())
        return weights.get_model(self._current.get(), cluster_pb2.GetModelRequest(id=request.id))

    async def RevokeModel(self, request: cluster_pb2.RevokeModelRequest, context: Context) -> cluster_pb2.ModelView:
        return await weights.revoke_model(self._current.get(), request, _actor())

    async def CollectModels(
        self, request: cluster_pb2.CollectModelsRequest, context: Context
    ) -> cluster_pb2.CollectModelsReply:
        return await weights.collect_models(self._current.get(), request, _actor())

    async def AddImage(self, request: cluster_pb2.AddImageRequest, context: Context) -> cluster_pb2.ImageView:
        return await images.add_image(self._current.get(), request, _actor())

    async def GetImage(self, request: cluster_pb2.GetImageRequest, context: Context) -> cluster_pb2.ImageView:
        return images.get_image(self._current.get(), request)

    async def ListImages(self, request: cluster_pb2.ListImagesRequest, context: Context) -> cluster_pb2.ListImagesReply:
        return _sized(images.list_images(self._current.get(), request), "Name a team.")

    async def RemoveModel(
        self, request: cluster_pb2.RemoveModelRequest, context: Context
    ) -> cluster_pb2.RemoveModelReply:
        return await images.remove_model(self._current.get(), request, _actor())

    async def ListCacheEntries(
        self, request: cluster_pb2.ListCacheEntriesRequest, context: Context
    ) -> cluster_pb2.ListCacheEntriesReply:
        return _sized(compile_caches.list_entries(self._current.get(), request), "Name a namespace, or a key's start.")

    async def BuildCache(self, request: cluster_pb2.BuildCacheRequest, context: Context) -> cluster_pb2.CacheEntryView:
        return await compile_caches.build_cache(self._current.get(), request, _actor())

    async def EvictCacheEntry(
        self, request: cluster_pb2.EvictCacheEntryRequest, context: Context
    ) -> cluster_pb2.CacheEntryView:
        return await compile_caches.evict_entry(self._current.get(), request, _actor())

    async def SetSecret(self, request: cluster_pb2.SetSecretRequest, context: Context) -> cluster_pb2.SecretView:
        return await secrets.set_secret(self._current.get(), request, _actor())

    async def ListSecrets(
        self, request: cluster_pb2.ListSecretsRequest, context: Context
    ) -> cluster_pb2.ListSecretsReply:
        return _sized(secrets.list_secrets(self._current.get(), request), "Name a team.")

    async def UnsetSecret(self, request: cluster_pb2.UnsetSecretRequest, context: Context) -> cluster_pb2.SecretView:
        return await secrets.unset_secret(self._current.get(), request, _actor())

    async def ApplyApp(self, request: cluster_pb2.ApplyAppRequest, context: Context) -> cluster_pb2.ApplyAppReply:
        return await apps.apply_app(self._current.get(), request, _actor())

    async def PlanApp(self, request: cluster_pb2.ApplyAppRequest, context: Context) -> cluster_pb2.ApplyAppReply:
        return apps.plan_app(self._current.get(), request)

    async def ListApps(self, request: cluster_pb2.ListAppsRequest, context: Context) -> cluster_pb2.ListAppsReply:
        return _sized(apps.list_apps(self._current.get(), request), "Ask for pages with `limit`, or name a team.")

    async def GetApp(self, request: cluster_pb2.GetAppRequest, context: Context) -> cluster_pb2.AppView:
        return apps.get_app(self._current.get(), request)

    async def ScaleApp(self, request: cluster_pb2.ScaleAppRequest, context: Context) -> cluster_pb2.AppView:
        return await apps.scale_app(self._current.get(), request, _actor())

    async def DeleteApp(self, request: cluster_pb2.DeleteAppRequest, context: Context) -> cluster_pb2.DeleteAppReply:
        return await apps.delete_app(self._current.get(), request, _actor())

    async def DrainNode(self, request: cluster_pb2.DrainNodeRequest, context: Context) -> cluster_pb2.NodeView:
        return await nodes.drain_node(self._current.get(), request, _actor())

    async def LabelNode(self, request: cluster_pb2.LabelNodeRequest, context: Context) -> cluster_pb2.NodeView:
        return await nodes.label_node(self._current.get(), request, _actor())

    async def RemoveNode(self, request: cluster_pb2.RemoveNodeRequest, context: Context) -> cluster_pb2.RemoveNodeReply:
        return await nodes.remove_node(self._current.get(), request, _actor())

    async def DeclareLost(
        self, request: cluster_pb2.DeclareLostRequest, context: Context
    ) -> cluster_pb2.DeclareLostReply:
        return await nodes.declare_lost(self._current.get(), request, _actor())

    async def GetUsage(self, request: cluster_pb2.GetUsageRequest, context: Context) -> cluster_pb2.GetUsageReply:
        return _sized(usage.get_usage(self._current.get(), request), "Ask for one team, or a shorter time.")

    async def SetQuota(self, request: cluster_pb2.SetQuotaRequest, context: Context) -> cluster_pb2.QuotaView:
        return await quotas.set_quota(self._current.get(), request, _actor())

    async def ListQuotas(self, request: cluster_pb2.ListQuotasRequest, context: Context) -> cluster_pb2.ListQuotasReply:
        return quotas.list_quotas(self._current.get(), request)

    async def UnsetQuota(self, request: cluster_pb2.UnsetQuotaRequest, context: Context) -> cluster_pb2.QuotaView:
        return await quotas.unset_quota(self._current.get(), request, _actor())

    async def Plan(self, request: cluster_pb2.PlanRequest, context: Context) -> cluster_pb2.PlanReply:
        return _sized(await plans.plan(self._current.get(), request), "Plan fewer manifests at once.")

    async def SteerRollout(self, request: cluster_pb2.SteerRolloutRequest, context: Context) -> cluster_pb2.AppView:
        return await rollouts.steer_rollout(self._current.get(), request, _actor())

    async def SetRevision(self, request: cluster_pb2.SetRevisionRequest, context: Context) -> cluster_pb2.AppView:
        return await rollouts.set_revision(self._current.get(), request, _actor())

    async def ListRevisions(
        self, request: cluster_pb2.ListRevisionsRequest, context: Context
    ) -> cluster_pb2.ListRevisionsReply:
        return rollouts.list_revisions(self._current.get(), request)

    async def ListRunners(
        self, request: cluster_pb2.ListRunnersRequest, context: Context
    ) -> cluster_pb2.ListRunnersReply:
        return _sized(
            runners.list_runners(self._current.get(), request),
            "Ask for pages with `limit`, or name a team, an app or a node.",
        )

    async def GetRunner(self, request: cluster_pb2.GetRunnerRequest, context: Context) -> cluster_pb2.RunnerView:
        return runners.get_runner(self._current.get(), request)

    async def RunnerLogs(
        self, request: cluster_pb2.RunnerLogsRequest, context: Context
    ) -> AsyncIterator[agent_pb2.LogChunk]:
        async for chunk in runners.runner_logs(self._current.get(), request):
            yield chunk

    async def ExecRunner(
        self, request_iterator: AsyncIterator[cluster_pb2.ExecRequest], context: Context
    ) -> AsyncIterator[cluster_pb2.ExecReply]:
        async for output in execs.exec_runner(self._current.get(), request_iterator, _actor()):
            yield cluster_pb2.ExecReply(output=output)

    async def TopRunner(self, request: cluster_pb2.TopRunnerRequest, context: Context) -> agent_pb2.TopReply:
        return await execs.top_runner(self._current.get(), request)

    async def QuarantineGpu(self, request: cluster_pb2.QuarantineGpuRequest, context: Context) -> cluster_pb2.GpuReply:
        return await gpus.quarantine(self._current.get(), request, _actor())

    async def ReleaseGpu(self, request: cluster_pb2.ReleaseGpuRequest, context: Context) -> cluster_pb2.GpuReply:
        return await gpus.release(self._current.get(), request, _actor())

    async def SetMig(self, request: cluster_pb2.SetMigRequest, context: Context) -> cluster_pb2.GpuReply:
        return await gpus.set_mig(self._current.get(), request, _actor())

    async def StopRunner(self, request: cluster_pb2.StopRunnerRequest, context: Context) -> cluster_pb2.RunnerView:
        return await runners.stop_runner(self._current.get(), request, _actor())

    async def Explain(self, request: cluster_pb2.ExplainRequest, context: Context) -> cluster_pb2.ExplainReply:
        return explain.explain(self._current.get(), request)

    async def Events(self, request: cluster_pb2.EventsRequest, context: Context) -> AsyncIterator[cluster_pb2.Event]:
        async for event in status.events(self._current.get(), request):
            yield event

    async def Confirm(self, request: cluster_pb2.ConfirmRequest, context: Context) -> cluster_pb2.ConfirmReply:
        return await status.confirm(self._current.get(), request, _actor())


class AgentService(AgentServiceServicer):
    """`fal.v1.AgentService`."""

    def __init__(self, current: CurrentLeadership) -> None:
        self._current = current

    async def Session(  # type: ignore[override]  # writes through the context: flow control is awaited
        self, request_iterator: AsyncIterator[agent_pb2.AgentMessage], context: Context
    ) -> None:
        leader = await held(self._current, context)
        await leader.sessions.run(current_peer().name, request_iterator, context.write)

    async def RenewCertificate(
        self, request: agent_pb2.RenewCertificateRequest, context: Context
    ) -> agent_pb2.RenewCertificateReply:
        leader, peer = self._current.get(), current_peer()
        revoked = leader.revocations.is_revoked(peer)
        certificate = leader.ca.renew(request.csr_pem, peer, revoked=revoked, now_s=leader.clock.wall_s())
        return agent_pb2.RenewCertificateReply(certificate_pem=certificate)

    async def GetSecrets(self, request: agent_pb2.GetSecretsRequest, context: Context) -> agent_pb2.GetSecretsReply:
        return secrets.get_secrets(self._current.get(), request, current_peer().name)


class CacheService(CacheServiceServicer):
    """`fal.v1.CacheService`."""

    def __init__(self, current: CurrentLeadership) -> None:
        self._current = current

    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[weights_pb2.CacheUp], context: Context
    ) -> None:
        leader = await held(self._current, context)
        await leader.caches.run(current_peer().name, request_iterator, context.write)

    async def GetManifest(self, request: weights_pb2.GetManifestRequest, context: Context) -> state_pb2.ModelManifest:
        return _sized(caches.get_manifest(self._current.get(), request), "Read it from a peer.")


class ServingService(ServingServicer):
    """`fal.v1.Serving`."""

    def __init__(self, current: CurrentLeadership) -> None:
        self._current = current

    async def Dispatch(  # type: ignore[override]
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> None:
        peer = current_peer()
        leader = await held(self._current, context)
        await leader.dispatcher.run(peer.name, peer.role, request_iterator, context.write)


def services() -> Iterable[Any]:
    """Descriptors of every service here."""
    from fal_contract.v1 import schedulers_pb2, serving_pb2

    own = (cluster_pb2, "Cluster"), (agent_pb2, "AgentService"), (serving_pb2, "Serving"), (weights_pb2, "CacheService")
    for module, name in (*own, (schedulers_pb2, "Schedulers")):
        yield module.DESCRIPTOR.services_by_name[name]
