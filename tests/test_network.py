"""No outgoing connection: a real server in a network namespace whose only way out is a device that the test reads.

Run as a program it is the part inside the namespace, with the folder of bundles as its argument.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc

ROOT = Path(__file__).parent.parent
OUTSIDE, OUTSIDE_6, NAME_SERVER = "192.0.2.1", "2001:db8::1", "192.0.2.53"  # reserved for documentation: nobody's
KEY = "a-key-of-the-tests-1"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_ICMPV6 = 58  # the kernel's own neighbour discovery


def open_way_out() -> int:
    """Bring up loopback, and a device that all other addresses, a name server's too, are routed to; return its file."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"out", _IFF_TUN | _IFF_NO_PI))
    for command in (
        "link set lo up",
        "link set out up",
        "address add 10.255.0.1/24 dev out",
        "-6 address add fd00::1/64 dev out nodad",
        "route add default dev out",
        "-6 route add default dev out",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    with tempfile.NamedTemporaryFile("w") as file:  # the machine's own may be at a loopback address
        file.write(f"nameserver {NAME_SERVER}\noptions timeout:1 attempts:1\n")
        file.flush()
        subprocess.run(["mount", "--bind", file.name, "/etc/resolv.conf"], check=True)
    return tun


def packets(tun: int) -> list[str]:
    """Destinations of the packets that wanted to leave since the last call, without neighbour discovery."""
    found = []
    while True:
        try:
            packet = os.read(tun, 65536)
        except BlockingIOError:
            return found
        if packet[0] >> 4 == 4:
            found.append(socket.inet_ntoa(packet[16:20]))
        elif packet[6] not in (0, _ICMPV6):  # 0: multicast listener reports
            found.append(socket.inet_ntop(socket.AF_INET6, packet[24:40]))


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def main(bundles: Path) -> None:
    tun = open_way_out()
    seen: dict[str, list[str]] = {}

    # The check can fail: connections and a look-up are seen. Nothing answers them.
    for family, address in ((socket.AF_INET, OUTSIDE), (socket.AF_INET6, OUTSIDE_6)):
        with socket.socket(family, socket.SOCK_STREAM) as out:
            out.setblocking(False)
            out.connect_ex((address, 443))
    with suppress(socket.gaierror):
        socket.getaddrinfo("example.com", 443)
    seen["deliberate"] = packets(tun)

    settings = {
        "VITRINE_BUNDLES": str(bundles),
        "VITRINE_MODEL_CONTROL": "true",
        "VITRINE_POLL_SECONDS": "0.2",
        "VITRINE_API_KEYS": KEY,
    }
    server = subprocess.Popen(
        [ROOT / ".venv/bin/python", "-m", "vitrine", "serve"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, lines = server.stdout, list[str]()
    assert output is not None
    threading.Thread(target=lambda: lines.extend(output), daemon=True).start()
    try:
        wait_until(lambda: any("ready:" in line for line in lines))
        seen["start"] = packets(tun)
        headers, picture = {"X-API-Key": KEY}, (ROOT / "examples/blood.jpg").read_bytes()
        with httpx.Client(base_url="http://127.0.0.1:3000", headers=headers, timeout=60, trust_env=False) as client:
            assert client.post("/classify", content=picture).status_code == 200
            remote = {"image": "http://192.0.2.1/picture.jpg"}
            assert client.post("/classify", json=remote).status_code == 400
            for path in ("/", "/metrics", "/livez", "/v2", "/schema.json"):
                assert client.get(path).status_code == 200
            seen["HTTP"] = packets(tun)
            assert client.post("/v2/repository/models/colours/load").status_code == 200
            seen["reload"] = packets(tun)
        with tritonclient.grpc.InferenceServerClient("127.0.0.1:8081") as grpc_client:
            tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([picture], dtype=object))
            assert grpc_client.infer("colours", [tensor], headers={"x-api-key": KEY}).get_response()
        seen["gRPC"] = packets(tun)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        seen["shutdown"] = packets(tun)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            print("".join(lines), file=sys.stderr)
    print(json.dumps(seen))


def test_the_server_connects_to_nobody(tiny_bundles: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    probe = [*namespace, "sh", "-c", ": <> /dev/net/tun && ip link"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs Linux, its namespaces (of users, mounts and networks), /dev/net/tun and ip")
    command = [*namespace, sys.executable, __file__, str(tiny_bundles)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert set(seen.pop("deliberate")) == {OUTSIDE, OUTSIDE_6, NAME_SERVER}
    assert seen == {phase: [] for phase in ("start", "HTTP", "reload", "gRPC", "shutdown")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
