"""Container images for tests and benches, made on the spot, and real registries that hold them. Nothing is downloaded.

    layout = write_layout(folder, [layer({"bin/sh": b"…"})])        an OCI layout with one image, tag "t"
    with ImageRegistry(folder) as registry:                              Debian's docker-registry on loopback
        registry.push(layout, "team/app:1")   registry.source("team/app:1")   registry.stop()
    ImageRegistry(folder, users={"ann": "pw"})        asks for a password;  auth_file(path, registry.host, "ann", "pw")
    ImageRegistry(folder, tls=make_authority(folder)) TLS by a private authority
    with TokenServer(folder, life_s=2) as tokens, ImageRegistry(folder, tokens=tokens): bearer tokens that end soon
    with SlowRelay(registry.port, 300_000) as relay: relay.port     the same registry, but slow
    torch_layout(folder)                                            a userland with Python and torch, gzip layers

Processes are ended by their own pid, threads with their block.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from etcd_server import free_ports
from fal_contract.clock import SystemClock
from origin_servers import Authority, ConnectProxy, make_authority

_START_TIMEOUT_S: Final = 20.0
_START_ATTEMPTS_MAX: Final = 5
_LEEWAY_S: Final = 60  # the registry takes tokens so long after their end
TAG: Final = "t"


def why_no_registry() -> str:
    """Why tests with a registry cannot run here, empty where they can."""
    missing = [name for name in ("docker-registry", "skopeo", "umoci") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (Debian packages of these names)" if missing else ""


def why_no_packing() -> str:
    """Why images cannot be packed here, empty where they can."""
    missing = [name for name in ("skopeo", "umoci", "mkfs.erofs", "mksquashfs") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


# --- images -----------------------------------------------------------------------------------------------------------


def entry(name: str, data: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member of a layer. `facts` are TarInfo's: type, linkname, mode, uid, mtime, devmajor …"""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1_600_000_000
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def layer(files: Mapping[str, bytes] | Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A layer, as a plain tar. Names are taken as they are, also hostile ones."""
    members = [entry(name, data, mode=0o755) for name, data in files.items()] if isinstance(files, Mapping) else files
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def write_layout(
    folder: Path,
    layers: Sequence[bytes],
    *,
    config: Mapping[str, Any] | None = None,
    platform: str = "linux/amd64",
    tag: str = TAG,
    compression: str = "gzip",
    faults: Mapping[str, Any] | None = None,
) -> Path:
    """An OCI layout at `folder` with one more image. `faults`: "layer_digest", "config_blob", "media_type",
    "diff_id" take the place of what is true."""
    faults = faults or {}
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes) -> tuple[str, int]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return f"sha256:{digest}", len(data)

    described, diff_ids = [], []
    for one in layers:
        digest, size = put(gzip.compress(one, 1, mtime=0) if compression == "gzip" else _zstd(one))
        kind = faults.get("media_type", f"application/vnd.oci.image.layer.v1.tar+{compression}")
        described.append({"mediaType": kind, "digest": faults.get("layer_digest", digest), "size": size})
        diff_ids.append(faults.get("diff_id", f"sha256:{hashlib.sha256(one).hexdigest()}"))
    os_, architecture = platform.split("/")[:2]
    table = {
        "os": os_, "architecture": architecture, "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }  # fmt: skip
    digest, size = put(faults.get("config_blob", json.dumps(table).encode()))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": size},
        "layers": described,
    }
    digest, size = put(json.dumps(manifest).encode())
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    index = folder / "index.json"
    found = json.loads(index.read_text())["manifests"] if index.exists() else []
    found.append(
        {
            "mediaType": manifest["mediaType"], "digest": digest, "size": size,
            "platform": {"os": os_, "architecture": architecture},
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }
    )  # fmt: skip
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": found}))
    return folder


def torch_layout(folder: Path) -> Path:
    """A userland with Python and, where it is installed here, torch: what a diffusion image is like. Takes half a
    minute. Its entrypoint is Python."""
    image = f"{folder}:{TAG}"
    _run("umoci", "init", "--layout", str(folder))
    _run("umoci", "new", "--image", image)
    python = Path(sys.executable).resolve()
    stdlib = Path(sysconfig.get_path("stdlib"))
    stage = folder.with_name(f"{folder.name}-base")
    for path in (Path("/bin/sh"), Path("/bin/ls"), Path("/bin/cat"), Path("/usr/bin/env")):
        _with_libraries(path, stage)
    _with_libraries(python, stage, itself=False)
    (stage / "usr/local/bin").mkdir(parents=True)
    shutil.copy2(python, stage / "usr/local/bin/python3")
    (stage / "tmp").mkdir(mode=0o1777)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Path(sysconfig.get_path("purelib"))
    packages = (
        "torch",
        "torchgen",
        "numpy",
        "numpy.libs",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "filelock",
        "fsspec",
        "markupsafe",
    )
    found = [site / name for name in (*packages, "typing_extensions.py") if (site / name).exists()]
    for shared in sorted((stdlib / "lib-dynload").glob("*.so")):
        _with_libraries(shared, stage, itself=False)
    for shared in sorted((site / "torch").glob("lib/*.so*")) if (site / "torch").exists() else []:
        _with_libraries(shared, stage, itself=False)
    _run("umoci", "insert", "--image", image, str(stage), "/")
    _run("umoci", "insert", "--image", image, str(_without_site(stdlib, stage)), f"/usr/local/lib/{version}")
    for path in found:
        _run("umoci", "insert", "--image", image, str(path), f"/usr/local/lib/{version}/site-packages/{path.name}")
    _run("umoci", "config", "--image", image, "--config.entrypoint", "/usr/local/bin/python3")
    shutil.rmtree(stage)
    shutil.rmtree(stage.with_name(f"{stage.name}-stdlib"))
    return folder


def _without_site(stdlib: Path, stage: Path) -> Path:
    copied = stage.with_name(f"{stage.name}-stdlib")
    shutil.copytree(stdlib, copied, symlinks=True, ignore=shutil.ignore_patterns("site-packages", "test", "config-*"))
    return copied


def _with_libraries(path: Path, stage: Path, *, itself: bool = True) -> None:
    """Copy a program with what it is linked to, at the places where they are here."""
    said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, timeout=30, check=False).stdout
    libraries = [word for line in said.splitlines() for word in line.split() if word.startswith("/")]
    for one in ([str(path)] if itself else []) + [one for one in libraries if not one.startswith(sys.prefix)]:
        target = stage / one.lstrip("/")
        if not target.exists() and Path(one).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(one).resolve(), target)


# --- registries -------------------------------------------------------------------------------------------------------


class ImageRegistry:
    """A real registry: `docker-registry` on an ephemeral port of the loopback, its blobs in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        users: Mapping[str, str] | None = None,
        tokens: TokenServer | None = None,
        tls: Authority | None = None,
    ) -> None:
        self._folder = folder
        self._users = dict(users or {})
        self._tokens = tokens
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def host(self) -> str:
        """As it stands in a source."""
        return f"127.0.0.1:{self.port}"

    def source(self, name: str, *, host: str = "") -> str:
        """`name` is REPOSITORY:TAG or REPOSITORY@DIGEST."""
        return f"docker://{host or self.host}/{name}"

    def push(self, layout: Path, name: str, *, tag: str = TAG) -> str:
        """Copy an image of a layout into it; the digest of its manifest there."""
        said = self._folder / f"pushed-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        options = ["--dest-tls-verify=false"]
        if self._tokens is not None:
            options += ["--dest-creds", f"{TokenServer.USER}:{TokenServer.PASSWORD}"]
        elif self._users:
            user, password = next(iter(self._users.items()))
            options += ["--dest-creds", f"{user}:{password}"]
        with self._tokens.lasting() if self._tokens is not None else contextlib.nullcontext():
            _run(
                "skopeo", "--insecure-policy", "copy", "--quiet", "--digestfile", str(said), *options,
                f"oci:{layout}:{tag}", self.source(name),
            )  # fmt: skip
        return said.read_text().strip()

    def push_index(self, repository: str, tag: str, platforms: Mapping[str, str]) -> str:
        """An index of images that it has: platform → digest. Of a registry without passwords. The index's digest."""
        found = []
        for platform, digest in platforms.items():
            os_, architecture = platform.split("/")
            kind = "application/vnd.oci.image.manifest.v1+json"
            with self._asked("GET", f"{repository}/manifests/{digest}", headers={"Accept": kind}) as answer:
                size = len(answer.read())
            described = {"mediaType": kind, "digest": digest, "size": size}
            found.append({**described, "platform": {"os": os_, "architecture": architecture}})
        kind = "application/vnd.oci.image.index.v1+json"
        text = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": found}).encode()
        headers = {"Content-Type": kind}
        with self._asked("PUT", f"{repository}/manifests/{tag}", data=text, headers=headers):
            return f"sha256:{hashlib.sha256(text).hexdigest()}"

    def _asked(self, method: str, path: str, *, data: bytes | None = None, headers: Mapping[str, str]) -> Any:
        url = f"http://{self.host}/v2/{path}"
        request = urllib.request.Request(url, data=data, headers=dict(headers), method=method)
        return urllib.request.urlopen(request, timeout=10)

    def stop(self) -> None:
        """Its end; what it holds stays."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=_START_TIMEOUT_S)

    def __enter__(self) -> ImageRegistry:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_START_ATTEMPTS_MAX):
            (self.port,) = free_ports(1)
            if self._start():
                return self
        raise RuntimeError(f"docker-registry does not start:\n{(self._folder / 'log').read_text()[-2000:]}")

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> bool:
        config = self._folder / "config.json"
        config.write_text(json.dumps(self._config()))  # JSON is YAML
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < until_s and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def _config(self) -> dict[str, Any]:
        http: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}", "secret": "of a test"}
        if self._tls is not None:
            http["tls"] = {"certificate": str(self._tls.certificate), "key": str(self._tls.key)}
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "blobs")}, "delete": {"enabled": True}},
            "http": http,
        }
        if self._users:
            table = self._folder / "htpasswd"
            table.write_text("")
            for user, password in self._users.items():
                _run("htpasswd", "-Bb", str(table), user, password)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(table)}}
        if self._tokens is not None:
            config["auth"] = {"token": self._tokens.registry_config()}
        return config


def auth_file(path: Path, host: str, user: str, password: str) -> Path:
    """A credentials file, as `skopeo login` writes it."""
    word = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.touch(mode=0o600)
    path.write_text(json.dumps({"auths": {host: {"auth": word}}}))
    return path


class TokenServer:
    """Gives bearer tokens to who knows the password, as registries' token services do. Each is good for `life_s`.

    Source of the protocol: distribution/distribution, docs/spec/auth/token.md and jwt.md.
    """

    USER: Final = "ann"
    PASSWORD: Final = "of a test"

    def __init__(self, folder: Path, *, life_s: float = 300.0) -> None:
        self.life_s = life_s
        self.given = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._authority = make_authority(folder)
        key = serialization.load_pem_private_key(self._authority.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def registry_config(self) -> dict[str, Any]:
        """What the registry must know."""
        realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        bundle = str(self._authority.ca_file)
        return {"realm": realm, "service": "tests", "issuer": "tests", "rootcertbundle": bundle}

    @contextlib.contextmanager
    def lasting(self) -> Any:
        """Tokens live long inside the block."""
        life_s, self.life_s = self.life_s, 300.0
        try:
            yield
        finally:
            self.life_s = life_s

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve one request for a token."""
        word = base64.b64encode(f"{self.USER}:{self.PASSWORD}".encode()).decode()
        known = handler.headers.get("Authorization") == f"Basic {word}"
        scopes = parse_qs(urlsplit(handler.path).query).get("scope", [])
        body = json.dumps({"token": self._token(scopes if known else []), "expires_in": int(self.life_s)}).encode()
        self.given += 1
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _token(self, scopes: Sequence[str]) -> str:
        now = SystemClock().wall_s()
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        certificate = x509.load_pem_x509_certificate(self._authority.certificate.read_bytes())
        der = certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": "tests", "sub": self.USER, "aud": "tests", "jti": str(self.given), "access": access,
            "iat": int(now) - 300, "nbf": int(now) - 300, "exp": int(now + self.life_s) - _LEEWAY_S,
        }  # fmt: skip
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32) + s.to_bytes(32))}"

    def __enter__(self) -> TokenServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_START_TIMEOUT_S)


class SlowRelay:
    """A TCP relay to a port of this machine that sends `bytes_s` to all its clients together."""

    def __init__(self, target_port: int, bytes_s: float) -> None:
        self._target_port = target_port
        self._bytes_s = bytes_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def host(self) -> str:
        """As it stands in a source."""
        return f"127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Send nothing more, and close nothing."""
        with self._lock:
            self._free_s = float("inf")

    def __enter__(self) -> SlowRelay:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_START_TIMEOUT_S)
        for one in self._open:
            one.close()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
            except OSError:
                return
            server.settimeout(None)
            self._open += [client, server]
            self._start(self._pump, client, server, False)
            self._start(self._pump, server, client, True)

    def _pump(self, source: socket.socket, to: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(8 << 10):
                if slow:
                    self._stopped.wait(self._turn_s(len(data)))
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    def _turn_s(self, size: int) -> float:
        """Seconds until these bytes may go; the rate is what is simulated here."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s) + size / self._bytes_s
            return min(self._free_s - now_s, threading.TIMEOUT_MAX)


class NamedProxy(ConnectProxy):
    """A CONNECT proxy that finds every name at one port of this machine."""

    def __init__(self, target_port: int, *, user: str = "") -> None:
        super().__init__(user=user)
        self.target_port = target_port
        self.asked: list[str] = []

    def connect(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve one CONNECT."""
        self.asked.append(handler.path)
        handler.path = f"127.0.0.1:{self.target_port}"
        super().connect(handler)


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, timeout=60, check=True).stdout


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} failed: {done.stderr[-2000:]}")
