import pytest
import torch

from models.detr import Detr, DetrConfig

TINY = {
    "num_classes": 3,
    "num_queries": 6,
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "feedforward_dim": 16,
    "dropout": 0.0,
    "backbone_layers": (1, 1),
    "backbone_width": 4,
}


@pytest.fixture
def network() -> Detr:
    torch.manual_seed(0)
    network = Detr(DetrConfig(**TINY, query_groups=2)).eval()
    torch.nn.init.normal_(network.bbox_embed.layers[-1].weight)  # zero at first: boxes would not depend on the image
    return network


def images(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width), torch.tensor([[height, width]] * batch)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 57), (8, 64)])
def test_inference_has_one_group_and_one_layer(network: Detr, height: int, width: int) -> None:
    output = network(*images(2, height, width))
    assert output["pred_logits"].shape == (2, 6, 4)
    assert output["pred_boxes"].shape == (2, 6, 4)
    assert output["aux_outputs"] == []


def test_training_has_all_groups_and_layers(network: Detr) -> None:
    output = network.train()(*images(2, 32, 32))
    for layer in (output, *output["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 12, 4)
        assert layer["pred_boxes"].shape == (2, 12, 4)
    assert len(output["aux_outputs"]) == 2


def test_boxes_are_fractions(network: Detr) -> None:
    boxes = network(100 * images(2, 32, 48)[0], images(2, 32, 48)[1])["pred_boxes"]
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_first_boxes_are_the_reference_boxes() -> None:
    network = Detr(DetrConfig(**TINY)).eval()
    boxes = network(*images(1, 32, 32))["pred_boxes"]
    torch.testing.assert_close(boxes[0], network.reference_boxes.sigmoid())
    assert len(boxes[0, :, :2].unique(dim=0)) == 6  # spread over the image
    torch.testing.assert_close(boxes[0, :, 2:], torch.full((6, 2), 1 / 8))


def test_every_parameter_learns(network: Detr) -> None:
    output = network.train()(*images(2, 32, 32))
    layers = (output, *output["aux_outputs"])
    sum(layer["pred_logits"].square().sum() + layer["pred_boxes"].square().sum() for layer in layers).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_queries_do_not_see_cells_outside_the_valid_region(network: Detr) -> None:
    """Far from the valid region, where no convolution reaches it, pixels have no effect at all."""
    pixels, _ = images(1, 32, 256)
    other = pixels.clone()
    other[..., 192:] = 5 * torch.randn(1, 3, 32, 64)
    sizes = torch.tensor([[32, 48]])
    expected, found = network(pixels, sizes), network(other, sizes)
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"])
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"])
    whole = torch.tensor([[32, 256]])
    assert not torch.allclose(network(pixels, whole)["pred_boxes"], network(other, whole)["pred_boxes"], atol=1e-4)
