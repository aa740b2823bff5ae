"""Ray Serve for `peer-ray`, run by a Python that has it: `python ray_serve_child.py PORT`.

Reads words from stdin, one command a line, and answers each with a line: `deploy NAME REPLICAS` makes an app at
/NAME (answered when it is up), `delete NAME` ends one (answered when it is gone). Ends with stdin.
"""

from __future__ import annotations

import logging
import sys

import ray  # type: ignore[import-not-found]
from ray import serve  # type: ignore[import-not-found]
from ray.serve.schema import LoggingConfig  # type: ignore[import-not-found]
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]

AT_ONCE = 16  # requests of a replica, as many as the bench's largest concurrency
QUIET = LoggingConfig(enable_access_log=False, log_level="ERROR")


@serve.deployment(max_ongoing_requests=AT_ONCE, ray_actor_options={"num_cpus": 0.1}, logging_config=QUIET)
class Echo:
    """Answers what it was sent."""

    async def __call__(self, request: Request) -> Response:
        return Response(await request.body(), media_type="application/octet-stream")


def main(port: int) -> None:
    # As many CPUs as the apps need: what Ray may place must not depend on the machine.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["deploy", name, replicas]:
                app = Echo.options(num_replicas=int(replicas)).bind()
                serve.run(app, name=name, route_prefix=f"/{name}")
            case ["delete", name]:
                serve.delete(name)
            case _:
                raise SystemExit(f"unknown: {line}")
        print("done", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(int(sys.argv[1]))
