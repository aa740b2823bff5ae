"""An origin with many models as a process in a network namespace: `python ready_origin_child.py HOST NAME=BYTES …`.

Serves NAME/model.safetensors over HTTP, of bytes that nothing compresses. Prints {"url", "credentials"} once it
listens; ends with its input.
"""

from __future__ import annotations

import json
import random
import sys

from origin_servers import HttpOrigin

BLOCK_BYTES = 1 << 20


def content(name: str, size: int) -> bytes:
    """Blocks of the same random bytes, each with a head of its own, so that no two pieces are equal."""
    rng = random.Random(name)
    block = rng.randbytes(BLOCK_BYTES - 16)
    return b"".join(rng.randbytes(16) + block for _ in range(size // BLOCK_BYTES))


def main() -> None:
    host, wanted = sys.argv[1], [word.split("=") for word in sys.argv[2:]]
    files = {f"{name}/model.safetensors": content(name, int(size)) for name, size in wanted}
    with HttpOrigin(files, host=host) as origin:
        for path, data in list(files.items()):
            origin.tag_of(path, data)
            origin.put_list(f"{path.partition('/')[0]}/", sha256=False)
        print(json.dumps({"url": origin.url, "credentials": origin.credentials_toml()}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
