"""What an operator can set, from the environment (`VITRINE_...`)."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from bundle.errors import VitrineError
from bundle.images import MAX_PIXELS
from bundle.runtime import available_cores


class SettingsError(VitrineError):
    """An environment variable has a value that cannot be used."""

    code = "invalid_setting"


class Settings(BaseSettings):
    """The service's settings. Field `x` is set by the environment variable `VITRINE_X`."""

    model_config = SettingsConfigDict(env_prefix="VITRINE_", frozen=True)

    bundles: Path = Path("bundles")  # folder of <name>/<version>, or one ONNX file of a bundle
    providers: str = "cpu"  # where ONNX Runtime computes, in order of preference: "cuda,cpu"
    max_body_bytes: Annotated[int, Field(ge=1024)] = 20 * 1024 * 1024  # of one request
    max_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = MAX_PIXELS  # of one image
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 30.0  # from a request's headers to its answer
    threads: Annotated[int, Field(ge=1)] = Field(
        default_factory=available_cores
    )  # images in work at once, one core each


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
