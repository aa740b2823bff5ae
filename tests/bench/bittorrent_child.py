"""One BitTorrent peer as a process: `python bittorrent_child.py FOLDER TORRENT HOST PORT`; FOLDER may hold the content.

Prints {"port"} when it listens. Lines that it reads: `peers HOST:PORT …` → {"peers": connected}, asked until all are
there; `go HOST:PORT` connects the seed → {"seconds"} once it is complete and checked; ends with its input.

TCP only, as many upload slots as there are peers, no limits, no discovery: nothing but the transfer.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import libtorrent

SETTINGS = {
    "enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
    "enable_incoming_utp": False, "enable_outgoing_utp": False, "allow_multiple_connections_per_ip": True,
    "unchoke_slots_limit": -1, "upload_rate_limit": 0, "download_rate_limit": 0, "connections_limit": 100,
    "announce_to_all_trackers": False, "in_enc_policy": 2, "out_enc_policy": 2, "min_reconnect_time": 1,
    "torrent_connect_boost": 50, "mixed_mode_algorithm": 0,
}  # fmt: skip
LOOK_S = 0.05


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def connect(handle: Any, words: list[str]) -> None:
    for word in words:
        host, _, port = word.rpartition(":")
        handle.connect_peer((host, int(port)))


def main() -> None:
    folder, torrent, host, port = sys.argv[1:5]
    session = libtorrent.session({**SETTINGS, "listen_interfaces": f"{host}:{port}"})
    asked = libtorrent.add_torrent_params()
    asked.ti = libtorrent.torrent_info(torrent)
    asked.save_path = folder
    asked.flags &= ~libtorrent.torrent_flags.auto_managed & ~libtorrent.torrent_flags.paused
    handle = session.add_torrent(asked)
    checking = (libtorrent.torrent_status.checking_files, libtorrent.torrent_status.checking_resume_data)
    while handle.status().state in checking:
        time.sleep(LOOK_S)
    say(port=session.listen_port(), complete=handle.status().is_seeding)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "peers":
            connect(handle, rest)
            say(peers=len(handle.get_peer_info()))
        elif word == "go":
            begun_s = time.perf_counter()
            connect(handle, rest)
            while not handle.status().is_seeding:
                time.sleep(LOOK_S)
            say(seconds=time.perf_counter() - begun_s, bytes=handle.status().total_payload_download)
        elif word == "sent":
            say(bytes=handle.status().total_payload_upload)


if __name__ == "__main__":
    main()
