"""What an operator can set, from the environment (`VITRINE_...`)."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bundle.errors import VitrineError
from bundle.images import MAX_PIXELS
from bundle.runtime import available_cores
from service.logs import LogFormat


class SettingsError(VitrineError):
    """An environment variable has a value that cannot be used."""

    code = "invalid_setting"


class Settings(BaseSettings):
    """The service's settings. Field `x` is set by the environment variable `VITRINE_X`."""

    model_config = SettingsConfigDict(env_prefix="VITRINE_", frozen=True)

    host: str = "127.0.0.1"  # address to listen on
    port: Annotated[int, Field(ge=1, le=65535)] = 3000  # of HTTP
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 8081  # of gRPC; 0: no gRPC

    bundles: Annotated[tuple[Path, ...], NoDecode] = (Path("bundles"),)  # folders of <name>/<version>, or ONNX files
    providers: str = "cpu"  # where ONNX Runtime computes, in order of preference: "cuda,cpu"
    model_control: bool = False  # clients may load and unload models
    poll_seconds: Annotated[float, Field(ge=0)] = 0.0  # between looks for changed bundles; 0: never

    workers: Annotated[int, Field(ge=1)] = 1  # processes
    threads: Annotated[int, Field(ge=1)] = Field(
        default_factory=available_cores
    )  # images in work at once, of a process
    max_queue: Annotated[int, Field(ge=1)] = 256  # images that may wait for a thread
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 30.0  # from a request's headers to its answer
    stuck_seconds: Annotated[float, Field(gt=0)] = 120.0  # after which a computing thread counts as stuck

    log_format: LogFormat = "auto"  # json, text, or text on a terminal only

    traces_endpoint: str = ""  # of an OTLP/HTTP collector: http://localhost:4318/v1/traces; empty: no traces
    traces_share: Annotated[float, Field(ge=0, le=1)] = (
        1.0  # of the requests that are traced, unless the client decides
    )

    max_body_bytes: Annotated[int, Field(ge=1024)] = 20 * 1024 * 1024  # of one request
    max_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = MAX_PIXELS  # of one image
    max_images: Annotated[int, Field(ge=1)] = 32  # of one request

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value


def read_settings() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: naming the variable, its value and what was expected.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        variable = f"VITRINE_{'_'.join(map(str, first['loc'])).upper()}"
        raise SettingsError(f"{variable}: {first['msg']}, found {first['input']!r}") from error
