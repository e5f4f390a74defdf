"""Draw the pictures of docs/tour.md from the shipped bundles: `make tour` writes docs/tour/*.png.

What is drawn are values of the served graphs: any value of an ONNX graph can be made an output of it.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.drawing import class_color
from vitrine.bundle.explaining import Explainer, Method, Point, default_question
from vitrine.bundle.loading import Bundle, load_bundle, load_explain_network
from vitrine.bundle.manifest import Precision
from vitrine.bundle.predictors import Detection

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "tour"
FROG, CAT = (ROOT / "examples" / name for name in ("frog.jpg", "cat.jpg"))
TOKEN = 27  # of the frog's 64: row 3, column 3
GRID = 8  # tokens of vit-cifar10 along each edge
HEADS = 4
INK, ACCENT, QUIET = "#1b1f1e", "#0f6b5c", "#9aa3a1"

Array = NDArray[np.float32]


def load(name: str) -> Bundle:
    """Load a shipped bundle's float32 graph."""
    return load_bundle(ROOT / "bundles" / name / "1", variant=Precision.FP32)


def values(
    bundle: Bundle, image: Path, *names: str, change: Callable[[onnx.ModelProto], None] = lambda model: None
) -> list[Array]:
    """Return values of a bundle's graph for an image, by their names in it, without the batch axis."""
    model = onnx.load(bundle.file)
    change(model)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    predictor: Any = bundle.predictor
    inputs = predictor.inputs([predictor.prepare(Image.open(image).convert("RGB"))])
    return [output[0] for output in session.run(list(names), inputs)]


def weight(bundle: Bundle, name: str) -> Array:
    """Return a weight of a bundle's graph."""
    return next(
        onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(bundle.file).graph.initializer if tensor.name == name
    )


def heads_of(tokens: Array) -> Array:
    """[N, D] -> [H, N, d], as `split_heads` in models/attention.py."""
    return tokens.reshape(len(tokens), HEADS, -1).transpose(1, 0, 2)


def softmax(logits: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def frogs_attention(block: int) -> tuple[Array, Array, Array]:
    """Return query, key and value [H, N, d] of a block of vit-cifar10 for the frog."""
    (qkv,) = values(load("vit-cifar10"), FROG, f"network.blocks.{block}.attn.qkv")
    query, key, value = map(heads_of, np.split(qkv, 3, axis=-1))
    return query, key, value


def figure(columns: int, rows: int = 1, width: float = 2.3, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """Return a figure with a row of axes without ticks."""
    made, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return made, list(axes.flat)


def show(axes: Axes, picture: Any, title: str, **options: Any) -> None:
    """Show an image or a map under a title."""
    axes.imshow(picture, **options)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def frog() -> Image.Image:
    """The frog, large enough to see its pixels."""
    return Image.open(FROG).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)


def show_token(axes: Axes, title: str = "the frog and one token") -> None:
    """Show the frog with a frame around the token."""
    show(axes, frog(), title)
    edge = 256 / GRID
    place = (TOKEN % GRID * edge, TOKEN // GRID * edge)
    axes.add_patch(Rectangle(place, edge, edge, fill=False, edgecolor="#ffcc00", linewidth=2.5))


def grid(row: Array) -> Array:
    """[N] -> [rows, columns] of the frog's tokens."""
    return row.reshape(GRID, GRID)


def query_key_value() -> Figure:
    """The three vectors of each token, in the first head of the first block."""
    made, axes = figure(4, width=2.4, height=2.8)
    show_token(axes[0])
    for place, name, part in zip(axes[1:], ("query", "key", "value"), frogs_attention(0), strict=True):
        show(place, part[0], f"{name}: 64 tokens x 32", cmap="RdBu", vmin=-4, vmax=4, aspect="auto")
        place.axhline(TOKEN, color="#ffcc00", linewidth=2)
    return made


def similarity() -> Figure:
    """The inner product of one token's query with every key."""
    query, key, _ = frogs_attention(3)
    products = query @ key.transpose(0, 2, 1)
    made, axes = figure(3)
    show_token(axes[0])
    limit = float(np.abs(products[:2, TOKEN]).max())
    for head, place in enumerate(axes[1:]):
        show(
            place, grid(products[head, TOKEN]), f"q·k with all keys, head {head}", cmap="RdBu", vmin=-limit, vmax=limit
        )
    return made


def temperature() -> Figure:
    """The same products through softmax: undivided, divided by the root of d, and by d."""
    query, key, _ = frogs_attention(3)
    products = np.sort((query @ key.transpose(0, 2, 1))[1, TOKEN])[::-1]
    made, axes = figure(3, width=2.9)
    size = query.shape[-1]
    for place, divisor, title in zip(axes, (1, math.sqrt(size), size), ("not divided", "/ √d", "/ d"), strict=True):
        place.bar(range(len(products)), softmax(products / divisor), color=ACCENT, width=1)
        place.set_title(f"softmax(q·k {title})".replace("q·k not divided", "q·k)  (not divided").rstrip(), fontsize=9)
        place.set_xlabel("keys, most similar first", fontsize=8)
        place.tick_params(labelsize=7)
    return made


def self_attention() -> Figure:
    """The weights of all tokens, one row as a map, and how many tokens share most of a row."""
    query, key, _ = frogs_attention(3)
    weights = softmax(query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1]))[1]
    made, axes = figure(3, width=2.6, height=2.6)
    show_token(axes[0])
    show(
        axes[1],
        weights,
        "weights, 64 x 64; a row adds up to 1",
        cmap="inferno",
        vmax=float(np.quantile(weights, 0.995)),
    )
    axes[1].axhline(TOKEN, color="#ffcc00", linewidth=1.5)
    show(axes[2], grid(weights[TOKEN]), "the token's row, as a map", cmap="inferno")
    return made


def multi_head() -> Figure:
    """The same token in each head of one block."""
    query, key, _ = frogs_attention(3)
    weights = softmax(query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1]))
    made, axes = figure(1 + HEADS, width=2)
    show_token(axes[0], "one token")
    for head, place in enumerate(axes[1:]):
        show(place, grid(weights[head, TOKEN]), f"head {head}", cmap="inferno")
    return made


def linear_classifier() -> Figure:
    """The head's products with the mean state of the frog's tokens."""
    bundle = load("vit-cifar10")
    state, logits = values(bundle, FROG, "mean", "network")
    head, bias = weight(bundle, "network.head.weight"), weight(bundle, "network.head.bias")
    np.testing.assert_allclose(head @ state + bias, logits, atol=1e-3)
    order = np.argsort(logits)
    made, axes = figure(2, width=3.6, height=2.6)
    for place, heights, title in ((axes[0], logits, "W · state + b"), (axes[1], softmax(logits), "softmax")):
        place.barh(range(len(order)), heights[order], color=[ACCENT if i == order[-1] else QUIET for i in order])
        place.set_yticks(range(len(order)), [bundle.manifest.labels[i] for i in order], fontsize=8)
        place.tick_params(axis="x", labelsize=7)
        place.set_title(title, fontsize=9)
    return made


def growth() -> Figure:
    """Parameters and multiplications of a block of vit-cifar10 by the number of tokens."""
    dim, hidden = 128, 256
    tokens = np.arange(1, 33) ** 2
    parameters = np.full(len(tokens), 4 * dim * dim + 2 * dim * hidden)
    projections = tokens * parameters
    products = 2 * tokens**2 * dim
    made, axes = figure(2, width=3.6, height=2.6)
    axes[0].plot(tokens, parameters / 1e3, color=ACCENT, linewidth=2)
    axes[0].set_ylim(0, 250)
    axes[0].set_title("weights of a block, thousands", fontsize=9)
    axes[1].plot(tokens, projections / 1e6, color=QUIET, linewidth=2, label="linear layers, ~ N")
    axes[1].plot(tokens, products / 1e6, color=ACCENT, linewidth=2, label="q·k and weights·v, ~ N²")
    axes[1].legend(fontsize=7, frameon=False)
    axes[1].set_title("multiplications, millions", fontsize=9)
    for place in axes:
        place.axvline(GRID**2, color="#ffcc00")
        place.set_xlabel("tokens N (the frog: 64)", fontsize=8)
        place.tick_params(labelsize=7)
    return made


def positions() -> Figure:
    """Similarity of position embeddings, and the answer with and without them."""
    bundle = load("vit-cifar10")
    embedding = weight(bundle, "network.pos_embed.embedding")[0]
    unit = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)

    def without(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "network.pos_embed.embedding":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))

    (known,), (unknown,) = values(bundle, FROG, "probabilities"), values(bundle, FROG, "probabilities", change=without)
    made, axes = figure(4, width=2.5)
    for place, token in zip(axes[:3], (0, TOKEN, 60), strict=True):
        show(
            place,
            grid(unit @ unit[token]),
            f"similarity with position {divmod(token, GRID)}",
            cmap="RdBu",
            vmin=-1,
            vmax=1,
        )
    order = np.argsort(known)[-5:]
    place = axes[3]
    place.barh(np.arange(5) + 0.2, known[order], 0.4, color=ACCENT, label="with positions")
    place.barh(np.arange(5) - 0.2, unknown[order], 0.4, color=QUIET, label="set to zero")
    place.set_yticks(range(5), [bundle.manifest.labels[i] for i in order], fontsize=8)
    place.tick_params(axis="x", labelsize=7)
    place.legend(fontsize=7, frameon=False, loc="lower right")
    place.set_title("the answer for the frog", fontsize=9)
    return made


def norms() -> Figure:
    """The length of the states along the blocks: in pre-norm they add up, and each norm sees them anew."""
    names = ["network.pos_embed", *(f"network.blocks.{i}" for i in range(6))]
    normed = [*(f"network.blocks.{i}.norm1" for i in range(6)), "network.norm"]
    found = values(load("vit-cifar10"), FROG, *names, *normed)
    made, axes = figure(1, width=5.6, height=2.6)
    for states, label, color in ((found[:7], "residual stream", ACCENT), (found[7:], "after the next norm", QUIET)):
        lengths = [float(np.linalg.norm(state, axis=-1).mean()) for state in states]
        axes[0].plot(range(7), lengths, marker="o", label=label, color=color)
    axes[0].set_xlabel("after block (0: the embedding)", fontsize=8)
    axes[0].set_title("mean length of a token's state, vit-cifar10 (pre-norm)", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].tick_params(labelsize=7)
    axes[0].set_ylim(0)
    return made


def overlaid(axes: Axes, image: Image.Image, heat: Array, box: Sequence[float], title: str) -> None:
    """Show heat, whose place in the image is `box`, over it."""
    show(axes, image, title)
    left, top, right, bottom = box
    strength = heat / heat.max()
    axes.imshow(
        heat,
        cmap="inferno",
        alpha=np.minimum(1, 2 * strength) * 0.65,
        extent=(left, right, bottom, top),
        interpolation="bilinear",
    )
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)


def explained(name: str, **changes: Any) -> Any:
    """Return a bundle's first explanation for the cat."""
    bundle = load(name)
    explainer = Explainer(bundle.manifest, bundle.predictor, load_explain_network(bundle.path))
    return explainer.explain(Image.open(CAT).convert("RGB"), default_question(bundle.manifest, **changes))[0]


def cross_attention() -> Figure:
    """Where the cat's query looks in the decoder, and where the encoder looks from two places."""
    image = Image.open(CAT).convert("RGB")
    made, axes = figure(3, width=3.3, height=2.4)
    found = explained("detr-voc", method=Method.CROSS_ATTENTION)
    overlaid(axes[0], image, found.heatmap.values, found.heatmap.box.xyxy(), "decoder: the query of the box")
    draw_box(axes[0], found.target)
    for place, point in zip(axes[1:], (Point(170, 115), Point(400, 60)), strict=True):
        found = explained("detr-voc", method=Method.ENCODER_ATTENTION, point=point)
        overlaid(place, image, found.heatmap.values, found.heatmap.box.xyxy(), "encoder: from the point")
        place.plot(point.x, point.y, "o", color="white", markeredgecolor="black", markersize=8)
    return made


def draw_box(axes: Axes, detection: Detection) -> None:
    """Draw a detection."""
    box, color = detection.box, np.array(class_color(detection.class_id)) / 255
    place, width, height = (box.x_min, box.y_min), box.x_max - box.x_min, box.y_max - box.y_min
    axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor=color, linewidth=2))


def patches() -> Figure:
    """From pixels to tokens to the class: the steps of vit-imagenette, a ViT on the features of a ConvNet."""
    bundle = load("vit-imagenette")
    names = ("network.neck", "network.head.pos_embed", "network.head.norm")
    features, tokens, states = values(bundle, CAT, *names)
    cat = Image.open(CAT).convert("RGB")
    predictor: Any = bundle.predictor
    seen = Image.fromarray(predictor.prepare(cat))
    made, axes = figure(5, width=2.3, height=2.6)
    show(axes[0], seen, "224 x 224 pixels, 7 x 7 cells")
    for line in range(1, 7):
        axes[0].axhline(line * 32, color="white", linewidth=0.8)
        axes[0].axvline(line * 32, color="white", linewidth=0.8)
    energy = np.linalg.norm(features.reshape(-1, 7, 7), axis=0)
    show(axes[1], energy, "stem: length of the features", cmap="viridis")
    show(axes[2], tokens, "1 + 49 tokens x 192,\nwith positions", cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    axes[2].axhline(0, color="#ffcc00", linewidth=3)
    show(axes[3], states, "after the blocks;\nthe first is classified", cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    axes[3].axhline(0, color="#ffcc00", linewidth=3)
    found = explained("vit-imagenette", method=Method.ATTENTION_ROLLOUT)
    overlaid(axes[4], cat, found.heatmap.values, found.heatmap.box.xyxy(), f"rollout: {found.target.label}?")
    axes[4].set_xlabel("(no cat is among its ten classes)", fontsize=8)
    return made


def mixer() -> Figure:
    """Token-mixing weights: a unit of the first block sees all places, by fixed weights."""
    mixing = onnx.load(load("mixer-cifar10").file)
    # The weights of `network.blocks.0.mlp_tokens.fc1`, which the graph multiplies with: tokens x units.
    node = next(node for node in mixing.graph.node if "blocks.0.mlp_tokens.fc1.bias" in " ".join(node.input))
    product = next(other for other in mixing.graph.node if other.output[0] in node.input)
    weights = next(onnx.numpy_helper.to_array(t) for t in mixing.graph.initializer if t.name == product.input[1])
    strongest = np.argsort(-np.linalg.norm(weights, axis=0))[:12]
    made, axes = figure(6, 2, width=1.5, height=1.6)
    for place, unit in zip(axes, strongest, strict=True):
        limit = float(np.abs(weights[:, unit]).max())
        show(place, grid(weights[:, unit]), f"unit {unit}", cmap="RdBu", vmin=-limit, vmax=limit)
    return made


def queries() -> Figure:
    """The boxes of all queries of detr-voc for the cat, and those that score at least 50 %."""
    image = Image.open(CAT).convert("RGB")
    predictor: Any = load("detr-voc").predictor
    detections = predictor.detect(image, threshold=0.0)
    made, axes = figure(2, width=3.6, height=2.6)
    for place, least, title in ((axes[0], 0.0, "all {} answers"), (axes[1], 0.5, "{} scores at least 50 %")):
        kept = [detection for detection in detections if detection.score >= least]
        show(place, image, title.format(len(kept)))
        for detection in reversed(kept):
            draw_box(place, detection)
    return made


def detr() -> Figure:
    """The six steps of DETR for the cat."""
    image = Image.open(CAT).convert("RGB")
    bundle = load("detr-voc")
    predictor: Any = bundle.predictor
    (features,) = values(bundle, CAT, "network.neck")
    rows, columns = explained("detr-voc", method=Method.CROSS_ATTENTION).heatmap.values.shape
    energy = np.linalg.norm(features, axis=-1 if features.ndim == 2 else 0).reshape(-1)
    made, axes = figure(3, 2, width=3.2, height=2.5)
    show(axes[0], image.resize((384, 255)), "1. resized: 384 x 255 pixels")
    show(
        axes[1],
        energy[: rows * columns].reshape(rows, columns),
        f"2. backbone and neck: {columns} x {rows} cells",
        cmap="viridis",
    )
    found = explained("detr-voc", method=Method.ENCODER_ATTENTION, point=Point(170, 115))
    overlaid(axes[2], image, found.heatmap.values, found.heatmap.box.xyxy(), "3. encoder: cells ask cells")
    found = explained("detr-voc", method=Method.CROSS_ATTENTION)
    overlaid(axes[3], image, found.heatmap.values, found.heatmap.box.xyxy(), "4. decoder: queries ask cells")
    detections = predictor.detect(image, threshold=0.0)
    show(axes[4], image, f"5. heads: {len(detections)} labels and boxes")
    for detection in reversed(detections):
        draw_box(axes[4], detection)
    show(axes[5], image, "6. those above the threshold")
    for detection in predictor.detect(image):
        draw_box(axes[5], detection)
        axes[5].text(
            8, 28, f"{detection.label} {detection.score:.1%}", color="black", fontsize=9, backgroundcolor="white"
        )
    return made


PICTURES: dict[str, Callable[[], Figure]] = {
    "query-key-value": query_key_value,
    "similarity": similarity,
    "temperature": temperature,
    "self-attention": self_attention,
    "linear-classifier": linear_classifier,
    "multi-head": multi_head,
    "growth": growth,
    "positions": positions,
    "norms": norms,
    "cross-attention": cross_attention,
    "patches": patches,
    "mixer": mixer,
    "queries": queries,
    "detr": detr,
}


def main() -> None:
    """Draw all pictures."""
    plt.rcParams.update({"text.color": INK, "axes.spines.top": False, "axes.spines.right": False})
    for name, draw in PICTURES.items():
        made = draw()
        made.tight_layout()
        buffer = io.BytesIO()
        made.savefig(buffer, dpi=110)
        plt.close(made)
        Image.open(buffer).convert("RGB").quantize(128).save(OUT / f"{name}.png", optimize=True)
        print(f"docs/tour/{name}.png")


if __name__ == "__main__":
    main()
