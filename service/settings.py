"""Settings of the service: environment variables (`VITRINE_...`), or a YAML file named by `VITRINE_SETTINGS`."""

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from vitrine.bundle.errors import VitrineError, unknown
from vitrine.bundle.images import MAX_PIXELS
from vitrine.bundle.loading import default_root

PREFIX = "VITRINE_"
FILE_VARIABLE = "VITRINE_SETTINGS"

LogFormat = Literal["auto", "json", "text"]

MIN_KEY_LENGTH = 16  # characters
KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_KEY = re.compile(r"[!-~]+")  # printable ASCII without spaces, valid in any header
MAX_KEY_NAME = 64  # characters

_Texts = Annotated[tuple[str, ...], NoDecode]
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+")

# Kubernetes sets such variables in each pod for every Service; a Service named vitrine(-grpc) must not break startup.
_SERVICE_LINK = re.compile(
    r"VITRINE_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.ASCII
)
_SERVICE_LINK_URL = re.compile(r"(tcp|udp|sctp)://\S+")  # value of VITRINE_PORT and VITRINE_GRPC_PORT


def hash_key(key: str) -> str:
    """Return the hash under which an API key is kept."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def is_key_name(text: str) -> bool:
    """Whether `text` can name a key in the key file and in logs: one printable word, and not a hash."""
    printable = text.isprintable() and len(text.split()) == 1
    return printable and len(text) <= MAX_KEY_NAME and "#" not in text and not text.lower().startswith("sha256:")


def as_hash(text: str) -> str:
    """Return `text` if it is a hash, else the hash of the key that it is.

    Raises:
        ValueError: it is neither a hash nor a valid key; the message does not show it.
    """
    if text.lower().startswith("sha256:"):  # a mistyped hash must not become a key
        if not KEY_HASH.fullmatch(text.lower()):
            raise ValueError("expected sha256: and 64 hexadecimal digits, found something else after sha256:")
        return text.lower()
    if len(text) < MIN_KEY_LENGTH:
        raise ValueError(
            f"expected at least {MIN_KEY_LENGTH} characters, found {len(text)}; `vitrine key` makes a good one"
        )
    if not _KEY.fullmatch(text):
        raise ValueError("expected ASCII letters, digits and signs without spaces, found others")
    return hash_key(text)


class SettingsError(VitrineError):
    """A setting is unknown or has an invalid value."""

    code = "invalid_setting"


class Settings(BaseSettings):
    """The service's settings. Field `x` is set by the environment variable `VITRINE_X`, or by `x` in the file."""

    # Validation errors would otherwise show the API keys.
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(3000, ge=1, le=65535, description="port of HTTP")
    grpc_port: int = Field(8081, ge=0, le=65535, description="port of gRPC; 0: no gRPC")

    bundles: Annotated[tuple[Path, ...], NoDecode] = Field(
        default_factory=lambda: (default_root(),),
        description="folders of `<name>/<version>`, or ONNX files of a bundle, separated by `:`; "
        "without a folder `bundles`, the shipped ones",
    )
    default_models: _Texts = Field(
        ("imagenet", "detr-voc"),
        description="models that answer where a request names none, separated by commas; else the first by name",
    )
    providers: str = Field("cpu", description="execution providers of ONNX Runtime, in order of preference: `cuda,cpu`")
    model_control: bool = Field(False, description="clients may load and unload models")
    poll_seconds: float = Field(0.0, ge=0, description="polling interval for changed bundles; 0: never")

    workers: int | None = Field(None, ge=1, description="processes; by default chosen by cores and memory")
    threads: int | None = Field(None, ge=1, description="computing threads of each process, one image and core each")
    max_queue: int = Field(256, ge=1, description="images that may wait for a thread; the next ones get 503")
    max_wait_seconds: float = Field(10.0, gt=0, description="longest expected wait of an image; else 503")
    timeout_seconds: float = Field(30.0, gt=0, le=60, description="from a request's headers to its response; else 504")
    stuck_seconds: float = Field(120.0, gt=0, description="after which `/livez` reports a thread as stuck")

    receive_seconds: float = Field(10.0, gt=0, description="for a request's headers, and for each 10 kB of its body")
    send_seconds: float = Field(60.0, gt=0, description="for a client to read its answer; else it is cut off")
    keep_alive_seconds: float = Field(75.0, gt=0, description="until an idle connection is closed")
    max_connections: int = Field(1000, ge=1, description="connections of each process; the next ones get 503")
    max_connections_per_client: int | None = Field(
        None, ge=1, description="of these, from one address; the next ones get 429; by default half of them"
    )

    max_body_bytes: int = Field(20 * 1024 * 1024, ge=1024, description="largest body of a request")
    max_bodies_bytes: int = Field(
        256 * 1024 * 1024, ge=1024, description="bodies of all requests in progress, in each process; else 503"
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=178_000_000, description="most pixels of an image")
    max_images: int = Field(32, ge=1, description="most images in a request")

    api_keys: _Texts = Field(
        (), repr=False, description="keys, or their hashes `sha256:...`, separated by commas; none: no authentication"
    )
    api_keys_file: Path | None = Field(None, description="file of hashes, reloaded when it changes")
    key_rate: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="requests per second of a key, or without keys of an address; the next ones get 429; 0: no limit",
    )
    metrics_need_key: bool = Field(False, description="`/metrics` requires a key, too")
    page: bool = Field(True, description="a page at `/` on which a person tries the models")
    cors_origins: _Texts = Field((), description="origins allowed by CORS, separated by commas; `*`: all")

    log_format: LogFormat = Field("auto", description="`json`, `text`, or `auto`: text on a terminal only")
    log_probes: bool = Field(False, description="also log requests of probes and `/metrics`")
    traces_endpoint: str = Field("", description="URL of an OTLP/HTTP collector: `http://localhost:4318/v1/traces`")
    traces_share: float = Field(1.0, ge=0, le=1, description="share of requests to trace, unless the client decides")

    @property
    def loopback_only(self) -> bool:
        """Whether the server is reachable from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name
            return self.host == "localhost"

    @field_validator("grpc_port")
    @classmethod
    def _another_port(cls, value: int, info: ValidationInfo) -> int:
        if value == info.data.get("port"):
            raise ValueError("expected a port other than that of HTTP")
        return value

    @field_validator("bundles", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return _split(value, os.pathsep)

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split_texts(cls, value: object, info: ValidationInfo) -> object:
        parts = _split(value, ",")
        if info.field_name == "api_keys" and isinstance(value, str) and not parts:
            # Keys were intended but the secret is empty: this must not open the server to everyone.
            raise ValueError("expected at least one key, found none; unset it to disable authentication")
        return parts

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        hashes = []
        for number, key in enumerate(keys, 1):
            try:
                hashes.append(as_hash(key))
            except ValueError as error:
                raise ValueError(f"key {number}: {error}") from None
        return tuple(hashes)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin.lower()):
                raise ValueError("expected * or origins such as https://app.example.com:8443, without a path")
        return tuple(origin.lower() for origin in origins)  # as browsers send them

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment override the file."""
        file = os.environ.get(FILE_VARIABLE)
        if not file:
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, file)


def _split(value: object, separator: str) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(separator) if part.strip())
    return value


def read_settings() -> Settings:
    """Read the settings of this process.

    Raises:
        SettingsError: a setting is unknown or invalid; names the variable or file, the expected and the found value.
    """
    _drop_service_links()
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {FILE_VARIABLE}
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in known:
            raise SettingsError(f"environment: {unknown(variable, sorted(known))}")
    in_file = _file_values()
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        variable = f"{PREFIX}{name.upper()}"
        from_file = name in in_file and variable not in os.environ
        place = f"{os.environ[FILE_VARIABLE]}: {name}" if from_file else variable
        found = "" if name == "api_keys" else f", found {first['input']!r}"  # a key is never shown
        raise SettingsError(f"{place}: {first['msg'].removeprefix('Value error, ')}{found}") from None


def _drop_service_links() -> None:
    """Remove Kubernetes' Service variables from the environment of this process."""
    for variable, value in list(os.environ.items()):
        is_url = variable in ("VITRINE_PORT", "VITRINE_GRPC_PORT") and _SERVICE_LINK_URL.fullmatch(value)
        if is_url or _SERVICE_LINK.fullmatch(variable):
            del os.environ[variable]


def _file_values() -> dict[str, Any]:
    """Read the settings file; empty if none is set.

    Raises:
        SettingsError: it cannot be read, is not a mapping, or has an unknown setting.
    """
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return {}
    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{file}: expected a readable YAML file, found {reason}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: expected a mapping of settings, found {str(values)[:100]!r}")
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(f"{file}: {unknown(str(name), list(Settings.model_fields))}")
    return values


def as_yaml(settings: Settings, options: Mapping[str, str] | None = None) -> str:
    """Format the settings as YAML, each with its origin as a comment; API keys are left out.

    Args:
        options: the command-line options that have set a variable, by variable.
    """
    in_file = _file_values()
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        if name == "api_keys":
            value = [f"({len(value)} of them)"] if value else []
        variable = f"{PREFIX}{name.upper()}"
        file = os.environ.get(FILE_VARIABLE)
        origin = variable if variable in os.environ else str(file) if name in in_file else "default"
        origin = (options or {}).get(variable, origin)
        lines.append(f"{name}: {json.dumps(value)}  # {origin}")  # JSON is YAML
    return "\n".join(lines)
