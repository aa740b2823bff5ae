"""Which role may call which method: the one table for every service of the scheduler.

A method without a row is refused to everyone (`rpc_guard.Guard`); a test says that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fal_contract.identity import ADMINS, READERS, WRITERS, Role

_CLUSTER: Final[Mapping[str, frozenset[Role]]] = {
    "GetStatus": READERS,
    "ListPools": READERS,
    "ListNodes": READERS,
    "ListModels": READERS,
    "GetModel": READERS,
    "WhereModel": READERS,
    "GetImage": READERS,
    "ListImages": READERS,
    "ListCacheEntries": READERS,
    "ListSecrets": READERS,
    "PlanApp": READERS,
    "ListApps": READERS,
    "GetApp": READERS,
    "ListRunners": READERS,
    "GetRunner": READERS,
    "RunnerLogs": READERS,
    "TopRunner": READERS,
    "Explain": READERS,
    "Events": READERS,
    "ApplyPool": WRITERS,
    "CordonNode": WRITERS,
    "AddModel": WRITERS,
    "StageModel": WRITERS,
    "UnstageModel": WRITERS,
    "EvictModel": WRITERS,
    "VerifyModel": WRITERS,
    "RevokeModel": WRITERS,
    "CollectModels": WRITERS,
    "BeginPush": WRITERS,
    "EndPush": WRITERS,
    "AddImage": WRITERS,
    "RemoveModel": WRITERS,
    "BuildCache": WRITERS,
    "EvictCacheEntry": WRITERS,
    "SetSecret": WRITERS,
    "UnsetSecret": WRITERS,
    "ApplyApp": WRITERS,
    "ScaleApp": WRITERS,
    "DeleteApp": WRITERS,
    "StopRunner": WRITERS,
    "DrainNode": WRITERS,
    "LabelNode": WRITERS,
    "SteerRollout": WRITERS,
    "SetRevision": WRITERS,
    "ListRevisions": READERS,
    "Plan": READERS,
    "ListQuotas": READERS,
    "GetUsage": READERS,
    "QuarantineGpu": WRITERS,
    "ReleaseGpu": WRITERS,
    "SetMig": WRITERS,
    "ExecRunner": WRITERS,
    "RevokeNode": ADMINS,
    "SetQuota": ADMINS,
    "UnsetQuota": ADMINS,
    "RemoveNode": ADMINS,
    "DeclareLost": ADMINS,
    "Revoke": ADMINS,
    "CreateToken": ADMINS,
    "ListTokens": ADMINS,
    "RevokeToken": ADMINS,
    "Confirm": ADMINS,
}
NODES: Final = frozenset({Role.NODE})
STANDBYS: Final = frozenset({Role.SCHEDULER})

ROLES: Final[Mapping[str, frozenset[Role]]] = {
    **{f"/fal.v1.Cluster/{method}": roles for method, roles in _CLUSTER.items()},
    "/fal.v1.AgentService/Session": NODES,
    "/fal.v1.AgentService/RenewCertificate": NODES,
    "/fal.v1.AgentService/GetSecrets": NODES,
    "/fal.v1.CacheService/Session": NODES,
    "/fal.v1.CacheService/GetManifest": NODES,
    "/fal.v1.Schedulers/GetLeader": frozenset(Role),
    "/fal.v1.Schedulers/ListManifests": STANDBYS,
    "/fal.v1.Schedulers/FetchManifest": STANDBYS,
    "/fal.v1.Schedulers/SaveSnapshot": ADMINS,
    "/fal.v1.Serving/Dispatch": frozenset({Role.SERVING, Role.OPERATOR, Role.ADMIN}),
}
