"""Coverage-guided fuzzing of what parses a client's bytes: `python -m tests.reliability.fuzz TARGET --seconds 60`.

Atheris runs a target on mutations of its seeds, and prefers those that reach new lines. Only errors that a client is
told about are allowed. An input that ends a run is kept in the current folder.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import atheris

with atheris.instrument_imports(include=["vitrine", "python_multipart"]):
    import numpy as np
    import orjson

    from benchmarks.soak.client import encode_form
    from benchmarks.soak.pictures import make_pictures
    from vitrine.bundle import headers
    from vitrine.bundle.errors import VitrineError
    from vitrine.service.http import forms, json_body
    from vitrine.service.open_inference import grpc as protocol_grpc
    from vitrine.service.open_inference import http as protocol_http
    from vitrine.service.open_inference import open_inference_pb2 as pb

_MAX_BYTES = 8192
_SECONDS_PER_INPUT = 5
_MIB = 1024  # of memory


class Target(NamedTuple):
    """A parser, and inputs to start from."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]


def check_headers(data: bytes) -> None:
    form = headers.identify(data)
    if form is not None:
        headers.check(data, form, max_pixels=50_000_000)


def parse_protocol(data: bytes) -> None:
    """The first line is the length of the JSON document, as the header gives it."""
    length, _, body = data.partition(b"\n")
    protocol_http.parse("model", body, length.decode("latin-1") or None)


def protocol_seeds() -> Iterator[bytes]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 2, 2, 3], "parameters": {"binary_data_size": 12}}
    text = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]}
    numbers = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [[[[1, 2, 3], [4, 5, 6]]]]}
    sizes = {"name": "sizes", "datatype": "INT64", "shape": [1, 2], "data": [640, -480]}
    output = {"name": "scores", "parameters": {"binary_data": True, "classification": 3}}
    for inputs, binary in (([tensor], bytes(12)), ([text], b""), ([numbers, sizes], b"")):
        document = {"id": "a", "inputs": inputs, "outputs": [output], "parameters": {"variant": "fp32"}}
        head = json.dumps(document).encode()
        yield b"%d\n%b%b" % (len(head), head, binary)


def parse_protobuf(data: bytes) -> None:
    protocol_grpc.parse(protocol_grpc._parse_message(pb.ModelInferRequest, data))


def protobuf_seeds() -> Iterator[bytes]:
    for datatype, field, values in (("UINT8", "uint_contents", [1, 2, 3]), ("BYTES", "bytes_contents", [b"abc"])):
        request = pb.ModelInferRequest(model_name="model", id="a")
        tensor = request.inputs.add(name="pixels", datatype=datatype, shape=[1, len(values)])
        getattr(tensor.contents, field).extend(values)
        count = pb.InferParameter(int64_param=3)
        request.outputs.add(name="scores").parameters["classification"].CopyFrom(count)
        yield request.SerializeToString()
    request = pb.ModelInferRequest(model_name="model")
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\3\0\0\0abc")
    yield request.SerializeToString()


def parse_form(data: bytes) -> None:
    """The boundary is the one of the seeds."""
    try:
        for part in forms.parse_form(data, b"a-boundary-of-the-soak"):
            forms.decode(part.data)
    except forms.FormError:
        pass


def form_seeds() -> Iterator[bytes]:
    yield encode_form(image=b"\xff\xd8\xff", model="model", labels="a, b")[0]
    yield encode_form(image=b"", top_k='"3"')[0].replace(b'"a"', b'"a"\r\nContent-Type: image/jpeg; charset=punycode')


def parse_json(data: bytes) -> None:
    """Large documents are parsed in slices; with small limits, short ones are, and must give what orjson gives."""
    vars(json_body).update(SMALL=8, _SLICE=16)
    try:
        found = json_body.loads(data)
    except json_body.NotJsonError:
        found = None
    try:
        expected = orjson.loads(data)
    except ValueError:
        expected = None
    if found is not None and expected is not None:
        assert plain(found) == rounded(expected), (found, expected)
    assert found is None or expected is not None, "accepted, but it is not JSON"


def plain(value: Any) -> Any:
    """A document with lists and texts in place of their compact forms; lists of numbers are flat."""
    if isinstance(value, json_body.Numbers):
        return [float(np.float32(number)) for number in value.array.tolist()]
    if isinstance(value, json_body.LongText):
        return b"".join(value.pieces).decode()
    return rounded(value)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [plain(item) for item in value]
        nested = items and all(isinstance(item, list) for item in items)
        return [number for item in items for number in item] if nested else items
    return float(np.float32(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def json_seeds() -> Iterator[bytes]:
    yield b'{"image": "aGVsbG8gaGVsbG8gaGVsbG8gaGVsbG8=", "top_k": 3}'
    yield b'{"images": ["aGVsbG8=", "data:image/png;base64,aGVsbG8="], "labels": ["a\\u00e9", "\\"b\\\\"]}'
    yield b'{"inputs": [{"data": [[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]], "shape": [1, 2, 6]}], "a": null}'
    yield b'{"data": [1.5, -2e-3, 0.25, 1e30, 123456789012, -7, 3, 3, 3, 3, 3, 3], "b": [true, false, {}]}'


TARGETS = {
    "headers": Target(check_headers, lambda: iter(make_pictures().values())),
    "protocol": Target(parse_protocol, protocol_seeds),
    "protobuf": Target(parse_protobuf, protobuf_seeds),
    "form": Target(parse_form, form_seeds),
    "json": Target(parse_json, json_seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    target = TARGETS[options.target]

    def run(data: bytes) -> None:
        with contextlib.suppress(VitrineError):
            target.run(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={options.seconds}", f"-max_len={_MAX_BYTES}"]
        limits += [f"-timeout={_SECONDS_PER_INPUT}", f"-rss_limit_mb={_MIB}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, corpus], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
