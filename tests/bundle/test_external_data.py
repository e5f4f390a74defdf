"""Which files an ONNX file names, wherever in it a tensor is."""

import random
from contextlib import suppress

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from vitrine.bundle.external_data import _PATHS, external_files


def tensor(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="length", value="4")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_the_paths_to_tensors_are_those_of_the_schema() -> None:
    def leads_to_tensor(descriptor: object, seen: frozenset[str] = frozenset()) -> bool:
        if descriptor.name == "TensorProto":
            return True
        return descriptor.name not in seen and any(
            leads_to_tensor(field.message_type, seen | {descriptor.name})
            for field in descriptor.fields
            if field.message_type is not None
        )

    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.name in found or descriptor.name == "TensorProto":
            continue
        fields = [field for field in descriptor.fields if field.message_type and leads_to_tensor(field.message_type)]
        found[descriptor.name] = {field.number: field.message_type.name for field in fields}
        waiting += [field.message_type for field in fields]
    external = TensorProto.DESCRIPTOR.fields_by_name["external_data"]
    assert {**found, "TensorProto": {external.number: external.message_type.name}} == _PATHS


def test_external_data_is_found_everywhere() -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor("in a graph of an attribute")])
    sparse = onnx.SparseTensorProto(values=tensor("sparse values"), indices=tensor("sparse indices"))
    nodes = [
        helper.make_node("If", ["x"], ["y"], then_branch=inner),
        helper.make_node("Constant", [], ["z"], value=tensor("in an attribute")),
        helper.make_node("Odd", [], ["w"], values=[tensor("in a list")], graphs=[inner]),
    ]
    nodes[1].attribute.append(AttributeProto(name="s", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    graph = helper.make_graph(nodes, "graph", [], [], [tensor("an initializer"), tensor("../up"), tensor("/root")])
    function = helper.make_function("own", "F", [], [], [helper.make_node("C", [], ["a"], v=tensor("function"))], [])
    model = helper.make_model(graph, functions=[function])
    assert external_files(model.SerializeToString()) == {
        "in a graph of an attribute",
        "in an attribute",
        "in a list",
        "an initializer",
        "../up",
        "/root",
        "sparse values",
        "sparse indices",
        "function",
    }
    model.graph.doc_string = "location"
    model.ClearField("graph")
    model.ClearField("functions")
    assert external_files(model.SerializeToString()) == set()


@given(st.binary(max_size=200))
def test_noise_is_refused_or_names_nothing(content: bytes) -> None:
    with suppress(ValueError):
        assert all(location in content.decode(errors="replace") for location in external_files(content))


@given(st.randoms(use_true_random=False))
def test_what_protobuf_parses_is_found(chance: random.Random) -> None:
    graph = helper.make_graph([], "graph", [], [], [tensor("weights.bin")])
    content = bytearray(helper.make_model(graph).SerializeToString())
    content[chance.randrange(len(content))] = chance.randrange(256)
    try:
        model = onnx.ModelProto.FromString(bytes(content))
    except Exception:
        return
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    named = {entry.value for entry in entries if entry.key == "location" and isinstance(entry.value, str)}
    with suppress(ValueError):  # deprecated parts of protobuf that ONNX does not use
        assert named <= external_files(bytes(content))


@pytest.mark.parametrize("content", [b"\x3a\xff", b"\x3b", b"\x80" * 11, b"\x3a"])
def test_broken_fields(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a (field|number)"):
        external_files(content)
