"""`GET /models`: the served models."""

from starlette.requests import Request
from starlette.responses import Response

from vitrine.service.http.answers import JSON
from vitrine.service.http.schemas import ModelDescription, ModelDetail, ModelList
from vitrine.service.runtime.serving import get_serving


async def list_models(request: Request) -> Response:
    """`GET /models`: all models, by name."""
    repository = get_serving(request).repository
    models = [ModelDescription.of(versions) for versions in repository.models.values()]
    return Response(ModelList(models=models).model_dump_json(), media_type=JSON)


async def describe_model(request: Request) -> Response:
    """`GET /models/{name}` or `/models/{name}@{version}`: the model's manifest."""
    repository = get_serving(request).repository
    bundle = repository.get(request.path_params["name"])
    versions = [other.manifest.version for other in repository.versions(bundle.manifest.name)]
    detail = ModelDetail(versions=versions, manifest=bundle.manifest)
    return Response(detail.model_dump_json(), media_type=JSON)
