from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrine.models.attention import split_heads
from vitrine.models.detr import VARIANTS, Denoising, Detr, DetrConfig, DetrOutput
from vitrine.models.position import grid_points, sine_2d, valid_cells

TINY: dict[str, Any] = {
    "num_classes": 3,
    "num_queries": 6,
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "feedforward_dim": 16,
    "dropout": 0.0,
    "backbone_layers": (1, 1),
    "backbone_width": 8,
}

# With the 91 classes of the published weights, including frozen convolutions; the small one is this project's.
PARAMETERS = {
    "detr_resnet50": 41_524_768,
    "detr_resnet50_dc5": 41_524_768,
    "detr_resnet101": 60_464_672,
    "detr_resnet101_dc5": 60_464_672,
    "detr_small": 17_010_208,
}

KINDS: list[Any] = ["learned", "boxes"]
every_kind = pytest.mark.parametrize("queries", KINDS)


def make(**settings: Any) -> Detr:
    """A tiny network as after training: boxes depend on the image, and norms do not map zero to zero."""
    torch.manual_seed(0)
    network = Detr(DetrConfig(**{**TINY, **settings})).eval()
    nn.init.normal_(network.bbox_embed.layers[-1].weight)  # zero at first for queries="boxes"
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
    return network


def images(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width), torch.tensor([[height, width]] * batch)


def padded(edges: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Single images [1, 3, H, W], the same images as a padded batch, and their sizes."""
    torch.manual_seed(1)
    alone = [torch.randn(1, 3, *edge) for edge in edges]
    sizes = torch.tensor(edges)
    height, width = sizes.amax(dim=0).tolist()
    batch = [F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2])) for image in alone]
    return alone, torch.cat(batch), sizes


def assert_same(found: DetrOutput, expected: DetrOutput, tolerance: float = 1e-4) -> None:
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], atol=tolerance, rtol=tolerance)


def of_image(output: DetrOutput, index: int) -> DetrOutput:
    return {
        "pred_logits": output["pred_logits"][index : index + 1],
        "pred_boxes": output["pred_boxes"][index : index + 1],
        "aux_outputs": [],
        "denoising": [],
    }


def difference(a: DetrOutput, b: DetrOutput) -> float:
    return (a["pred_boxes"] - b["pred_boxes"]).abs().max().item()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = Detr(DetrConfig(num_classes=91, **VARIANTS[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_every_published_number_belongs_to_a_variant() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


def test_the_small_variants_number_of_parameters_is_the_formula() -> None:
    dim, hidden = 256, 1024
    backbone = 11_176_512 - 2 * 4_800  # ResNet-18 without its classifier and its norms' affine parameters
    linear, norm = dim * dim + dim, 2 * dim
    feedforward = dim * hidden + hidden + hidden * dim + dim
    encoder = 3 * (4 * linear + feedforward + 2 * norm)
    decoder = 3 * (8 * linear + feedforward + 3 * norm) + norm
    heads = dim * 92 + 92 + 2 * linear + dim * 4 + 4
    assert backbone + 512 * dim + dim + encoder + decoder + 100 * dim + heads == PARAMETERS["detr_small"]


@every_kind
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 57), (8, 64)])
def test_inference_has_one_group_and_one_layer(queries: Any, height: int, width: int) -> None:
    output = make(queries=queries, query_groups=2)(*images(2, height, width))
    assert output["pred_logits"].shape == (2, 6, 4)
    assert output["pred_boxes"].shape == (2, 6, 4)
    assert output["aux_outputs"] == []


@every_kind
def test_training_has_all_groups_and_layers(queries: Any) -> None:
    output = make(queries=queries, query_groups=2).train()(*images(2, 32, 32))
    for layer in (output, *output["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 12, 4)
        assert layer["pred_boxes"].shape == (2, 12, 4)
    assert len(output["aux_outputs"]) == 2


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
def test_auxiliary_outputs_are_those_of_a_network_that_ends_there(queries: Any, layers: int) -> None:
    network = make(queries=queries, backbone_norm="frozen")
    shorter = Detr(DetrConfig(**{**TINY, "queries": queries, "backbone_norm": "frozen", "decoder_layers": layers}))
    shorter.load_state_dict({key: network.state_dict()[key] for key in shorter.state_dict()})
    found = network.train()(*images(2, 32, 48))["aux_outputs"][layers - 1]
    assert_same({**found, "aux_outputs": []}, shorter.eval()(*images(2, 32, 48)))


@every_kind
def test_first_group_predicts_the_same_in_training_and_inference(queries: Any) -> None:
    network = make(queries=queries, query_groups=3, backbone_norm="frozen")
    inference, training = network(*images(2, 32, 48)), network.train()(*images(2, 32, 48))
    torch.testing.assert_close(training["pred_boxes"][:, :6], inference["pred_boxes"])
    torch.testing.assert_close(training["pred_logits"][:, :6], inference["pred_logits"])


@every_kind
def test_boxes_are_fractions(queries: Any) -> None:
    x, sizes = images(2, 32, 48)
    boxes = make(queries=queries)(100 * x, sizes)["pred_boxes"]
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_first_boxes_are_the_reference_boxes() -> None:
    network = Detr(DetrConfig(**TINY, queries="boxes")).eval()
    boxes = network(*images(1, 32, 32))["pred_boxes"]
    torch.testing.assert_close(boxes[0], network.query_boxes.boxes.sigmoid())
    assert len(boxes[0, :, :2].unique(dim=0)) == 6  # spread over the image
    torch.testing.assert_close(boxes[0, :, 2:], torch.full((6, 2), 1 / 8))


def test_a_querys_position_is_a_perceptron_of_its_encoded_box() -> None:
    query_boxes = make(queries="boxes").query_boxes
    boxes, cells = torch.rand(2, 6, 4) + 0.1, torch.rand(2, 1, 5, 2)
    angles = boxes[..., None] * 2 * torch.pi / 10000 ** (torch.arange(0, 8, 2) / 8)  # [2, 6, 4, 4]
    encoded = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # [2, 6, 4, 8]
    encoded = encoded[..., [1, 0, 3, 2], :].flatten(-2)  # y before x, height before width
    first, _, second = query_boxes.position
    positions, prior = query_boxes(boxes, cells, 2)
    torch.testing.assert_close(positions, second(first(encoded).relu()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prior, query_boxes.priors[2](boxes, cells))


@every_kind
def test_every_parameter_learns(queries: Any) -> None:
    network = make(queries=queries, query_groups=2).train()
    output = network(*images(2, 32, 32))
    layers = (output, *output["aux_outputs"])
    sum(layer["pred_logits"].square().sum() + layer["pred_boxes"].square().sum() for layer in layers).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (network.query_embed.weight.grad.abs().sum(dim=-1) > 0).all()  # every query of every group


def test_learned_queries_have_no_boxes() -> None:
    names = make(queries="learned").state_dict().keys()
    assert make(queries="boxes").state_dict().keys() - names == {
        "query_boxes.boxes",
        *(f"query_boxes.position.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
        *(f"query_boxes.priors.{layer}.{name}" for layer in range(3) for name in ("log_factor", "offset")),
    }


def test_learned_queries_predict_in_the_order_of_their_vectors() -> None:
    network, order = make(queries="learned"), torch.randperm(6, generator=torch.Generator().manual_seed(2))
    expected = network(*images(2, 32, 48))
    assert len(expected["pred_boxes"][0].unique(dim=0)) == 6
    with torch.no_grad():
        network.query_embed.weight.copy_(network.query_embed.weight[order])
    found = network(*images(2, 32, 48))
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"][:, order], atol=1e-5, rtol=1e-4)


def inputs_of(block: nn.Module, network: Detr, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The arguments of a block during a forward pass."""
    seen: list[tuple[Tensor, ...]] = []
    with block.register_forward_pre_hook(lambda _, given: seen.append(given)):
        network(*arguments)
    return seen[0]


@pytest.mark.parametrize(("queries", "offset"), [("learned", 1.0), ("boxes", 0.5)])
def test_memory_is_positioned_at_its_cells_corners_as_published_or_at_their_centres(
    queries: Any, offset: float
) -> None:
    network = make(queries=queries)
    _, batch, sizes = padded([(24, 40), (33, 17)])
    expected = sine_2d(grid_points(valid_cells(sizes, (5, 5), 8), offset), 16).flatten(1, 2)
    torch.testing.assert_close(inputs_of(network.encoder[0], network, batch, sizes)[1], expected)
    outputs: list[Tensor] = []
    with network.encoder[-1].register_forward_hook(lambda _module, _given, out: outputs.append(out)):
        keys, values = inputs_of(network.decoder[2], network, batch, sizes)[2]
    attention = network.decoder[2].multihead_attn
    torch.testing.assert_close(keys, split_heads(attention.k_proj(outputs[0] + expected), attention.num_heads))
    torch.testing.assert_close(values, split_heads(attention.v_proj(outputs[0]), attention.num_heads))


def test_learned_queries_are_positions_of_a_state_that_starts_at_zero() -> None:
    network = make(queries="learned")
    learned = network.query_embed.weight.expand(2, -1, -1)
    state, positions, *_ = inputs_of(network.decoder[0], network, *images(2, 32, 48))
    assert state.shape == (2, 6, 16)
    assert (state == 0).all()
    assert torch.equal(positions, learned)
    assert torch.equal(inputs_of(network.decoder[2], network, *images(2, 32, 48))[1], learned)


def test_queries_with_boxes_start_at_their_vectors_and_move_with_their_boxes() -> None:
    network = make(queries="boxes")
    state, first, *_ = inputs_of(network.decoder[0], network, *images(2, 32, 48))
    assert torch.equal(state, network.query_embed.weight.expand(2, -1, -1))
    assert not torch.allclose(inputs_of(network.decoder[1], network, *images(2, 32, 48))[1], first, atol=1e-3)


@every_kind
def test_queries_do_not_see_cells_outside_the_valid_region(queries: Any) -> None:
    """Pixels beyond the receptive field of the valid region have no effect at all."""
    network = make(queries=queries)
    pixels, _ = images(1, 32, 256)
    other = pixels.clone()
    other[..., 192:] = 5 * torch.randn(1, 3, 32, 64)
    sizes = torch.tensor([[32, 48]])
    assert_same(network(other, sizes), network(pixels, sizes), 1e-5)
    whole = torch.tensor([[32, 256]])
    assert difference(network(pixels, whole), network(other, whole)) > 1e-4


@every_kind
@settings(deadline=None, max_examples=15)
@given(
    edges=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=2, max_size=3),
    block=st.sampled_from(["basic", "bottleneck"]),
    dilation=st.booleans(),
)
def test_padded_batch_equals_single_images(
    queries: Any, edges: list[tuple[int, int]], block: Any, dilation: bool
) -> None:
    network = make(queries=queries, backbone_block=block, dilation=dilation)
    alone, batch, sizes = padded(edges)
    together = network(batch, sizes)
    for index, image in enumerate(alone):
        assert_same(of_image(together, index), network(image, sizes[index : index + 1]))


@every_kind
@pytest.mark.parametrize("edges", [(32, 32), (37, 51)])
def test_without_padding_the_sizes_may_be_left_out(queries: Any, edges: tuple[int, int]) -> None:
    network = make(queries=queries)
    pixels, sizes = images(2, *edges)
    assert_same(network(pixels, None), network(pixels, sizes), tolerance=1e-6)


@every_kind
@pytest.mark.parametrize("edges", [(64, 64), (33, 57), (1, 9)])
def test_published_padding_does_not_change_images_without_padding(queries: Any, edges: tuple[int, int]) -> None:
    network = make(queries=queries)
    expected = network(*images(2, *edges))
    network.published_padding = True
    assert_same(network(*images(2, *edges)), expected, 1e-6)


@every_kind
def test_published_padding_leaks_into_predictions_of_a_padded_batch(queries: Any) -> None:
    network = make(queries=queries)
    alone, batch, sizes = padded([(33, 47), (64, 64)])
    network.published_padding = True
    together = network(batch, sizes)
    assert difference(of_image(together, 0), network(alone[0], sizes[:1])) > 1e-4
    assert_same(of_image(together, 1), network(alone[1], sizes[1:]))


def test_published_padding_samples_the_mask() -> None:
    """The masks differ by a row of cells if the padded image's edges are not multiples of the stride."""
    network, record = make(backbone_layers=(1, 1, 1, 1), queries="learned"), list[Tensor]()
    batch, sizes = torch.randn(1, 3, 33, 33), torch.tensor([[17, 33]])
    network(batch, sizes, record)
    assert (record[-1][0, 0, 0] > 0).tolist() == [True, True, False, False]
    network.published_padding = True
    network(batch, sizes, record)
    assert (record[-1][0, 0, 0] > 0).tolist() == [True, True, True, True]


@every_kind
def test_recording_covers_every_layer_and_does_not_change_predictions(queries: Any) -> None:
    network, record = make(queries=queries, encoder_layers=2), list[Tensor]()
    _, batch, sizes = padded([(24, 40), (33, 17)])
    assert_same(network(batch, sizes, record), network(batch, sizes), 1e-5)
    assert [weights.shape for weights in record] == [(2, 2, 25, 25)] * 2 + [(2, 2, 6, 25)] * 3
    valid = torch.zeros(2, 5, 5, dtype=torch.bool)
    valid[0, :3, :5], valid[1, :5, :3] = True, True
    for weights in record:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        hidden = ~valid.flatten(1)[:, None, None].expand_as(weights)
        assert (weights[hidden] == 0).all()


def test_query_with_a_box_attends_to_its_box_first() -> None:
    network, record = make(num_queries=4, queries="boxes"), list[Tensor]()
    for block in network.decoder:
        nn.init.zeros_(block.multihead_attn.q_proj.weight)  # only the prior remains
    network(*images(1, 128, 128), record)
    centres = network.query_boxes.boxes.sigmoid()[:, :2]  # (x, y)
    weights = record[1][0].mean(dim=0).reshape(4, 16, 16)
    fractions = (torch.arange(16) + 0.5) / 16
    looked = torch.stack((weights.sum(dim=1) @ fractions, weights.sum(dim=2) @ fractions), dim=-1)
    assert (looked - centres).abs().max() < 0.15


@pytest.mark.parametrize("unused", [0, 2])
def test_unused_classes_widen_the_class_head(unused: int) -> None:
    network = make(unused_classes=unused)
    assert network(*images(2, 32, 32))["pred_logits"].shape == (2, 6, 3 + unused + 1)
    assert network.class_embed.out_features == 3 + unused + 1


def test_dilation_halves_the_stride_of_the_feature_map() -> None:
    shapes = []
    for dilation in (False, True):
        record: list[Tensor] = []
        make(dilation=dilation, backbone_layers=(1, 1, 1, 1))(*images(1, 70, 33), record)
        shapes.append(record[0].shape[-1])
    assert shapes == [3 * 2, 5 * 3]


def test_frozen_norms_are_no_parameters() -> None:
    batch, frozen = make(), make(backbone_norm="frozen")
    assert {name for name, _ in batch.named_parameters()} > {name for name, _ in frozen.named_parameters()}
    assert not any("bn" in name for name, _ in frozen.named_parameters())


def test_sine_and_cosine_of_two_coordinates_need_four_channels() -> None:
    with pytest.raises(ValueError, match="embed_dim 18 is not divisible by 4"):
        make(embed_dim=18)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decoder_layers", 0), ("num_queries", 0), ("query_groups", 0), ("denoising", -1), ("num_heads", 0)],
)
def test_too_few_of_something_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected at least {value + 1}, found {value}$"):
        make(**{name: value})


def noised(valid: list[list[bool]], groups: int = 2) -> Denoising:
    generator = torch.Generator().manual_seed(3)
    shape = (len(valid), groups, len(valid[0]))
    boxes = torch.rand(*shape, 4, generator=generator)
    return Denoising(boxes, torch.randint(3, shape, generator=generator), torch.tensor(valid))


def restoring(**settings: Any) -> Detr:
    return make(queries="boxes", denoising=2, backbone_norm="frozen", **settings).train()


WHOLE = [[True, True, True], [True, True, True]]


def test_denoising_needs_queries_with_boxes() -> None:
    with pytest.raises(ValueError, match="denoising=2 needs queries=boxes or selected, found learned"):
        make(denoising=2)


def test_a_network_made_without_denoising_refuses_objects_to_restore() -> None:
    with pytest.raises(ValueError, match="denoising=0"):
        make(queries="boxes")(*images(2, 32, 32), denoising=noised(WHOLE))


def test_denoising_adds_an_embedding_of_the_labels_and_changes_no_other_weight() -> None:
    networks = []
    for groups in (0, 5):
        torch.manual_seed(0)
        networks.append(Detr(DetrConfig(**TINY, queries="boxes", denoising=groups)))
    without, with_denoising = (network.state_dict() for network in networks)
    assert with_denoising.keys() - without.keys() == {"label_embed.weight"}
    assert with_denoising["label_embed.weight"].shape == (3, 16)
    assert all(torch.equal(with_denoising[name], value) for name, value in without.items())


@pytest.mark.parametrize("query_groups", [1, 3])
def test_queries_do_not_attend_to_noised_objects(query_groups: int) -> None:
    network, inputs = restoring(query_groups=query_groups), images(2, 32, 48)
    expected, found = network(*inputs), network(*inputs, denoising=noised(WHOLE))
    assert expected["denoising"] == []
    assert len(found["denoising"]) == 3
    assert found["denoising"][0]["pred_logits"].shape == (2, 2 * 3, 4)
    assert found["denoising"][0]["pred_boxes"].shape == (2, 2 * 3, 4)
    for ours, theirs in zip([found, *found["aux_outputs"]], [expected, *expected["aux_outputs"]], strict=True):
        assert torch.equal(ours["pred_boxes"], theirs["pred_boxes"])
        assert torch.equal(ours["pred_logits"], theirs["pred_logits"])


def test_groups_of_noised_objects_do_not_see_each_other_but_themselves() -> None:
    network, inputs, first = restoring(), images(2, 32, 48), noised(WHOLE)
    boxes = first.boxes_cxcywh.clone()
    boxes[:, 1, 0] = 0.3
    other = Denoising(boxes, first.class_ids, first.valid)
    expected, found = (network(*inputs, denoising=given)["denoising"][-1]["pred_boxes"] for given in (first, other))
    torch.testing.assert_close(found[:, :3], expected[:, :3])
    assert ((found[:, 3:] - expected[:, 3:]).abs().amax(dim=(0, 2)) > 1e-6).all()


def test_padding_among_noised_objects_is_masked() -> None:
    """Objects are restored as without padding in the batch, and an image without objects has no effect."""
    network, (pixels, sizes) = restoring(), images(2, 32, 48)
    given = noised([[True, True, False], [False, False, False]])
    alone = Denoising(given.boxes_cxcywh[:1, :, :2], given.class_ids[:1, :, :2], given.valid[:1, :2])
    together = network(pixels, sizes, denoising=given)["denoising"][-1]
    expected = network(pixels[:1], sizes[:1], denoising=alone)["denoising"][-1]
    for key in ("pred_boxes", "pred_logits"):
        found = together[key].unflatten(1, (2, 3))[:1, :, :2].flatten(1, 2)
        torch.testing.assert_close(found, expected[key], atol=1e-5, rtol=1e-5)
    sum(value.square().sum() for value in together.values()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in network.parameters())


def test_restored_boxes_start_from_the_noised_ones() -> None:
    network, given = restoring(), noised(WHOLE)
    for parameter in network.bbox_embed.layers[-1].parameters():
        nn.init.zeros_(parameter)
    for layer in network(*images(2, 32, 32), denoising=given)["denoising"]:
        torch.testing.assert_close(layer["pred_boxes"], given.boxes_cxcywh.flatten(1, 2).clamp(0.001, 0.999))


def test_a_noised_label_is_the_state_that_an_object_starts_from() -> None:
    network, given = restoring(), noised(WHOLE)
    seen: list[Tensor] = []
    with network.decoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        network(*images(2, 32, 32), denoising=given)
    torch.testing.assert_close(seen[1], network.label_embed.weight[given.class_ids.flatten(1)])


def test_denoising_in_half_precision() -> None:
    network, given = restoring(), noised([[True, True, False], [False, False, False]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers = network(*images(2, 32, 32), denoising=given)["denoising"]
    assert all(value.isfinite().all() for layer in layers for value in layer.values())


def test_predictions_do_not_depend_on_the_embedding_of_noised_labels() -> None:
    """Exported graphs do not contain it."""
    network = restoring().eval()
    exported = torch.export.export(network, images(2, 32, 32))
    used = {node.target for node in exported.graph.nodes if node.op == "placeholder" and node.users}
    assert any("class_embed" in name for name in used)
    assert not any("label_embed" in name for name in used)


SELECTED = {**TINY, "backbone": "efficientnet_lite0", "queries": "selected", "scores": "sigmoid", "num_queries": 12}
SELECTED = {name: value for name, value in SELECTED.items() if not name.startswith("backbone_")}


@pytest.mark.parametrize("neck", ["none", "fusion"])
@pytest.mark.parametrize("second", [(64, 96), (33, 40), (5, 7)])
def test_answers_of_a_padded_image_are_those_of_the_image_alone(neck: str, second: tuple[int, int]) -> None:
    """Also of an image with fewer cells than queries."""
    torch.manual_seed(0)
    network = Detr(DetrConfig(**SELECTED, neck=neck)).eval()
    height, width = second
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], second])
    images[1, :, height:] = 0
    images[1, :, :, width:] = 0
    with torch.no_grad():
        together = network(images, sizes)
        alone = network(images[1:, :, :height, :width], sizes[1:])
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(together[name][1], alone[name][0], atol=1e-4, rtol=1e-4)


def test_queries_start_from_the_boxes_of_the_best_cells() -> None:
    torch.manual_seed(0)
    network = Detr(DetrConfig(**SELECTED)).train()
    network.backbone.eval()
    nn.init.normal_(network.proposals.class_embed.weight)
    nn.init.normal_(network.proposals.bbox_embed.layers[-1].weight)
    images, sizes = torch.randn(1, 3, 160, 160), torch.tensor([[160, 160]])
    output = network(images, sizes)
    proposals = output["proposals"]
    assert proposals["pred_logits"].shape[:2] == (1, 25)
    best = proposals["pred_logits"][0].amax(dim=-1).topk(12).indices
    start = proposals["pred_boxes"][0, best]
    # The box head is zero at first: the answers are the references.
    torch.testing.assert_close(output["pred_boxes"][0], start, atol=1e-5, rtol=1e-5)
    output["pred_boxes"].sum().backward()
    assert network.proposals.bbox_embed.layers[0].weight.grad is None  # references have no gradient
    assert network.eval()(images, sizes)["proposals"] is None


def test_groups_of_selected_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="query_groups=3 needs queries=boxes or learned, found selected"):
        Detr(DetrConfig(**SELECTED, query_groups=3))


def test_a_neck_needs_three_stages() -> None:
    with pytest.raises(ValueError, match="neck=fusion: expected a backbone of at least 3 stages, found 2"):
        Detr(DetrConfig(**TINY, neck="fusion"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0", "efficientnet_lite4"])
def test_backbone_by_name(name: str) -> None:
    settings = {key: value for key, value in TINY.items() if not key.startswith("backbone_")}
    network = Detr(DetrConfig(**settings, backbone=name, neck="fusion")).eval()
    output = network(torch.randn(1, 3, 70, 100), torch.tensor([[70, 100]]))
    assert output["grid"] == (6, 8)  # of 96 x 128 pixels
    assert network.backbone.strides[-1] == 32
