"""The benchmarked models, with an input image each."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(__file__).parent / ".work"
BUNDLES = WORK / "bundles"


@dataclass(frozen=True)
class Model:
    """A bundle and its test image."""

    name: str
    bundle: Path
    image: Path
    route: str  # Vitrine's path


def load_models() -> dict[str, Model]:
    """Return all models by name; create those that do not ship with the project, if they do not exist yet."""
    WORK.mkdir(exist_ok=True)
    photograph = WORK / "photograph.jpg"
    if not photograph.exists():
        _photograph().save(photograph, quality=90)
    shipped = ROOT / "bundles"
    return {
        model.name: model
        for model in (
            Model("vit-ti", _random_vit("vit-ti", 224, patch_size=16, depth=12), photograph, "/classify"),
            Model("vit-small-images", _random_vit("vit-small-images", 32, patch_size=4, depth=9), _frog(), "/classify"),
            Model("vit-cifar10", shipped / "vit-cifar10" / "1", _frog(), "/classify"),
            Model("detr-bccd", shipped / "detr-bccd" / "1", ROOT / "examples" / "blood.jpg", "/detect"),
            Model("no-op", _no_op(), _frog(), "/classify"),
        )
    }


def _frog() -> Path:
    return ROOT / "examples" / "frog.jpg"


def _photograph() -> Image.Image:
    """Return an image of 500 x 375 pixels that compresses about as well as a photograph: the blood cells, resized."""
    return Image.open(ROOT / "examples" / "blood.jpg").convert("RGB").resize((500, 375))


def _random_vit(name: str, image_size: int, **settings: int) -> Path:
    """Export a ViT of width 192 with random weights, like any other run. This needs torch."""
    path = BUNDLES / name / "1"
    if path.exists():
        return path
    from vitrine.export.export import export_run
    from vitrine.export.latency import Timing
    from vitrine.models.build import build_model
    from vitrine.models.training.checkpoint import Checkpoint, Origin, save_checkpoint

    config: dict[str, Any] = {"image_size": image_size, "embed_dim": 192, "num_heads": 3, **settings}
    labels = [f"class {i}" for i in range(1000 if image_size == 224 else 10)]
    run = WORK / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    preprocessing = {
        "task": "image-classification",
        "input_size": [image_size, image_size],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    weights = build_model("vit", config, len(labels)).state_dict()
    origin = Origin("random", "0" * 64, "timm", [], [])
    save_checkpoint(Checkpoint("vit", config, preprocessing, labels, weights, origin=origin), run)
    export_run(run, path, timing=Timing.NONE)
    return path


def _no_op() -> Path:
    """A classifier that computes almost nothing, to measure the server's overhead."""
    file = BUNDLES / "no-op" / "model.onnx"
    if file.exists():
        return file
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from vitrine.bundle.manifest import METADATA_KEY

    random = np.random.default_rng(0)
    weights = (random.normal(size=(3, 10)) / 300).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["numbers", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        ],
        "no-op",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    served = onnx.load(ROOT / "bundles" / "vit-cifar10" / "1" / "model.onnx", load_external_data=False)
    (identity,) = (entry.value for entry in served.metadata_props if entry.key == METADATA_KEY)
    helper.set_model_props(model, {METADATA_KEY: json.dumps({**json.loads(identity), "name": "no-op"})})
    file.parent.mkdir(parents=True)
    onnx.save(model, file)
    return file


if __name__ == "__main__":
    sys.stdout.write("\n".join(f"{model.name}: {model.bundle}" for model in load_models().values()) + "\n")
