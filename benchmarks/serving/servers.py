"""Start, query and stop the servers."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.serving.models import ROOT, WORK, Model
from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import Bundle, load_bundle, load_file
from vitrine.bundle.manifest import DetectionPreprocessing

PORT = 3990
_PEERS = Path(__file__).parent / "peers"
_BOUNDARY = "a-boundary-of-the-benchmark"


@dataclass(frozen=True)
class Request:
    """A POST request."""

    path: str
    body: bytes
    headers: str  # `name: value`, one per line


@dataclass(frozen=True)
class Server:
    """How to start and query a server."""

    name: str
    command: Callable[[Model], list[str]]
    ready: str  # path that returns 200 once the server is ready
    request: Callable[[Model], Request]
    health: str = ""  # path of the health probe
    score: Callable[[bytes], float] = lambda body: 0.0  # best score in a response
    environment: Callable[[Model], dict[str, str]] = lambda model: {}


@dataclass
class Running:
    """A started server."""

    process: subprocess.Popen[bytes]
    seconds: float  # from start until ready

    def memory(self) -> float:
        """Return the memory of all its processes in MiB; shared pages count once."""
        root = psutil.Process(self.process.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # the process has just ended
                continue
        return total / 2**20


@contextmanager
def running(server: Server, model: Model) -> Iterator[Running]:
    """Start a server and wait until it is ready; stop it and all its processes at the end of the block."""
    environment = {**os.environ, **server.environment(model)}
    log = (WORK / f"{server.name}.out").open("wb")
    start = time.perf_counter()
    process = subprocess.Popen(
        server.command(model),
        cwd=WORK if server.name in PEERS else ROOT,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        while not _is_ready(server.ready):
            if process.poll() is not None or time.perf_counter() - start > 120:
                raise RuntimeError(f"{server.name} did not start, see {log.name}")
            time.sleep(0.02)
        yield Running(process, time.perf_counter() - start)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([psutil.Process(process.pid), *children] if process.poll() is None else children, timeout=10)
        for child in children:
            if child.is_running():
                child.kill()
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()
        while not _is_free():
            time.sleep(0.05)


def _is_ready(path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=20) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _is_free() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) != 0


def send(request: Request) -> bytes:
    """Send a request; return the response body."""
    headers = dict(line.split(": ", 1) for line in request.headers.splitlines())
    post = urllib.request.Request(f"http://127.0.0.1:{PORT}{request.path}", request.body, headers)
    with urllib.request.urlopen(post, timeout=60) as response:
        body: bytes = response.read()
        return body


def load(model: Model) -> Bundle:
    """Load a model's bundle."""
    return load_file(model.bundle) if model.bundle.is_file() else load_bundle(model.bundle)


def expected(model: Model) -> float:
    """The best score of a correct response."""
    predictor = load(model).predictor
    image = predictor.prepare(decode_for(model.image.read_bytes(), predictor.preprocessing))
    return float(max(predictor.infer([image])[0][0]))  # type: ignore[list-item]


def _vitrine_environment(model: Model) -> dict[str, str]:
    root = WORK / "roots" / model.name  # serves only this bundle, as the other servers have one model
    if not model.bundle.is_file() and not root.exists():
        root.mkdir(parents=True)
        (root / model.name).symlink_to(model.bundle.parent)
    bundles = model.bundle if model.bundle.is_file() else root
    environment = {"VITRINE_BUNDLES": str(bundles), "VITRINE_PORT": str(PORT), "VITRINE_GRPC_PORT": "0"}
    if model.name == "no-op":
        # no collector: recording spans costs the same
        environment |= {"VITRINE_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces", "VITRINE_TRACES_SHARE": "0.01"}
    return environment


def _peer_environment(model: Model) -> dict[str, str]:
    manifest = load(model).manifest
    preprocessing = manifest.preprocessing
    if isinstance(preprocessing, DetectionPreprocessing):
        size = f"{preprocessing.shortest_edge},{preprocessing.longest_edge}"
    else:
        size = str(preprocessing.input_size[0])
    graph = model.bundle if model.bundle.is_file() else model.bundle / "model.onnx"
    return {
        "MODEL": str(graph),
        "TASK": manifest.task.value,
        "SIZE": size,
        "INTERPOLATION": preprocessing.interpolation.value,
        "PORT": str(PORT),
        "PYTHONPATH": str(_PEERS),
    }


def _peer(name: str) -> Callable[[Model], list[str]]:
    def command(model: Model) -> list[str]:
        python = WORK / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(WORK / name)], check=True)
            requirements = str(_PEERS / f"{name}.txt")
            subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True)
        return [str(python), str(_PEERS / f"{name}_server.py")]

    return command


def _raw(path: str) -> Callable[[Model], Request]:
    return lambda model: Request(path, model.image.read_bytes(), "Content-Type: image/jpeg")


def _multipart(path: str, field: str) -> Callable[[Model], Request]:
    def request(model: Model) -> Request:
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="a.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        body = head.encode() + model.image.read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode()
        return Request(path, body, f"Content-Type: multipart/form-data; boundary={_BOUNDARY}")

    return request


def _mlserver_request(model: Model) -> Request:
    entry = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
    data = base64.b64encode(model.image.read_bytes()).decode()
    body = json.dumps({"inputs": [{**entry, "data": [data]}]}).encode()
    return Request("/v2/models/model/infer", body, "Content-Type: application/json")


def _binary(path: str, tensor: dict[str, object], data: bytes, outputs: list[str]) -> Request:
    requested = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    entry = {**tensor, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [entry], "outputs": requested}).encode()
    headers = f"Content-Type: application/octet-stream\nInference-Header-Content-Length: {len(head)}"
    return Request(path, head + data, headers)


def _triton_request(model: Model) -> Request:
    image = model.image.read_bytes()
    tensor: dict[str, object] = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
    data = len(image).to_bytes(4, "little") + image
    return _binary("/v2/models/model/infer", tensor, data, ["answer"])


def pixels(model: Model) -> np.ndarray:  # type: ignore[type-arg]
    """Return a classifier's test image as the input of its network."""
    predictor = load(model).predictor
    prepared = predictor.prepare(decode_for(model.image.read_bytes(), predictor.preprocessing))
    assert isinstance(prepared, np.ndarray)
    return prepared


def _tensor_request(model: Model) -> Request:
    image = pixels(model)
    tensor: dict[str, object] = {"name": "pixels", "shape": [1, *image.shape], "datatype": "UINT8"}
    return _binary(f"/v2/models/{model.name}/infer", tensor, image.tobytes(), ["probabilities"])


def _best_score(body: bytes) -> float:
    """Return the best score in a JSON response of any of the servers."""
    return max(map(float, re.findall(rb'(?:probability|score)[\\\\]*": *([0-9.e-]+)', body)))


def _vitrine(name: str, request: Callable[[Model], Request], score: Callable[[bytes], float] = _best_score) -> Server:
    return Server(
        name,
        lambda model: [str(ROOT / ".venv" / "bin" / "python"), "-m", "vitrine", "serve"],
        "/readyz",
        request,
        "/livez",
        score,
        _vitrine_environment,
    )


def _best_in_tensor(body: bytes) -> float:
    """Return the maximum of the float32 tensor after the JSON document of a binary response."""
    length = json.JSONDecoder().raw_decode(body.decode("latin-1"))[1]
    return float(np.frombuffer(body[length:], "<f4").max())


SERVERS = {
    server.name: server
    for server in (
        _vitrine("vitrine", lambda model: _raw(model.route)(model)),
        _vitrine("vitrine, multipart", lambda model: _multipart(model.route, "image")(model)),
        _vitrine("vitrine, v2 binary", _tensor_request, _best_in_tensor),
        Server(
            "fastapi",
            _peer("fastapi"),
            "/docs",
            _multipart("/predict", "image"),
            "/docs",
            _best_score,
            _peer_environment,
        ),
        Server(
            "litserve",
            _peer("litserve"),
            "/health",
            _multipart("/predict", "request"),
            "/health",
            _best_score,
            _peer_environment,
        ),
        Server(
            "mlserver",
            _peer("mlserver"),
            "/v2/models/model/ready",
            _mlserver_request,
            "/v2/health/live",
            _best_score,
            _peer_environment,
        ),
        Server(
            "triton",
            _peer("triton"),
            "/v2/models/model/ready",
            _triton_request,
            "/v2/health/live",
            _best_score,
            _peer_environment,
        ),
        Server("ray", _peer("ray"), "/-/healthz", _raw("/"), "/-/healthz", _best_score, _peer_environment),
    )
}
PEERS = ("fastapi", "litserve", "mlserver", "triton", "ray")
