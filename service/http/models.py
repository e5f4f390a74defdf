"""`GET /models`: the served models, and their sample images."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.loading import read_samples
from vitrine.service.http.answers import JSON, PNG, picture_response
from vitrine.service.http.schemas import ModelDescription, ModelDetail, ModelList
from vitrine.service.runtime.serving import get_serving


async def list_models(request: Request) -> Response:
    """`GET /models`: all models, by name."""
    repository = get_serving(request).repository
    defaults = repository.defaults()
    models = [
        ModelDescription.of(versions, is_default=name in defaults) for name, versions in repository.models.items()
    ]
    return Response(ModelList(models=models).model_dump_json(), media_type=JSON)


async def describe_model(request: Request) -> Response:
    """`GET /models/{name}` or `/models/{name}@{version}`: the model's manifest."""
    repository = get_serving(request).repository
    bundle = repository.get(request.path_params["name"])
    versions = [other.manifest.version for other in repository.versions(bundle.manifest.name)]
    detail = ModelDetail(versions=versions, manifest=bundle.manifest)
    return Response(detail.model_dump_json(), media_type=JSON)


async def sample(request: Request) -> Response:
    """`GET /models/{name}/samples/{number}`: an image that the model was verified with, as the network sees it.

    Raises:
        ParameterError: there is none with this number.
    """
    bundle = get_serving(request).repository.get(request.path_params["name"])
    samples = await asyncio.to_thread(read_samples, bundle)
    number = request.path_params["number"]
    if number not in map(str, range(len(samples))):
        expected = f"a number from 0 to {len(samples) - 1}" if samples else "none, as one ONNX file alone is served"
        raise ParameterError("sample", expected=expected, found=repr(number[:100]))
    return await asyncio.to_thread(picture_response, samples[int(number)], PNG)
