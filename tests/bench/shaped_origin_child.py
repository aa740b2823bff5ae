"""An origin as a process, to be run inside a network namespace: `python shaped_origin_child.py FOLDER HOST`.

Serves the files of FOLDER over HTTP. Prints {"url", "credentials"}, then {"bytes_sent": payload bytes written to
connections so far} for every line that it reads; ends with its input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from origin_servers import HttpOrigin


def main() -> None:
    folder, host = Path(sys.argv[1]), sys.argv[2]
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    with HttpOrigin(files, host=host) as origin:
        origin.put_list(sha256=False)
        for path, data in origin.files.items():
            origin.tag_of(path, data)
        print(json.dumps({"url": origin.url, "credentials": origin.credentials_toml()}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"bytes_sent": origin.bytes_sent}), flush=True)


if __name__ == "__main__":
    main()
