"""Start the server: check everything once, then hand over to BentoML."""

import atexit
import contextlib
import importlib
import math
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vitrine
from vitrine.bundle.errors import VitrineError
from vitrine.bundle.loading import find_bundles
from vitrine.bundle.machine import release_memory
from vitrine.bundle.manifest import Identity
from vitrine.bundle.repository import Repository
from vitrine.bundle.runtime import parse_providers
from vitrine.service.settings import Settings, SettingsError

# Inherited by the workers; not settings.
WORKING_DIRECTORY = "_VITRINE_WORKING_DIRECTORY"
_SHARED = "_VITRINE_SHARED"
_GRACE_SECONDS = 5  # for requests in work at shutdown, beyond their own deadline; then they are cancelled
_LONGEST_ENDPOINT = len("ipc://") + 107  # unix(7)
_CHECK_SECONDS = 10  # between looks whether the workers live, as in BentoML

_GET_BUNDLES = "`pip install vitrine-bundles` installs some, `vitrine export` writes one"


def shared_folder() -> Path:
    """Return the folder that this server's processes share; the first caller makes it, and removes it when it exits.

    Raises:
        SettingsError: no folder for temporary files can be written to.
    """
    if _SHARED not in os.environ:
        try:
            made = tempfile.mkdtemp(prefix="vitrine-")
        except OSError as error:
            raise SettingsError(f"TMPDIR: expected a folder that can be written to, found: {error}") from error
        os.environ[_SHARED] = made
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = Path(os.environ[_SHARED])
    with contextlib.suppress(OSError):  # workers start without it, too
        folder.mkdir(0o700, parents=True, exist_ok=True)  # it may have been removed
    return folder


def isolate_imports() -> None:
    """Let child processes import this very Vitrine, and nothing from the directory that they start in."""
    os.environ["PYTHONSAFEPATH"] = "1"
    checkout = Path(vitrine.__file__).resolve().parent.parent
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if (checkout / "pyproject.toml").is_file() and str(checkout) not in paths:  # it may not be installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(checkout), *paths)))


def resolve_host(host: str) -> str:
    """Return the numeric address of `host`, IPv4 if it has one: BentoML accepts only addresses.

    Raises:
        VitrineError: `host` is neither an address nor a name of this machine.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VitrineError(
            f"--host: expected an address or a name of this machine, found {host!r}: {reason}"
        ) from error
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])


def check_address(address: str, port: int, option: str) -> None:
    """Check that the server can listen there; BentoML and gRPC would fail with a traceback.

    Raises:
        VitrineError: the port is in use, or the address is not one of this machine. It suggests `option`.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        reason = f"{error.strerror}; choose another --host or {option}"
        raise VitrineError(f"cannot listen on {address}:{port}: {reason}") from error


def check_bundles(settings: Settings) -> list[Identity]:
    """Load and verify all bundles and return their manifests, so that a broken one is refused in one sentence.

    (BentoML would restart its workers endlessly.) The workers reuse the graphs prepared here, see `bundle.runtime`.

    Raises:
        BundleError, ProviderError: as `Repository`.
        SettingsError: there is no bundle, or no folder for temporary files can be written to.
    """
    if not any(root.is_file() or (root.is_dir() and find_bundles(root)) for root in settings.bundles):
        roots = ", ".join(map(str, settings.bundles))
        raise SettingsError(f"VITRINE_BUNDLES: expected bundles, found none in {roots}; {_GET_BUNDLES}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds; BentoML sets its own later
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    # Servers that share BentoML's home share the files of its metrics, and each deletes them when it starts.
    os.environ["BENTOML_HOME"] = str(shared_folder() / "bentoml")
    providers = parse_providers(settings.providers)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(Repository, *settings.bundles, providers=providers, cache=shared_folder())
        importlib.import_module("_bentoml_impl.server.serving")  # takes as long, and has to be done in any case
        manifests = [bundle.manifest for bundle in loading.result().bundles.values()]
    del loading
    release_memory()  # this process does not compute
    return manifests


def keep_control_private() -> None:
    """Let BentoML's arbiter, which starts the workers, be controlled by sockets that only this user can reach.

    BentoML picks two TCP ports and frees them until the arbiter binds them: another process may take one meanwhile,
    which ends the server with a traceback, and any user of the machine can stop the server through them.
    """
    circus: Any = importlib.import_module("bentoml._internal.utils.circus")
    endpoints = [f"ipc://{shared_folder() / name}" for name in ("control", "events")]
    if any(len(os.fsencode(endpoint)) > _LONGEST_ENDPOINT for endpoint in endpoints):
        endpoints = ["tcp://127.0.0.1:*"] * 2  # ports that are chosen when they are bound

    def create(watchers: list[Any], *, threaded: bool = False, **options: Any) -> Any:
        kind = circus.ThreadedArbiter if threaded else circus.Arbiter
        return kind(watchers, *endpoints, check_delay=_CHECK_SECONDS, **options)

    circus.create_standalone_arbiter = create


def run(settings: Settings, address: str) -> None:
    """Serve until a signal arrives. `address` is the numeric address of the host.

    BentoML puts its working directory first on Python's path, and starts its workers there. It gets one that always
    exists and never holds modules, so that none of the user's project takes the place of one that the server imports;
    `service.service` returns to the user's, for relative paths.
    """
    os.environ["VITRINE_HOST"] = address
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # NumPy's pool: nothing here uses it
        os.environ.setdefault(variable, "1")
    os.environ[WORKING_DIRECTORY] = os.getcwd()
    sys.argv = ["bentoml", "serve", "vitrine.service.service:vitrine", "--working-dir", str(Path(os.devnull).parent)]
    sys.argv += ["--host", address, "--port", str(settings.port)]
    sys.argv += ["--timeout-graceful-shutdown", str(math.ceil(settings.timeout_seconds) + _GRACE_SECONDS)]
    keep_control_private()
    runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
