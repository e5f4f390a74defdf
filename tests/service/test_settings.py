"""Settings from the environment and a file: precedence, validation and documentation."""

import re
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from vitrine.service.settings import FILE_VARIABLE, PREFIX, Settings, SettingsError, as_yaml, hash_key, read_settings

Run = Callable[..., str]
Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)
    monkeypatch.delenv(FILE_VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vitrine.yaml"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return path


def test_the_environment_overrides_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("max_queue: 7\nmax_images: 3\nbundles: [a, b]\ncors_origins: http://a, http://b\n")
    monkeypatch.setenv("VITRINE_MAX_QUEUE", "9")
    settings = read_settings()
    assert (settings.max_queue, settings.max_images, settings.port) == (9, 3, 3000)
    assert settings.bundles == (Path("a"), Path("b"))
    assert settings.cors_origins == ("http://a", "http://b")
    lines = as_yaml(settings).splitlines()
    assert "max_queue: 9  # VITRINE_MAX_QUEUE" in lines
    assert f"max_images: 3  # {file}" in lines
    assert "port: 3000  # default" in lines


def test_printed_settings_can_be_read_again(file: Path) -> None:
    file.write_text("port: 4000\n")
    first = read_settings()
    file.write_text(as_yaml(first))
    assert read_settings() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1\n", "unknown 'prot': did you mean 'port'? Known: host, port, "),
        ("port: 0\n", "port: Input should be greater than or equal to 1, found 0"),
        ("port: many\n", "port: Input should be a valid integer, unable to parse string as an integer, found 'many'"),
        ("- port\n", "expected a mapping of settings, found \"['port']\""),
        ("port: [\n", "expected a readable YAML file, found while parsing"),
        ("api_keys: [short]\n", "api_keys: key 1: expected at least 16 characters, found 5; `vitrine key`"),
    ],
)
def test_an_invalid_file_is_refused_by_name(content: str, message: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VITRINE_MAXQUEUE", "3", "environment: unknown 'VITRINE_MAXQUEUE': did you mean 'VITRINE_MAX_QUEUE'? Known: "),
        ("VITRINE_THREADS", "0", "VITRINE_THREADS: Input should be greater than or equal to 1, found '0'"),
        ("VITRINE_LOG_FORMAT", "xml", "VITRINE_LOG_FORMAT: Input should be 'auto', 'json' or 'text', found 'xml'"),
        ("VITRINE_PORT", "8081", "VITRINE_GRPC_PORT: expected a port other than that of HTTP, found 8081"),
        ("VITRINE_CORS_ORIGINS", "https://a.example/", "VITRINE_CORS_ORIGINS: expected * or origins such as https://"),
        ("VITRINE_API_KEYS", " ,", "VITRINE_API_KEYS: expected at least one key, found none; unset it to disable"),
        ("VITRINE_API_KEYS", f"sha256:{'0' * 63}", "VITRINE_API_KEYS: key 1: expected sha256: and 64 hexadecimal"),
        ("VITRINE_API_KEYS", "with spaces in between", "VITRINE_API_KEYS: key 1: expected ASCII letters, digits and"),
        ("VITRINE_SERVICE", "x", "environment: unknown 'VITRINE_SERVICE': did you mean"),
        (FILE_VARIABLE, "/nowhere", "/nowhere: expected a readable YAML file, found [Errno 2] No such file"),
    ],
)
def test_an_invalid_variable_is_refused_by_name(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert str(caught.value).startswith(message)


def test_kubernetes_service_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets those of two Services, vitrine and vitrine-grpc, in every pod of their namespace."""
    for service, port in (("VITRINE", "3000"), ("VITRINE_GRPC", "8081")):
        url = f"tcp://10.0.0.1:{port}"
        made = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": port, "SERVICE_PORT_HTTP": port, "PORT": url}
        parts = {"": url, "_PROTO": "tcp", "_PORT": port, "_ADDR": "10.0.0.1"}
        for name, value in {**made, **{f"PORT_{port}_TCP{part}": parts[part] for part in parts}}.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    settings = read_settings()
    assert (settings.port, settings.grpc_port) == (3000, 8081)


@pytest.mark.parametrize(
    ("host", "loopback_only"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("vm", False)],
)
def test_loopback_addresses_are_recognized(host: str, loopback_only: bool) -> None:
    assert Settings(host=host).loopback_only is loopback_only


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_the_host_may_be_a_name_or_an_ipv6_address(host: str, serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_HOST=host) as (url, grpc_url, _, lines):
        shown_host = f"[{host}]" if ":" in host else host
        port, grpc_port = url.rpartition(":")[2], grpc_url.rpartition(":")[2]
        assert f"on http://{shown_host}:{port}\n" in "".join(lines)
        assert httpx.get(f"http://{shown_host}:{port}/livez").status_code == 200
        with grpc.insecure_channel(f"{shown_host}:{grpc_port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "nowhere.invalid"], "--host: expected an address or a name of this machine, found 'nowhere."),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:3000: Cannot assign requested address; choose another"),
        (["--port", "70000"], "--port: Input should be less than or equal to 65535, found '70000'"),
        (["--port", "8081"], "VITRINE_GRPC_PORT: expected a port other than that of HTTP, found 8081"),
        (["--settings", "nowhere.yaml"], "nowhere.yaml: expected a readable YAML file, found [Errno 2]"),
    ],
)
def test_an_invalid_option_is_reported_in_one_line(arguments: list[str], message: str, run_vitrine: Run) -> None:
    printed = run_vitrine("serve", *arguments, status=1)
    assert printed.startswith(f"vitrine: {message}")
    assert len(printed.splitlines()) == 1


def test_a_grpc_port_in_use_is_refused(server: str, run_vitrine: Run, free_ports: tuple[str, ...]) -> None:
    port = server.rpartition(":")[2]
    printed = run_vitrine("serve", *free_ports[:2], "--grpc-port", port, status=1)
    sentence = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --grpc-port"
    assert printed == f"vitrine: {sentence}\n"


def test_keys_are_hashed_at_once_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_API_KEYS", f"a-long-plain-key-1, sha256:{'0' * 64}")
    settings = read_settings()
    assert settings.api_keys == (hash_key("a-long-plain-key-1"), f"sha256:{'0' * 64}")
    for text in (repr(settings), str(settings), as_yaml(settings)):
        assert "plain" not in text
        assert "sha256" not in text
    monkeypatch.setenv("VITRINE_API_KEYS", "a-long-plain-key-1,secret")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    printed_error = "".join(traceback.format_exception(caught.value))  # as printed by BentoML
    assert "plain" not in printed_error
    assert "secret" not in printed_error


def test_the_documented_settings_match_the_code(root: Path) -> None:
    rows = re.findall(r"^\| `(VITRINE_\w+)` \| (.*?) \| (.*?) \|$", (root / "docs/settings.md").read_text(), re.M)
    documented = {name: (default, meaning) for name, default, meaning in rows}
    expected = {}
    for name, field in Settings.model_fields.items():
        value = Settings().model_dump(mode="json")[name]
        separator = ":" if name == "bundles" else ","
        default = separator.join(value) if isinstance(value, list) else "" if value is None else yaml.safe_dump(value)
        shown_default = default.strip().removesuffix("\n...").strip("'")
        expected[f"{PREFIX}{name.upper()}"] = (f"`{shown_default}`" if shown_default else "", field.description)
    assert documented == expected


def test_serve_prints_its_settings_and_ends(file: Path, run_vitrine: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE)
    file.write_text("port: 4000\n")
    printed = run_vitrine("serve", "--settings", file, "--grpc-port", "0", "--print-settings")
    assert f"port: 4000  # {file}" in printed
    assert "grpc_port: 0  # --grpc-port" in printed
    assert yaml.safe_load(printed)["max_images"] == 32
