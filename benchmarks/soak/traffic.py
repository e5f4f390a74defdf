"""The mixed traffic of the soak: what real clients send, what broken ones send, and what operators do meanwhile."""

import asyncio
import base64
import io
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import orjson
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks.serving.models import ROOT
from benchmarks.soak.attacks import leave
from benchmarks.soak.client import Client, encode_form, encode_request
from benchmarks.soak.pictures import Mutator, make_pictures, make_png
from benchmarks.soak.server import Server

INFER = "/inference.GRPCInferenceService/ModelInfer"
_CLASSIFY = "/classify?model=vit-cifar10"
_V2 = "/v2/models/vit-cifar10/infer"
_SEED = 21
_LARGE = 6000, 4000  # pixels

Ask = Callable[[int], Awaitable[str]]


class Traffic:
    """Kinds of request to a server; each takes the number of the request and returns the status of the response."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self._server, self._client = server, Client(server.port)
        self._pictures = list(make_pictures().values())
        self._mutator = Mutator(_SEED, make_pictures())
        self._photograph = (ROOT / "examples" / "blood.jpg").read_bytes()
        self._frog = (ROOT / "examples" / "frog.jpg").read_bytes()
        self._large = _large_photograph()
        self._infer = channel.unary_unary(
            INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def kinds(self) -> list[tuple[str, float, Ask, str]]:
        """Return name, requests per second, function and allowed statuses of each kind."""
        return [
            ("classify", 20, self._classify, "200"),
            ("form of four", 2, self._several, "200"),
            ("classify, JSON", 4, self._json, "200"),
            ("classify, 24 megapixels", 0.2, self._classify_large, "200"),
            ("detect", 3, self._detect, "200"),
            ("annotated", 1, self._annotated, "200"),
            ("explained", 1, self._explained, "200"),
            ("v2 binary", 5, self._v2_binary, "200"),
            ("v2 JSON", 3, self._v2_json, "200"),
            ("gRPC", 5, self._grpc, "OK"),
            ("mutations", 8, self._mutation, "200 413 415 422"),
            ("errors", 4, self._error, "expected"),
            ("cancelled", 2, self._cancelled, "gone CANCELLED OK"),
            ("models replaced", 0.05, self._replace, "200"),
            ("models controlled", 0.1, self._control, "200"),
            ("probe", 2, self._probe, "200"),
        ]

    def close(self) -> None:
        """Close the idle connections."""
        self._client.close()

    async def _ask(self, request: bytes) -> str:
        return str((await self._client.ask(request)).status)

    async def _classify(self, number: int) -> str:
        return await self._ask(encode_request("POST", _CLASSIFY, self._pictures[number % len(self._pictures)]))

    async def _classify_large(self, number: int) -> str:
        return await self._ask(encode_request("POST", _CLASSIFY, self._large))

    async def _several(self, number: int) -> str:
        body, content_type = encode_form(*[self._frog] * 4, model="vit-cifar10")
        return await self._ask(encode_request("POST", "/classify", body, Content_Type=content_type))

    async def _json(self, number: int) -> str:
        picture = base64.b64encode(self._pictures[number % len(self._pictures)]).decode()
        body = orjson.dumps({"images": [picture], "model": "vit-cifar10", "top_k": 3})
        return await self._ask(encode_request("POST", "/classify", body, Content_Type="application/json"))

    async def _detect(self, number: int) -> str:
        return await self._ask(encode_request("POST", "/detect?threshold=0.5", self._photograph))

    async def _annotated(self, number: int) -> str:
        accept = ("image/png", "image/jpeg")[number % 2]
        return await self._ask(encode_request("POST", "/detect", self._photograph, Accept=accept))

    async def _explained(self, number: int) -> str:
        if number % 3 == 2:
            query = "model=vit-cifar10&method=occlusion"
            return await self._ask(encode_request("POST", f"/explain?{query}", self._frog))
        accept = ("application/json", "image/png")[number % 3]
        query = ("model=vit-cifar10&layers=true", "model=detr-bccd&max_targets=4")[number % 3]
        picture = (self._frog, self._photograph)[number % 3]
        return await self._ask(encode_request("POST", f"/explain?{query}", picture, Accept=accept))

    async def _v2_binary(self, number: int) -> str:
        pixels = np.full((1 + number % 4, 32, 32, 3), number % 256, np.uint8)
        tensor = {"name": "pixels", "shape": pixels.shape, "datatype": "UINT8"}
        head = orjson.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.size}}]})
        length = str(len(head))
        return await self._ask(
            encode_request("POST", _V2, head + pixels.tobytes(), Inference_Header_Content_Length=length)
        )

    async def _v2_json(self, number: int) -> str:
        pixels = np.full((1, 32, 32, 3), number % 256, np.uint8)
        tensor = {"name": "pixels", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}
        return await self._ask(encode_request("POST", _V2, orjson.dumps({"inputs": [tensor]})))

    async def _grpc(self, number: int) -> str:
        code: grpc.StatusCode = await self._grpc_call().code()
        return code.name

    def _grpc_call(self, timeout: float = 60) -> grpc.aio.UnaryUnaryCall:
        request = service_pb2.ModelInferRequest(model_name="vit-cifar10")
        request.inputs.add(name="image", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(self._frog).to_bytes(4, "little") + self._frog)
        return self._infer(request, timeout=timeout)

    async def _mutation(self, number: int) -> str:
        return await self._ask(encode_request("POST", _CLASSIFY, self._mutator.make(number)[1]))

    async def _error(self, number: int) -> str:
        cases = (
            (encode_request("POST", "/classify?to_k=1", self._frog), "400"),
            (encode_request("POST", "/classify?model=cats", self._frog), "404"),
            (encode_request("GET", "/nowhere"), "404"),
            (encode_request("PUT", "/classify"), "405"),
            (encode_request("POST", "/classify", self._frog, Accept="text/html"), "406"),
            (encode_request("POST", "/classify", make_png(100_000, 100_000, empty=True)), "413"),
            (encode_request("POST", "/classify", b"no picture"), "415"),
            (encode_request("POST", "/classify", self._photograph[:2000]), "422"),
            (encode_request("POST", "/classify", b"{", Content_Type="application/json"), "400"),
            (encode_request("POST", _V2, b'{"inputs": 3}'), "400"),
        )
        request, expected = cases[number % len(cases)]
        status = await self._ask(request)
        return "expected" if status == expected else f"{status} instead of {expected}"

    async def _cancelled(self, number: int) -> str:
        if number % 4 == 3:
            call = self._grpc_call()
            await asyncio.sleep(0.001 * (number % 7))
            call.cancel()
            code: grpc.StatusCode = await call.code()
            return code.name
        whole = encode_request("POST", "/detect", self._photograph, Accept="image/png")
        sent, read = ((whole[: len(whole) // 2], 0), (whole, 0), (whole, 1000))[number % 4]
        await leave(self._server.port, sent, read=read)
        return "gone"

    async def _replace(self, number: int) -> str:
        """Add a version, or remove it; the server polls the folder. Requests must not notice."""
        await asyncio.to_thread(_toggle_version, self._server.bundles / "vit-cifar10")
        return await self._ask(encode_request("GET", "/models"))

    async def _control(self, number: int) -> str:
        """Reload one model, or unload and load another that nobody asks for."""
        target = ("vit-cifar10/load", "detr-bccd/load")[number % 2]
        return await self._ask(encode_request("POST", f"/v2/repository/models/{target}"))

    async def _probe(self, number: int) -> str:
        return await self._ask(encode_request("GET", ("/livez", "/readyz", "/metrics", "/v2/health/ready")[number % 4]))


def _toggle_version(model: Path) -> None:
    second, hidden = model / "2", model / ".2"
    if second.exists():
        second.rename(hidden)
        shutil.rmtree(hidden)
        return
    shutil.copytree(model / "1", hidden)
    manifest = json.loads((hidden / "manifest.json").read_text())
    (hidden / "manifest.json").write_text(json.dumps({**manifest, "version": "2"}))
    hidden.rename(second)


def _large_photograph() -> bytes:
    buffer = io.BytesIO()
    Image.open(ROOT / "examples" / "blood.jpg").resize(_LARGE).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
