"""The protocol over gRPC, tested with Triton's client."""

import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from vitrine.bundle.images import decode_for
from vitrine.bundle.loading import load_bundle
from vitrine.bundle.manifest import Precision

Serving = Callable[..., AbstractContextManager[Any]]
SERVICE = "inference.GRPCInferenceService"


@pytest.fixture
def client(running: Any) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(running.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def channel(running: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.grpc) as channel:
        yield channel


def infer_method(channel: grpc.Channel) -> Callable[..., Any]:
    """`ModelInfer` with raw messages."""
    return channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )


def images_input(*images: bytes) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object))
    return tensor


def test_the_server_and_its_models_describe_themselves(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("cats")
    assert client.get_server_metadata().name == "vitrine"
    metadata = client.get_model_metadata("colours")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("pixels", "UINT8", [-1, 16, 16, 3]),
        ("image", "BYTES", [-1]),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("probabilities", "FP32", [-1, 3])]


@pytest.mark.parametrize("variant", [Precision.FP32, Precision.INT8_DYNAMIC])
def test_both_transports_and_the_predictor_give_the_same_answer(
    variant: Precision, client: triton.InferenceServerClient, server: str, tiny_bundles: Path, photograph: bytes
) -> None:
    parameters = {"variant": variant.value}
    tensor = images_input(photograph, photograph)
    classifier = load_bundle(tiny_bundles / "colours" / "1", variant=variant).predictor
    response = client.infer("colours", [tensor], model_version="1", parameters=parameters, request_id="mine")
    assert response.get_response().id == "mine"
    expected = classifier.probabilities([decode_for(photograph, classifier.preprocessing)])
    np.testing.assert_allclose(response.as_numpy("probabilities"), np.repeat(expected, 2, axis=0), atol=1e-6)
    over_http = httpx.post(f"{server}/classify?variant={variant.value}", content=photograph).json()["predictions"]
    by_class = sorted(over_http, key=lambda entry: entry["class_id"])
    assert [entry["probability"] for entry in by_class] == pytest.approx(expected[0].tolist(), abs=1e-6)

    found = client.infer("squares", [tensor], parameters=parameters)
    query = f"variant={variant.value}&threshold=0"
    objects = httpx.post(f"{server}/detect?{query}", content=photograph).json()["detections"]
    order = np.argsort(-found.as_numpy("scores")[0], kind="stable")
    assert found.as_numpy("scores")[0][order].tolist() == pytest.approx([o["score"] for o in objects], abs=1e-6)
    boxes = found.as_numpy("boxes")[0][order] * [640, 480, 640, 480]
    np.testing.assert_allclose(boxes, [list(o["box"].values()) for o in objects], atol=1e-3)


def test_tensors_in_contents_are_read_like_raw_ones(channel: grpc.Channel, tiny_bundles: Path) -> None:
    pixels = np.arange(768, dtype=np.uint8).reshape(1, 16, 16, 3)
    (expected,) = load_bundle(tiny_bundles / "colours" / "1").predictor.network(pixels=pixels)
    request = service_pb2.ModelInferRequest(model_name="colours")
    entry = request.inputs.add(name="pixels", datatype="UINT8", shape=pixels.shape)
    entry.contents.uint_contents.extend(pixels.ravel().tolist())
    response = infer_method(channel)(request)
    values = np.frombuffer(response.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(values, expected[0], atol=1e-6)


def test_classification_returns_labels(client: triton.InferenceServerClient, photograph: bytes) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=9)]
    response = client.infer("colours", [images_input(photograph)], outputs=outputs).as_numpy("probabilities")
    assert response.shape == (1, 3)
    assert {text.decode().split(":")[2] for text in response[0]} == {"blue", "green", "red"}


def infer_error(
    client: triton.InferenceServerClient, *inputs: triton.InferInput, model: str = "colours", **more: Any
) -> str:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, list(inputs), **more)
    return f"{caught.value.status()} {caught.value.message()}"


def test_errors_have_grpc_statuses_and_a_message(client: triton.InferenceServerClient, photograph: bytes) -> None:
    pixels = triton.InferInput("pixels", [1, 2, 2, 3], "UINT8")
    pixels.set_data_from_numpy(np.zeros((1, 2, 2, 3), np.uint8))
    good = images_input(photograph)
    cases = [
        (
            infer_error(client, good, model="cats"),
            "StatusCode.NOT_FOUND no model named 'cats' here; available: colours",
        ),
        (
            infer_error(client, good, model_version="7"),
            "StatusCode.NOT_FOUND no model named 'colours@7' here; available: ",
        ),
        (
            infer_error(client, pixels),
            "StatusCode.INVALID_ARGUMENT input pixels: shape: expected [batch, 16, 16, 3], found",
        ),
        (infer_error(client, images_input(b"no")), "StatusCode.INVALID_ARGUMENT image: expected one of JPEG"),
        (
            infer_error(client, *[good] * 2),
            "StatusCode.INVALID_ARGUMENT inputs: expected each name once, found image, image",
        ),
        (
            infer_error(client, images_input(*[b"x"] * 33)),
            "StatusCode.INVALID_ARGUMENT inputs: expected 1 to 32 images",
        ),
        (
            infer_error(client, good, parameters={"variant": 3}),
            "StatusCode.INVALID_ARGUMENT variant: expected text, found 3",
        ),
        (infer_error(client, images_input(bytes(22_000_000))), "StatusCode.RESOURCE_EXHAUSTED"),
    ]
    for found, expected in cases:
        assert found.startswith(expected)
    with pytest.raises(InferenceServerException, match="VITRINE_MODEL_CONTROL=true enables it") as caught:
        client.unload_model("colours")
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"


texts = st.sampled_from(["pixels", "image", "UINT8", "BYTES", "INT64", "FP32", "probabilities"]) | st.text(max_size=5)
edges = st.sampled_from([-1, 0, 1, 3, 16, 2**40, -(2**63)])
parameter = st.one_of(
    st.builds(lambda value: {"int64_param": value}, st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda value: {"string_param": value}, st.text(max_size=5)),
    st.builds(lambda value: {"double_param": value}, st.floats()),
    st.just({}),
)
parameters = st.dictionaries(st.sampled_from(["variant", "classification", "x"]), parameter, max_size=2)
contents = st.fixed_dictionaries(
    {},
    optional={
        "uint_contents": st.lists(st.integers(0, 300), max_size=4),
        "int64_contents": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
        "fp32_contents": st.lists(st.floats(width=32), max_size=4),
        "bytes_contents": st.lists(st.binary(max_size=4), max_size=4),
    },
)
tensors = st.fixed_dictionaries(
    {"name": texts, "datatype": texts, "shape": st.lists(edges, max_size=5)},
    optional={"contents": contents, "parameters": parameters},
)
messages = st.fixed_dictionaries(
    {
        "model_name": st.sampled_from(["colours", "squares", "colours@1"]) | texts,
        "inputs": st.lists(tensors, max_size=3),
    },
    optional={
        "model_version": st.sampled_from(["", "1", "-1", "x"]),
        "raw_input_contents": st.lists(st.binary(max_size=20) | st.just(bytes(768)), max_size=3),
        "outputs": st.lists(st.fixed_dictionaries({"name": texts, "parameters": parameters}), max_size=2),
        "parameters": parameters,
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages)
def test_no_message_causes_a_server_error(channel: grpc.Channel, message: dict[str, Any]) -> None:
    code, sentence = grpc.StatusCode.OK, "fine"
    try:
        infer_method(channel)(service_pb2.ModelInferRequest(**message), timeout=30)
    except grpc.RpcError as error:
        code, sentence = error.code(), error.details()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), sentence
    assert 0 < len(sentence) < 1000


def test_tensors_are_raw_or_in_contents_but_not_both(channel: grpc.Channel) -> None:
    request = service_pb2.ModelInferRequest(model_name="colours", raw_input_contents=[bytes(768)])
    entry = request.inputs.add(name="pixels", datatype="UINT8", shape=[1, 16, 16, 3])
    assert len(infer_method(channel)(request).raw_output_contents) == 1
    entry.contents.uint_contents.extend([0] * 768)
    with pytest.raises(grpc.RpcError, match="inputs: expected raw_input_contents or contents, found both"):
        infer_method(channel)(request)


def test_the_size_limit_applies_to_the_decompressed_message(client: triton.InferenceServerClient) -> None:
    for algorithm in ("gzip", "deflate"):
        found = infer_error(client, images_input(bytes(40_000_000)), compression_algorithm=algorithm)
        assert found == "StatusCode.RESOURCE_EXHAUSTED Decompressed message larger than max"


def test_many_empty_elements_are_refused_quickly(client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor._raw_content = bytes(20_000_000)  # five million empty elements
    assert infer_error(client, tensor).startswith(
        "StatusCode.INVALID_ARGUMENT input image: data: expected 1 images for its"
    )


def test_calls_in_progress_finish_when_the_server_stops(
    serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]
) -> None:
    with (
        serve(slow_bundle, VITRINE_THREADS="2") as running,
        triton.InferenceServerClient(running.grpc) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        calls = [pool.submit(client.infer, "slow", [images_input(bright(200))]) for _ in range(2)]
        while "vitrine_running_images 2.0" not in httpx.get(f"{running.url}/metrics").text:
            pass
        running.process.send_signal(signal.SIGTERM)
        assert [call.result().as_numpy("probabilities").tolist() for call in calls] == [[[0.5, 0.5]]] * 2
        assert running.process.wait(timeout=30) == 0
    assert "Traceback" not in "".join(running.lines)


def test_the_repository_is_controlled_by_the_client(serve: Serving, tiny_bundles: Path) -> None:
    with (
        serve(tiny_bundles, VITRINE_MODEL_CONTROL="true") as running,
        triton.InferenceServerClient(running.grpc) as client,
    ):
        client.unload_model("squares")
        assert not client.is_model_ready("squares")
        states = {entry.name: (entry.state, entry.reason) for entry in client.get_model_repository_index().models}
        assert states == {"colours": ("READY", ""), "squares": ("UNAVAILABLE", "unloaded")}
        client.load_model("squares")
        assert client.is_model_ready("squares")


def test_a_timeout_is_deadline_exceeded(serve: Serving, slow_bundle: Path, bright: Callable[[int], bytes]) -> None:
    with (
        serve(slow_bundle, VITRINE_TIMEOUT_SECONDS="0.2") as running,
        triton.InferenceServerClient(running.grpc) as client,
    ):
        found = infer_error(client, images_input(bright(200)), model="slow")
        assert found == "StatusCode.DEADLINE_EXCEEDED the request was not answered in time"


def test_two_workers_share_the_port(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_WORKERS="2") as running:
        for _ in range(10):  # a new connection each time
            with triton.InferenceServerClient(running.grpc) as client:
                assert client.is_model_ready("colours")


def test_standard_health_and_reflection_are_available(running: Any) -> None:
    with grpc.insecure_channel(running.grpc) as channel:
        for service in ("", SERVICE):
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_port_0_disables_grpc(serve: Serving, tiny_bundles: Path) -> None:
    with serve(tiny_bundles, VITRINE_GRPC_PORT="0") as running, triton.InferenceServerClient(running.grpc) as client:
        assert httpx.get(f"{running.url}/readyz").status_code == 200
        with pytest.raises(InferenceServerException):
            client.is_server_live()


def test_a_port_in_use_is_refused(
    running: Any,
    run_vitrine: Callable[..., str],
    free_ports: tuple[str, ...],
    tiny_bundles: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VITRINE_BUNDLES", str(tiny_bundles))
    port = running.grpc.rpartition(":")[2]
    printed = run_vitrine("serve", *free_ports[:2], "--grpc-port", port, status=1)
    assert f"vitrine: cannot listen on 127.0.0.1:{port}: Address already in use" in printed


def test_the_messages_are_compatible_with_tritons(root: Path) -> None:
    """Runs in separate processes: one process can hold only one definition of a message."""
    program = """
from vitrine.service.open_inference import open_inference_pb2 as own

def walk(message):
    for field in message.fields:
        print(message.full_name, field.name, field.number, field.type, field.is_repeated)
    for nested in message.nested_types:
        walk(nested)
for message in own.DESCRIPTOR.message_types_by_name.values():
    walk(message)
"""
    theirs = program.replace("service import open_inference_pb2", "tritonclient.grpc import service_pb2")
    printed = []
    for text in (program, theirs):
        command = [sys.executable, "-c", text]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        printed.append(set(result.stdout.splitlines()))
    assert len(printed[0]) > 60
    assert printed[0] <= printed[1]


def test_the_generated_code_matches_the_proto_file(root: Path, tmp_path: Path) -> None:
    folder = Path("vitrine", "service", "open_inference")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", str(folder / "open_inference.proto")]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi")]
    subprocess.run(command, cwd=root, check=True)
    made = sorted((tmp_path / folder).iterdir())
    assert len(made) == 2
    for file in made:
        assert file.read_text() == (root / folder / file.name).read_text(), f"run `make proto`: {file.name}"


def raw_method(channel: grpc.Channel, name: str) -> Callable[..., Any]:
    """A method that takes and returns bytes."""
    return channel.unary_unary(f"/{SERVICE}/{name}")


METHODS = [method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]


@pytest.mark.parametrize(
    "garbage",
    [b"\xff", b"\xff" * 100, b"\x0a\x05ab", b"\x0b", b"\x80", b"\x2a\x02\xff\xff", b"\x0a\x01\xff"],
    ids=["tag", "many tags", "short", "group", "varint", "nested", "not UTF-8"],
)
def test_garbage_is_an_invalid_argument(garbage: bytes, channel: grpc.Channel, server: str) -> None:
    before = httpx.get(f"{server}/metrics").text
    with pytest.raises(grpc.RpcError) as error:
        raw_method(channel, "ModelInfer")(garbage)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith("message: expected a protobuf inference.ModelInferRequest, found none")
    pattern = r'vitrine_requests_total{model="",route="/\S+/ModelInfer",status="INVALID_ARGUMENT",version=""} (\S+)'
    counts = [float((re.findall(pattern, text) or ["0"])[0]) for text in (before, httpx.get(f"{server}/metrics").text)]
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize("name", sorted({*METHODS} & {"ServerLive", "ServerReady", "ModelReady", "ModelMetadata"}))
def test_garbage_is_refused_by_every_method(name: str, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        raw_method(channel, name)(b"\xff\xff")
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (b"\x2a\x00" * 1001, "found 2002 bytes in 1001 fields"),  # empty inputs
        (b"\x2a\x84\x80\x80\x01" + b"\x22\x00" * (1024 * 1024 + 2), "found 2097161 bytes in 1 fields"),  # parameters
    ],
)
def test_a_message_that_would_take_many_times_its_size_is_refused(
    message: bytes, found: str, channel: grpc.Channel
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        raw_method(channel, "ModelInfer")(message)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = "message: expected at most 1048576 bytes besides raw_input_contents, in at most 1000 fields, "
    assert error.value.details() == expected + found


def start_without_end(channel: grpc.Channel, name: str, metadata: Sequence[tuple[str, str]] = ()) -> grpc.Future:
    """Start a call whose message does not arrive."""
    endless = threading.Event()
    call = channel.stream_unary(f"/{SERVICE}/{name}").future(iter(endless.wait, True), metadata=metadata)
    call.add_done_callback(lambda _: endless.set())
    return call


@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive"])
def test_a_call_without_a_message(name: str, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        channel.stream_unary(f"/{SERVICE}/{name}")(iter(()))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details() == "message: expected one, found none"


def test_messages_that_do_not_arrive_hold_nobody_up(serve: Serving, tiny_bundles: Path) -> None:
    limits = {"VITRINE_RECEIVE_SECONDS": "2", "VITRINE_MAX_BODIES_BYTES": str(50 * 1024 * 1024)}
    with (
        serve(tiny_bundles, VITRINE_API_KEYS="a-key-of-the-tests-1", **limits) as running,
        grpc.insecure_channel(running.grpc) as channel,
    ):
        stranger = start_without_end(channel, "ModelInfer")
        assert stranger.exception(timeout=30).code() is grpc.StatusCode.UNAUTHENTICATED
        key = [("x-api-key", "a-key-of-the-tests-1")]
        calls = [start_without_end(channel, "ModelInfer", key) for _ in range(4)]
        codes = Counter(call.exception(timeout=30).code() for call in calls)
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED: 1, grpc.StatusCode.UNAVAILABLE: 3}
        assert raw_method(channel, "ModelReady")(
            service_pb2.ModelReadyRequest(name="colours").SerializeToString(), metadata=key
        )


def test_metadata_has_a_bound(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        raw_method(channel, "ServerLive")(b"", metadata=[("x-large", "a" * 40_000)])
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
