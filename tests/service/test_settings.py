"""Settings from the environment and a file: what holds, what is refused, what is written down."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from service.settings import FILE_VARIABLE, PREFIX, Settings, SettingsError, read_settings, shown


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


def test_the_environment_wins_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("max_queue: 7\nmax_images: 3\nbundles: [a, b]\ncors_origins: http://a, http://b\n")
    monkeypatch.setenv("VITRINE_MAX_QUEUE", "9")
    settings = read_settings()
    assert (settings.max_queue, settings.max_images, settings.port) == (9, 3, 3000)
    assert settings.bundles == (Path("a"), Path("b"))
    assert settings.cors_origins == ("http://a", "http://b")
    lines = shown(settings).splitlines()
    assert "max_queue: 9  # VITRINE_MAX_QUEUE" in lines
    assert f"max_images: 3  # {file}" in lines
    assert "port: 3000  # default" in lines


def test_what_is_shown_can_be_read_again(file: Path) -> None:
    file.write_text("port: 4000\n")
    first = read_settings()
    file.write_text(shown(first))
    assert read_settings() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1\n", "unknown 'prot': did you mean 'port'? Known: host, port, "),
        ("port: 0\n", "port: Input should be greater than or equal to 1, found 0"),
        ("port: many\n", "port: Input should be a valid integer, unable to parse string as an integer, found 'many'"),
        ("- port\n", "expected a mapping of settings, found \"['port']\""),
        ("port: [\n", "expected a readable YAML file, found while parsing"),
        ("api_keys: [short]\n", "api_keys: Value error, key 1 has fewer than 16 characters; `vitrine key` makes one"),
    ],
)
def test_a_bad_file_is_refused_by_name(content: str, message: str, file: Path) -> None:
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
        (FILE_VARIABLE, "/nowhere", "/nowhere: expected a readable YAML file, found [Errno 2] No such file"),
    ],
)
def test_a_bad_variable_is_refused_by_name(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert str(caught.value).startswith(message)


def test_keys_are_hashed_at_once_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_API_KEYS", f"a-long-plain-key-1, sha256:{'0' * 64}")
    settings = read_settings()
    assert all(key.startswith("sha256:") and len(key) == 71 for key in settings.api_keys)
    for text in (repr(settings), str(settings), shown(settings)):
        assert "plain" not in text
        assert "sha256" not in text
    monkeypatch.setenv("VITRINE_API_KEYS", "a-long-plain-key-1,secret")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "plain" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_table_of_the_guide_is_the_codes(root: Path) -> None:
    rows = re.findall(r"^\| `(VITRINE_\w+)` \| (.*?) \| (.*?) \|$", (root / "docs/settings.md").read_text(), re.M)
    documented = {name: (default, meaning) for name, default, meaning in rows}
    expected = {}
    for name, field in Settings.model_fields.items():
        value = Settings().model_dump(mode="json")[name]
        default = ":".join(value) if isinstance(value, list) else "" if value is None else yaml.safe_dump(value)
        shown_default = default.strip().removesuffix("\n...").strip("'")
        expected[f"{PREFIX}{name.upper()}"] = (f"`{shown_default}`" if shown_default else "", field.description)
    assert documented == expected


def test_serve_prints_its_settings_and_ends(
    file: Path, run_vitrine: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FILE_VARIABLE)
    file.write_text("port: 4000\n")
    printed = run_vitrine("serve", "--settings", file, "--grpc-port", "0", "--print-settings")
    assert f"port: 4000  # {file}" in printed
    assert "grpc_port: 0  # VITRINE_GRPC_PORT" in printed
    assert yaml.safe_load(printed)["max_images"] == 32
