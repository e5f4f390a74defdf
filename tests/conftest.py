"""Shared fixtures: tiny data sets, runs and bundles, made once per session by the real commands, and a real server."""

import ctypes
import fcntl
import io
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SERVING_PYTHON = ROOT / ".venv" / "bin" / "python"  # without torch; made by `make test`
SERVING = (SERVING_PYTHON, "-m", "vitrine")
SLOW_FIXTURES = {"chromium", "classifier_run", "detector_run"}
COLOURS = {"blue": (30, 60, 200), "green": (40, 170, 60), "red": (200, 40, 30)}

hypothesis.settings.register_profile("tests", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("tests")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: a second thread costs more than it gives
# Nothing may touch the user's home or leave files behind, not even while tests are collected.
_home = tempfile.TemporaryDirectory(prefix="vt-")  # short: sockets lie in it
os.environ |= {"HOME": _home.name, "TMPDIR": _home.name}
os.environ |= {"XDG_CACHE_HOME": f"{_home.name}/cache", "XDG_CONFIG_HOME": f"{_home.name}/config"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that train a network or open a browser as slow: `make test-fast` leaves them out."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Occupy the default ports: a test that starts a server on one fails, as it would beside a running `make serve`."""
    if not hasattr(config, "workerinput"):  # once, not in every process of pytest-xdist
        for port in (3000, 8081):
            listener = socket.socket()
            with suppress(OSError):  # a server is really running
                listener.bind(("127.0.0.1", port))
                listener.listen()
            config.add_cleanup(listener.close)


def find_free_ports() -> tuple[int, int]:
    """Find two ports that nobody listens on, outside the range that the system takes ports of connections from."""
    found: list[int] = []
    for port in SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
            if len(found) == 2:
                break
    return found[0], found[1]


@pytest.fixture
def free_ports() -> tuple[str, str, str, str]:
    """Options of `vitrine serve` for two free ports."""
    http, grpc = find_free_ports()
    return "--port", str(http), "--grpc-port", str(grpc)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Let file permissions apply to this thread, even if the tests are run by root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3 of the structure, this thread
    before = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: two words each, interleaved
    assert libc.capget(header, before) == 0
    words = list(struct.unpack("6I", before.raw))
    words[0] = words[3] = 0
    assert libc.capset(header, struct.pack("6I", *words)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.fixture(scope="session")
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """The context manager `without_privileges`."""
    return without_privileges


def encode(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of noisy, coloured pictures: train/, test/, three labels."""
    path = tmp_path_factory.mktemp("data") / "colours"
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for label, colour in COLOURS.items():
            folder = path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + random.normal(0, 25, (16, 20, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return path


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO data set of coloured rectangles on grey noise: train.json, val.json, test.json, images/."""
    path = tmp_path_factory.mktemp("data") / "squares"
    (path / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    categories = [{"id": 10 * (i + 1), "name": label} for i, label in enumerate(COLOURS)]
    for split, count in (("train", 24), ("val", 4), ("test", 8)):
        images, annotations = [], []
        for i in range(count):
            width, height = (96, 64) if i % 2 else (80, 72)
            pixels = random.normal(128, 12, (height, width, 3))
            for _ in range(int(random.integers(1, 4))):
                kind = int(random.integers(3))
                w, h = (int(edge) for edge in random.integers(14, 30, 2))
                x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
                pixels[y : y + h, x : x + w] = list(COLOURS.values())[kind]
                annotation = {"image_id": i, "category_id": categories[kind]["id"], "bbox": [x, y, w, h]}
                annotations.append({"id": len(annotations), "iscrowd": 0, "area": w * h, **annotation})
            name = f"{split}{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / "images" / name)
            images.append({"id": i, "file_name": name, "width": width, "height": height})
        document = {"images": images, "annotations": annotations, "categories": categories}
        (path / f"{split}.json").write_text(json.dumps(document))
    return path


TINY_VIT = (
    "model.image_size=16",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "preprocessing.input_size=[16,16]",
    "epochs=6",
    "batch_size=12",
    "seed=1",
    "optimizer=adamw",
    "lr=2e-3",
    "precision=float32",
    "augmentation.randaugment_ops=0",
)
TINY_DETR = (
    "model.num_queries=8",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.feedforward_dim=32",
    "model.backbone_layers=[1,1]",
    "model.backbone_width=8",
    "preprocessing.shortest_edge=64",
    "preprocessing.longest_edge=96",
    "epochs=4",
    "lr=2e-3",
)


TINY_EXPORT = ("--latency", "none", "--variant", "fp16-weights", "--variant", "int8-dynamic", "--max-drop", "20")


@pytest.fixture(scope="session")
def tiny_vit() -> tuple[str, ...]:
    """The settings that `classifier_run` was trained with."""
    return TINY_VIT


@pytest.fixture(scope="session")
def tiny_detr() -> tuple[str, ...]:
    """The settings that `detector_run` was trained with."""
    return TINY_DETR


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the test processes of a session share; the first one makes it, the others wait for it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def classifier_run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT trained on `colours` by `vitrine train`."""

    def train(folder: Path) -> None:
        vitrine("train", "vit_cifar10", *TINY_VIT, "--data", colours, "--out", folder / "colours")

    return make_once(tmp_path_factory, "classifier", train) / "colours"


@pytest.fixture(scope="session")
def detector_run(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DETR trained on `squares` by `vitrine train`."""

    def train(folder: Path) -> None:
        vitrine("train", "detr_bccd", *TINY_DETR, "--data", squares, "--out", folder / "squares")

    return make_once(tmp_path_factory, "detector", train) / "squares"


@pytest.fixture(scope="session")
def tiny_bundles(classifier_run: Path, detector_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundles/` with colours/1 and squares/1, exported by `vitrine export`."""

    def export(folder: Path) -> None:
        for run in (classifier_run, detector_run):
            vitrine("export", run, "--out", folder / "bundles" / run.name / "1", *TINY_EXPORT)

    return make_once(tmp_path_factory, "tiny", export) / "bundles"


def vitrine(*arguments: object, status: int = 0) -> str:
    """Run the command line in its own process; returns what it printed."""
    command = [sys.executable, "-m", "vitrine", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == status, output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="session")
def run_vitrine() -> Callable[..., str]:
    return vitrine


class Server(NamedTuple):
    """A server process."""

    url: str  # of HTTP
    grpc: str  # host:port of gRPC
    process: subprocess.Popen[str]
    lines: list[str]  # what it has printed so far


@contextmanager
def serving(
    bundles: Path, *options: str, program: Sequence[object] = SERVING, cwd: Path = ROOT, **environment: str
) -> Iterator[Server]:
    """`vitrine serve` as a process in the serving environment, on free ports, once it has reported that it is ready."""
    assert SERVING_PYTHON.exists(), f"{SERVING_PYTHON} is missing: run the tests by `make test`"
    port, grpc_port = find_free_ports()
    settings = {
        "VITRINE_BUNDLES": str(bundles),
        "VITRINE_PORT": str(port),
        "VITRINE_GRPC_PORT": str(grpc_port),
        "VITRINE_LOG_FORMAT": "text",
    }
    process = subprocess.Popen(
        [*map(str, program), "serve", *options],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    ready: queue.Queue[bool] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "ready:" in line:
                ready.put(True)
        ready.put(False)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.get(timeout=120), "".join(lines)
        yield Server(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", process, lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(timeout=10)


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    """The context manager `serving`."""
    return serving


@pytest.fixture(scope="session")
def running(tiny_bundles: Path) -> Iterator[Server]:
    """A server of the tiny bundles."""
    with serving(tiny_bundles) as running:
        yield running


@pytest.fixture(scope="session")
def server(running: Server) -> str:
    """Base URL of a server of the tiny bundles."""
    return running.url


@pytest.fixture(scope="session")
def photograph() -> bytes:
    """A real JPEG photograph of 640 x 480 pixels."""
    return (ROOT / "examples" / "blood.jpg").read_bytes()
