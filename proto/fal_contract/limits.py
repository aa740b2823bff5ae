"""Bounds and timeouts that more than one process relies on. Everything has one; units last. Pure."""

from __future__ import annotations

from typing import Final

# Liveness (design, section 5, rule 3).
HEARTBEAT_INTERVAL_S: Final = 5.0
HEARTBEATS_MISSED_MAX: Final = 3  # then UNKNOWN
LOST_AFTER_S: Final = 60.0  # then its runners are replaced
DOMAIN_MASS_NODES_MIN: Final = 5  # a smaller domain is never "mass" by one node
KEEPALIVE_TIME_S: Final = 30  # under any cloud NAT's idle limit
KEEPALIVE_TIMEOUT_S: Final = 10

# Coalescing windows; the first message goes at once (leading edge).
DELTA_WINDOW_S: Final = 0.025
REPORT_WINDOW_S: Final = 0.100
WANT_WINDOW_S: Final = 0.002

# Store (etcd refuses the 129th operation; a request holds 1.5 MiB).
COMMIT_OPERATIONS_MAX: Final = 100
COMMIT_BYTES_MAX: Final = 1 << 20
COMMIT_TIMEOUT_S: Final = 30.0
STORE_KEY_BYTES_MAX: Final = 512
STORE_LEASE_TTL_S: Final = 5.0  # a leader that the store has not heard for so long is deposed

# Wire.
MESSAGE_BYTES_MAX: Final = 4 << 20
RPC_TIMEOUT_S: Final = 30.0
STREAM_QUEUE_MESSAGES_MAX: Final = 1024

# Names and sizes.
NAME_CHARS_MAX: Final = 63
LABELS_MAX: Final = 64
LABEL_CHARS_MAX: Final = 256
MANIFEST_BYTES_MAX: Final = 256 << 10
CONFIG_BYTES_MAX: Final = 1 << 20
ENV_VARS_MAX: Final = 128
GPUS_PER_RUNNER_MAX: Final = 16
RUNNERS_PER_APP_MAX: Final = 10_000
NODES_MAX: Final = 20_000
LOG_TAIL_LINES_MAX: Final = 50
LOG_LINE_BYTES_MAX: Final = 4096

# Runners.
REQUEST_TIMEOUT_S: Final = 3600.0
STARTUP_TIMEOUT_S: Final = 600.0
TERMINATION_GRACE_S: Final = 5.0
CRASH_BACKOFF_STEP_S: Final = 30.0
CRASH_BACKOFF_MAX_S: Final = 600.0

# Serving.
LEASE_TTL_S: Final = 30.0
BUSY_RETRY_MAX: Final = 8
REQUEST_HEAD_BYTES_MAX: Final = 32 << 10
TUNNEL_PING_S: Final = 10.0  # CRLF both ways on an idle tunnel, under any NAT's idle limit
TUNNEL_SILENCE_MAX_S: Final = 25.0  # nothing heard for so long: the tunnel is dead and replaced
TUNNELS_MIN: Final = 4  # per node and gateway
TUNNELS_MAX: Final = 256
DATA_CONNECT_TIMEOUT_S: Final = 5.0
DATA_HEAD_TIMEOUT_S: Final = 10.0  # from a request's first byte to the end of its head
# A client drops an unused connection well before the proxy would, so that no request meets a closing one.
DATA_CLIENT_IDLE_S: Final = 15.0
DATA_SERVER_IDLE_S: Final = 30.0
DATA_CONNECTIONS_MAX: Final = 4096

# Reconnects: full jitter between 0 and min(cap, base * 2**n).
RECONNECT_BASE_S: Final = 0.2
RECONNECT_CAP_S: Final = 15.0

# Stops that no operator asked for, of more than this share of all runners at once, wait for a confirm.
MASS_STOP_SHARE: Final = 0.1
MASS_STOP_RUNNERS_MIN: Final = 3
FAILOVER_GRACE_S: Final = 300.0

# Quotas.
QUOTA_GPU_MILLI_MAX: Final = 1_000_000_000
TEAMS_MAX: Final = 10_000

# Usage ledger.
USAGE_CHECKPOINT_S: Final = 43_200.0  # a running container's usage is written down so often
USAGE_DETAILS_KEPT_S: Final = 172_800.0  # of one container; then in sums of a day
USAGE_DETAILS_MAX: Final = 50_000
USAGE_DAYS_KEPT: Final = 400
USAGE_ROWS_PER_PART_MAX: Final = 4000  # of one record; below 1 MiB

# Drains.
NOTICE_MARGIN_S: Final = 20.0  # before a cloud takes a node back, what is left there is stopped

# Rollouts.
DISTURBED_PERC: Final = 25  # of an app's runners at once, where the app does not say
ROLLOUT_DEADLINE_S: Final = 3600.0
ROLLOUT_FAILURES_MAX: Final = 2  # ends of runners of a new revision; then it is rolled back

# Identity.
CERTIFICATE_TTL_S: Final = 24 * 3600.0
CERTIFICATE_BACKDATE_S: Final = 300.0
REVOCATIONS_TOLD_MAX: Final = 10_000  # to each node; the newest, well within one message
REVOCATION_SWEEP_S: Final = 2.0  # an open stream of a revoked certificate ends within 5 s
TOKEN_TTL_MAX_S: Final = 30 * 86400.0
CSR_BYTES_MAX: Final = 8 << 10
CERTIFICATE_SKEW_S: Final = 300.0  # clocks of two machines may differ by this much
JOIN_TIMEOUT_S: Final = 15.0
JOIN_ATTEMPTS_PER_MINUTE_MAX: Final = 60  # per address; a secret has 130 bits, this bounds the work

# Models.
MODEL_FILES_MAX: Final = 4096
MODEL_PATH_BYTES_MAX: Final = 1024
STAGE_TIMEOUT_S: Final = 6 * 3600.0

# Agent.
ASSIGNMENTS_PER_NODE_MAX: Final = 1024
JOURNAL_BYTES_MAX: Final = 64 << 20
JOURNAL_RECORD_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 4096
NODE_EVENTS_MAX: Final = 256  # kept for the scheduler while it is away; the oldest go first
GPU_IDLE_MEMORY_BYTES_MAX: Final = 768 << 20  # a GPU without a process shows less than this
GPU_RELEASE_TIMEOUT_S: Final = 30.0  # then it is quarantined

# Weight caches' sessions.
CACHED_ARTIFACTS_PER_NODE_MAX: Final = 20_000  # a hello of so many is just within one message
CACHED_ARTIFACTS_MAX: Final = 1_000_000  # of all nodes together, in the scheduler's memory
CACHE_RATES_PER_NODE_MAX: Final = 256
CACHE_FACTS_PER_NODE_MAX: Final = 4096  # of its artifacts that placement looks at
CACHE_EVENTS_PER_REPORT_MAX: Final = 64
WISHES_PER_NODE_MAX: Final = 8192  # a set travels in one message
SWARM_WINDOW_S: Final = 0.2  # between two changes of one swarm's membership; the first is told at once
INLINE_MANIFEST_BYTES_MAX: Final = 64 << 10  # with a wish or an assignment; a larger one is fetched
ATTESTED_MANIFEST_BYTES_MAX: Final = 1 << 20  # sent when a model becomes ATTESTED; a larger one is fetched

# Weight cache (fal-fsd): its node.
SMALL_ARTIFACT_BYTES: Final = 512 << 20  # a LoRA: comes before checkpoints
READ_TIMEOUT_S: Final = 20.0  # of a read of an unfinished file
ORIGIN_READS_MAX: Final = 4  # ranges of one artifact at once
CACHE_EVENTS_MAX: Final = 256  # kept for the scheduler while it is away; the oldest go first
CACHE_REPORT_S: Final = 1.0  # progress is told so often

# Origins.
ORIGIN_URI_CHARS_MAX: Final = 2048
ORIGIN_CREDENTIALS_BYTES_MAX: Final = 256 << 10
ORIGIN_LIST_BYTES_MAX: Final = 8 << 20  # of falctl-files.json
ORIGIN_LIST_TIMEOUT_S: Final = 60.0
ORIGIN_CONNECT_TIMEOUT_S: Final = 10.0
ORIGIN_SILENCE_MAX_S: Final = 20.0  # no byte for so long: the connection is given up
ORIGIN_RATE_MIN: Final = 64 << 10  # bytes/s; a read that is slower in the long run is given up
ORIGIN_REDIRECTS_MAX: Final = 5
ORIGIN_ATTEMPTS_MAX: Final = 5  # in a row without a byte
ORIGIN_ATTEMPTS_ALL_MAX: Final = 64  # of one read
ORIGIN_RETRY_BASE_S: Final = 0.25
ORIGIN_RETRY_CAP_S: Final = 8.0
ORIGIN_RETRY_WAIT_MAX_S: Final = 15.0  # a longer Retry-After goes back to the caller
ORIGIN_RETRY_AFTER_MAX_S: Final = 300.0  # whatever a server says
ORIGIN_BLOCK_BYTES: Final = 1 << 20
ORIGIN_CONNECTIONS_MAX: Final = 8
ORIGIN_LOCATION_TTL_S: Final = 300.0  # signed addresses are asked for anew

# Model registry.
MODELS_LISTED_MAX: Final = 5000  # in one answer; more in the next page
MODELS_LISTED_DEFAULT: Final = 1000
LISTING_TIMEOUT_S: Final = 25.0  # asking an origin for a model's files; below the time of one call
LISTINGS_AT_ONCE_MAX: Final = 4
MANIFEST_EMBEDDED_BYTES_MAX: Final = 64 << 10  # larger ones are fetched by who needs them
WISHES_PER_MODEL_MAX: Final = 256
WISH_TTL_MAX_S: Final = 366 * 86400.0
CLAIMS_BYTES_MAX: Final = 64 << 20  # digests of pieces that nobody has attested yet, of all models together

# Pushes from an operator's machine.
PUSH_TARGETS_MAX: Final = 2  # nodes that are named at once; they trade what one of them gets
PUSH_REPLICAS: Final = 2  # of a finished push: no origin has it
PUSH_WISH_S: Final = 86400.0  # a push that does not go on for so long is given up by its nodes
PUSH_CALLER_CHARS: Final = 6  # of the artifact id, in the caller's name: an operator may push several at once

# Containers.
SECRETS_PER_APP_MAX: Final = 64
SECRET_BYTES_MAX: Final = 64 << 10
SECRETS_PER_TEAM_MAX: Final = 1000
EXECS_PER_NODE_MAX: Final = 64
EXEC_DATA_BYTES_MAX: Final = 32 << 10  # of one message
EXEC_WINDOW_BYTES: Final = 256 << 10  # sent and not yet taken, each way
EXEC_WINDOW_MESSAGES: Final = 256  # likewise
EXEC_START_TIMEOUT_S: Final = 60.0
EXEC_TIMEOUT_MAX_S: Final = 12 * 3600.0
ENDED_LOGS_BYTES_MAX: Final = 256 << 20  # of removed containers on a node, together
ENDED_LOGS_AGE_MAX_S: Final = 86400.0
ENDED_LOGS_MAX: Final = 1000
TOP_PROCESSES_MAX: Final = 256
TOP_TIMEOUT_S: Final = 10.0
LIBRARY_PATHS_MAX: Final = 256  # of a GPU driver, in a CDI specification that we write

# Images.
IMAGE_BYTES_MAX: Final = 256 << 30  # packed
IMAGE_BYTES_MAX_DEFAULT: Final = 64 << 30
IMAGE_CONFIG_BYTES_MAX: Final = 256 << 10
IMAGE_PACK_TIMEOUT_S: Final = 3600.0
IMAGE_FIRST_PIECES_MAX: Final = 16_384  # of 256 KiB: 4 GiB
IMAGE_START_S: Final = 60.0  # so long an image that arrives leaves the processor to what starts from it
IMAGE_SOURCE_CHARS_MAX: Final = 1024
ACCESS_LISTS_MAX: Final = 16  # recorded starts kept for one report; 64 KiB each
IMAGE_PACK_TRIES_MAX: Final = 3  # nodes that may be lost over it
IMAGE_REPLICAS: Final = 2  # of a packed image: its registry may go away
IMAGE_PACK_MEMORY_BYTES: Final = 2 << 30
IMAGE_PACK_WORK_FACTOR: Final = 4  # layers, unpacked files and the image lie beside one another for a while
IMAGE_PACK_TIMEOUT_MAX_S: Final = 6 * 3600.0

# Compile caches.
CACHE_FACT_BYTES_MAX: Final = 4096  # of one fact of a key
CACHE_KEYS_PER_APP_MAX: Final = 64
CACHE_ENTRY_BYTES_MAX: Final = 4 << 30
CACHE_NAMESPACE_BYTES_MAX: Final = 256 << 30  # of all entries of the cluster's, or of one team's, namespace
CACHE_NAMESPACE_ENTRIES_MAX: Final = 10_000
CACHE_ENTRY_WAIT_S: Final = 60.0  # a container starts without an entry that does not come in this time
BUILD_TIMEOUT_S: Final = 3600.0
BUILD_TIMEOUT_MAX_S: Final = 6 * 3600.0
BUILD_WAIT_MAX_S: Final = 3600.0  # for a node
BUILDS_MAX: Final = 256  # at once
BUILD_MANIFEST_BYTES_MAX: Final = 256 << 10  # travels in a runner's status
INGEST_TIMEOUT_S: Final = 600.0  # hashing and copying an entry of the largest size on a slow disk
BUILD_OUTPUT_PIN_S: Final = 3600.0  # until the scheduler has signed it

# Several schedulers.
MEMBER_TTL_S: Final = 15.0  # a scheduler that has not told for so long that it is up is forgotten
ANNOUNCE_S: Final = 5.0  # between two such words
STANDBY_HOLD_S: Final = 10.0  # a standby holds a call that waits for a new leader so long
ELECTION_RETRY_CAP_S: Final = 2.0  # between two dials of who knows that there is no leader just now

# The decision log of a scheduler.
DECISION_LOG_BYTES_MAX: Final = 1 << 30  # of all segments beside one store
DECISION_LOG_AGE_MAX_S: Final = 7 * 86400.0
DECISION_LOG_SEGMENT_BYTES_MAX: Final = 64 << 20  # compressed, about; then another begins with a snapshot
DECISION_LOG_BLOCK_BYTES: Final = 64 << 10  # before compression: what a crash may lose beside the last second
DECISION_LOG_BLOCK_BYTES_MAX: Final = 1 << 30  # a snapshot of the largest cluster is one block
DECISION_LOG_WAITING_BYTES_MAX: Final = 256 << 20  # for the disk; then the log has a gap
DECISION_LOG_FLUSH_S: Final = 1.0
DECISION_LOG_RETRY_S: Final = 300.0  # after a full disk

# GPU health.
GPU_HOT_C: Final = 95  # NVIDIA's data-centre parts throttle hard from about here
GPU_COOL_C: Final = 85  # one that was hot counts as hot until it is below this
GPU_HOT_S: Final = 10.0  # so long it must be hot
GPU_GONE_S: Final = 10.0  # a GPU that the driver does not list any more, while it answers
GPU_LOAD_PERCENT: Final = 50  # above this a GPU is at work, and its clocks mean something
GPU_SLOW_S: Final = 60.0  # throttled, on a narrow link, or far slower than its fellows for so long
GPU_SLOW_CLOCK_PERCENT: Final = 60  # of the median of its fellows at work
GPU_FOREIGN_S: Final = 30.0  # a foreign process, or memory that nobody holds
GPU_STUCK_S: Final = 60.0  # beyond an app's grace, a container that was told to end and has not
GPU_APPLICATION_RUNNERS_MAX: Final = 3  # runners in a row whose program "failed": the GPU is looked at
GPU_APPLICATION_WINDOW_S: Final = 3600.0
GPU_DIAGNOSES_MAX: Final = 5  # by itself, for one fault; then an operator decides
GPU_DIAGNOSE_WAIT_S: Final = 60.0  # after the first that failed; doubled each time
GPU_DIAGNOSE_WAIT_MAX_S: Final = 3600.0
GPU_CHECK_TIMEOUT_S: Final = 120.0
GPU_CHECK_OUTPUT_BYTES_MAX: Final = 16 << 10
GPU_RESET_TIMEOUT_S: Final = 90.0
GPU_MIG_TIMEOUT_S: Final = 90.0
GPU_ORDER_TIMEOUT_S: Final = 300.0  # a reset, a check and what is between them
GPU_ORDERS_PER_NODE_MAX: Final = 64  # under way
GPU_EVENTS_MAX: Final = 1024  # of the driver's, between two looks at them
GPU_MIG_INSTANCES_MAX: Final = 7
GPU_REFUSALS_FREE_MAX: Final = 3  # refusals in a row after which an app waits as after a crash

# Share groups: several models in one live runner.
RESIDENTS_MAX: Final = 16  # models that one worker has loaded at once
MODEL_LOAD_TIMEOUT_S: Final = 600.0  # for one model or LoRA to be loaded into a live worker
RESIDENT_STAGE_TIMEOUT_S: Final = 3600.0  # for its files to arrive on the node

# Runners of lost nodes that are replaced in a minute, whichever is more: so many, or this share of all runners.
LOST_REPLACED_OF_DOMAIN_MIN: Final = 60
LOST_REPLACED_OF_DOMAIN_SHARE: Final = 0.1
LOST_REPLACED_MIN: Final = 120  # in all domains together
LOST_REPLACED_SHARE: Final = 0.2
CACHE_PEERS_TOLD_MAX: Final = 64  # with which a cache is connected
WITNESS_S: Final = 10.0  # so often a silent node is looked for among what caches are connected with

# Notices of clouds, reboots.
NOTICE_POLL_S: Final = 5.0  # clouds give between 30 s and hours
NOTICE_FILE_POLL_S: Final = 1.0
NOTICE_RETRY_CAP_S: Final = 60.0  # between two tries of a source that does not answer
NOTICE_TIMEOUT_S: Final = 5.0  # of one question
NOTICE_HELD_S: Final = 60.0  # a question that is held until something changes
NOTICE_BYTES_MAX: Final = 64 << 10  # of one answer, or file
NOTICE_SOURCES_MAX: Final = 8
NOTICE_REASON_CHARS_MAX: Final = 512
NOTICE_WITHIN_MAX_S: Final = 30 * 86400.0  # what is announced for later than that has no date yet
REBOOT_COMMAND_TIMEOUT_S: Final = 60.0
REBOOT_PATIENCE_S: Final = 300.0  # a machine that is still up so long after the command was not rebooted

# Keep-warm by value: what caches are told to keep in memory and to stage ahead of need, by themselves.
WARM_LOOK_S: Final = 30.0  # a node's set changes so often at most
WARM_GAIN_PERC: Final = 20  # by which another set must be worth more before it replaces what is there
WARM_APPS_MAX: Final = 256  # looked at each time, those asked for most
WARM_NODES_PER_APP_MAX: Final = 4  # of which each counts half as much as the one before
WARM_PER_NODE_MAX: Final = 128  # artifacts that one node is told to keep by itself
STAGE_AHEAD_BYTES_PER_HOUR: Final = 64 << 30  # of one node
STAGE_AHEAD_DISK_PERC: Final = 25  # of a cache's disk, pinned at once
STAGE_AHEAD_KEPT_S: Final = 900.0  # then it is like anything else on the disk
STAGE_AHEAD_HORIZON_MAX_S: Final = 3600.0  # a forecast of later than that says little
VALUES_EVERY_S: Final = 300.0  # how often a cache is told what its artifacts are worth

# Lists of nodes, apps and runners.
LISTED_MAX: Final = 5000  # in one answer; more in the next page
LISTED_PAGE: Final = 1000  # what falctl asks for; a page of runners holds the scheduler up for some 30 ms
