"""`vitrine export`: from a run to a verified bundle, or to an error that leaves nothing behind."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from vitrine.bundle.loading import golden_name, hash_file, load_bundle, load_explain_network
from vitrine.bundle.manifest import (
    CARD_FILE,
    EXPLAIN_FILE,
    GATE_METRIC,
    GENERATED,
    GOLDEN_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    Calibration,
    ClassificationPreprocessing,
    DetectionPreprocessing,
    Explanation,
    File,
    Identity,
    Latency,
    Licences,
    Manifest,
    Metrics,
    Name,
    Parity,
    Precision,
    Preprocessing,
    Task,
    Variant,
    Version,
)
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.runtime import CPU, OnnxNetwork
from vitrine.bundle.tolerances import MAX_DROP, METRIC
from vitrine.export.accuracy import agreement, measure_accuracy
from vitrine.export.errors import AccuracyError, ExportError, ParityError
from vitrine.export.explain import export_explain_graph
from vitrine.export.graph import export_graph, fuse_transformer, write_metadata
from vitrine.export.latency import Timing, measure_latency
from vitrine.export.model_card import model_card
from vitrine.export.parity import Inputs, check_parity, generated_images, make_inputs
from vitrine.export.pictures import RELIABILITY_FILE, SAMPLES_FILE, reliability_svg, sample_sheet
from vitrine.export.provenance import describe, provenance
from vitrine.export.variants import make_variant
from vitrine.models.explaining import explained
from vitrine.models.mlp_mixer import MlpMixer
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import Checkpoint, load_checkpoint
from vitrine.models.training.data.dataset import ClassificationData, Data, check_labels
from vitrine.models.training.data.layouts import has_split, load_split
from vitrine.models.training.evaluation.calibration import apply_temperature, calibration_error
from vitrine.models.training.evaluation.metrics import ClassificationPredictions, Predictions, measure, predict
from vitrine.models.training.network import torch_predictor

_LARGEST_FILE = 2**31 - 2**20  # bytes of weights: protobuf's limit, less the graph
_PARITY_IMAGES = 48
_GENERATED_IMAGES = 12
_GOLDEN_IMAGES = 3
_GOLDEN_EDGES = 240, 320  # of detection, at most: the file stays small and a start quick
_CALIBRATION_IMAGES = 96  # of the training images, for int8
_CALIBRATION_BATCH = 8


def export_run(
    run: Path,
    out: Path,
    *,
    data_path: Path | None = None,
    licences: Licences | None = None,
    notes: str = "",
    variants: Sequence[Precision] = (),
    max_drop: float = MAX_DROP,
    default: Precision = Precision.FP32,
    timing: Timing = Timing.NONE,
    providers: Sequence[str] = CPU,
) -> Manifest:
    """Write the bundle `out` (`.../<name>/<version>`) from the checkpoint of `run`.

    Accuracy and parity are measured on the split `test` of the data, or `val` where there is no `test`. Without data,
    which only an imported run may be, accuracy is not measured, and parity on generated images.

    Args:
        data_path: the data set; by default where it was when the run was trained.
        licences: terms of the weights and of the data, for manifest and card.
        notes: what a reader of the figures must know.
        variants: graphs to write beside the float32 one; they need data, int8 its training images.
        max_drop: points of top-1 accuracy or AP that a variant may lose.
        default: the variant that is served where no other is asked for.
        timing: which ways to run the network are timed for the card.
        providers: ONNX Runtime's names of where to verify, measure and time.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
        ExportError: `out` exists or is not named as a bundle is, or the weights are untrained or too large.
        ParityError: the ONNX file does not answer what torch answers.
        AccuracyError: a variant loses more than `max_drop`.
        ProviderError: a provider is not there or did not start.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; a version is never changed, choose the next number")
    _check_name(out)
    precisions = tuple(dict.fromkeys((Precision.FP32, *variants)))
    if default not in precisions:
        raise ExportError(f"default variant: expected one of {', '.join(precisions)}, found {default}")
    checkpoint = load_checkpoint(run)
    if checkpoint.origin is not None and checkpoint.origin.untrained and checkpoint.progress is None:
        untrained = ", ".join(checkpoint.origin.untrained)
        raise ExportError(f"{run}: weights: expected a trained network, found random numbers in {untrained}")
    preprocessing = checkpoint.read_preprocessing()
    data_path = _data_path(data_path, checkpoint)
    data = _evaluation_data(data_path, checkpoint)
    calibration = _calibration_inputs(data_path, checkpoint, precisions[1:])
    module = _served(run, checkpoint)
    source = GENERATED if data is None else data.name
    images = _images(data, preprocessing)
    input_size = _input_size(preprocessing)

    with _staged(out) as bundle:
        model = bundle / MODEL_FILE
        export_graph(module, input_size, model)
        parity = check_parity(module, model, images, preprocessing, source, providers)
        network = OnnxNetwork(model, providers=providers)
        identity = Identity(
            schema_version=2,
            name=out.parent.name,
            version=out.name,
            description=describe(checkpoint, None if data is None else data.name),
            architecture=checkpoint.architecture,
            task=preprocessing.task,
            inputs=network.inputs,
            outputs=network.outputs,
            preprocessing=preprocessing,
            labels=tuple(checkpoint.labels),
            licences=licences or Licences(),
            provenance=provenance(run, checkpoint, sum(p.numel() for p in module.network.parameters())),
        )
        metadata = identity.model_dump_json(exclude={"metrics"})
        float_layers = _write_variants(bundle, precisions, calibration)
        for precision in precisions:
            write_metadata(bundle / precision.file, {METADATA_KEY: metadata, "variant": precision.value})
        networks = {p: OnnxNetwork(bundle / p.file, providers=providers) for p in precisions}
        _write_golden(bundle / GOLDEN_FILE, networks, identity, images)

        predictions = _predictions(networks, identity, data)
        metrics = None if data is None else measure_accuracy(predictions[Precision.FP32], data, notes)
        if data is not None and metrics is not None:
            parity = _with_torch_metrics(parity, checkpoint, data, metrics)
            _write_pictures(bundle, networks[Precision.FP32], identity, data, metrics)
        listed = {p: _variant(p, predictions, data, float_layers[p]) for p in precisions}
        for precision, variant in listed.items():
            if variant.drop is not None and variant.drop > max_drop:
                metric = GATE_METRIC[identity.task]
                raise AccuracyError(precision, metric=metric, limit=max_drop, found=variant.drop)
        explanation = _explain(checkpoint, input_size, bundle, providers)
        latency = _timed(module, bundle, precisions, input_size, timing, providers)
        manifest = Manifest(
            **dict(identity) | {"metrics": metrics},
            parity=parity,
            calibration=_calibration(checkpoint.temperature, predictions, data, metrics),
            variants=listed,
            default_variant=default,
            default_reason=_reason(default, listed, latency),
            latency=latency,
            explanation=explanation,
            files={file.name: File(sha256=hash_file(file), size=file.stat().st_size) for file in _files(bundle)},
        )
        (bundle / MANIFEST_FILE).write_text(_as_json(manifest))
        (bundle / CARD_FILE).write_text(model_card(manifest))
        for precision in precisions:
            load_bundle(bundle, variant=precision, providers=providers)
        load_explain_network(bundle, providers=providers)
    return manifest


def verify_run(run: Path, bundle: Path, *, data_path: Path | None = None, providers: Sequence[str] = CPU) -> Parity:
    """Compare a bundle's float32 graph with the torch network of a run again.

    Args:
        data_path: as of `export_run`.

    Raises:
        BundleError, CheckpointError, DataError: one of them cannot be read.
        ParityError: the graph does not answer what torch answers; it says where in the network the difference begins.
    """
    manifest = load_bundle(bundle, variant=Precision.FP32, providers=providers).manifest
    checkpoint = load_checkpoint(run)
    for what, expected, found in (
        ("architecture", checkpoint.architecture, manifest.architecture),
        ("labels", tuple(checkpoint.labels), manifest.labels),
        ("preprocessing", checkpoint.read_preprocessing(), manifest.preprocessing),
    ):
        if expected != found:
            raise ExportError(f"{bundle}: {what}: expected that of {run}, {expected}, found {found}")
    data = _evaluation_data(_data_path(data_path, checkpoint), checkpoint)
    source = GENERATED if data is None else data.name
    images = _images(data, manifest.preprocessing)
    module = _served(run, checkpoint)
    return check_parity(module, bundle / MODEL_FILE, images, manifest.preprocessing, source, providers)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, and vanishes if anything fails."""
    out.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent.parent) as partial:
        # load_bundle holds a manifest against its folder's name
        bundle = Path(partial) / out.parent.name / out.name
        bundle.mkdir(parents=True)
        yield bundle
        out.parent.mkdir(exist_ok=True)
        bundle.rename(out)


def _check_name(out: Path) -> None:
    for what, kind, value in (("name", Name, out.parent.name), ("version", Version, out.name)):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ExportError(f"{out}: {what}: {error.errors()[0]['msg']}, found {value!r}") from error


def _served(run: Path, checkpoint: Checkpoint) -> ServedClassifier | ServedDetector:
    network, preprocessing = checkpoint.build(), checkpoint.read_preprocessing()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _LARGEST_FILE:
        raise ExportError(f"{run}: weights: expected at most 2 GB, which an ONNX file holds, found {size / 1e9:.1f} GB")
    return served(network, preprocessing.mean, preprocessing.std, checkpoint.temperature).eval()


def _data_path(path: Path | None, checkpoint: Checkpoint) -> Path | None:
    """Where the data is: as asked for, or where it was when the run was trained; None of an imported run."""
    if path is None and checkpoint.progress is not None:
        return Path(checkpoint.progress.data_path)
    return path


def _evaluation_data(path: Path | None, checkpoint: Checkpoint) -> Data | None:
    if path is None:
        return None
    data = load_split(path, checkpoint.task, "test" if has_split(path, "test") else "val")
    check_labels(data, checkpoint.labels)
    return data


def _calibration_inputs(path: Path | None, checkpoint: Checkpoint, variants: Sequence[Precision]) -> list[Inputs]:
    """Batches of training images, spread over the split; none where no 8-bit variant is wanted."""
    if path is None and variants:
        wanted = ", ".join(variants)
        raise ExportError(f"{wanted}: expected --data, on which to measure what the variants lose, found none")
    if path is None or not {Precision.INT8_DYNAMIC, Precision.INT8_STATIC} & set(variants):
        return []
    data = load_split(path, checkpoint.task, "train")
    chosen = np.linspace(0, len(data) - 1, min(_CALIBRATION_IMAGES, len(data))).astype(int).tolist()
    preprocessing = checkpoint.read_preprocessing()
    batches = [chosen[i : i + _CALIBRATION_BATCH] for i in range(0, len(chosen), _CALIBRATION_BATCH)]
    return [make_inputs([data.image(i) for i in batch], preprocessing) for batch in batches]


def _images(data: Data | None, preprocessing: Preprocessing) -> list[Image.Image]:
    if data is None:
        return generated_images(_GENERATED_IMAGES, preprocessing)
    return [data.image(i) for i in range(min(_PARITY_IMAGES, len(data)))]


def _input_size(preprocessing: Preprocessing) -> tuple[int, int]:
    if isinstance(preprocessing, ClassificationPreprocessing):
        return preprocessing.input_size
    return preprocessing.shortest_edge, preprocessing.longest_edge


def _write_variants(
    bundle: Path, precisions: Sequence[Precision], calibration: Sequence[Inputs]
) -> dict[Precision, tuple[str, ...]]:
    """Write the graphs; returns the layers that each leaves in float32."""
    float_layers: dict[Precision, tuple[str, ...]] = {Precision.FP32: ()}
    model = onnx.load(bundle / MODEL_FILE)
    for precision in precisions[1:]:
        made = make_variant(model, precision, calibration)
        onnx.save(made.model, bundle / precision.file)
        float_layers[precision] = made.float_layers
    return float_layers


def _write_golden(
    file: Path, networks: Mapping[Precision, OnnxNetwork], identity: Identity, images: Sequence[Image.Image]
) -> None:
    preprocessing = identity.preprocessing
    if isinstance(preprocessing, DetectionPreprocessing):
        shortest, longest = _GOLDEN_EDGES
        edges = {
            "shortest_edge": min(shortest, preprocessing.shortest_edge),
            "longest_edge": min(longest, preprocessing.longest_edge),
        }
        preprocessing = preprocessing.model_copy(update=edges)
    arrays: dict[str, NDArray[np.generic]] = make_inputs(images[:_GOLDEN_IMAGES], preprocessing)
    inputs = dict(arrays)
    for precision, network in networks.items():
        for spec, output in zip(identity.outputs, network(**inputs), strict=True):
            arrays[golden_name(spec.name, precision)] = output
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _predictions(
    networks: Mapping[Precision, OnnxNetwork], identity: Identity, data: Data | None
) -> dict[Precision, Predictions]:
    if data is None:
        return {}
    return {
        precision: predict(make_predictor(network, identity.preprocessing, identity.labels), data)
        for precision, network in networks.items()
    }


def _with_torch_metrics(parity: Parity, checkpoint: Checkpoint, data: Data, metrics: Metrics) -> Parity:
    predictor = torch_predictor(
        checkpoint.build(),
        checkpoint.read_preprocessing(),
        checkpoint.labels,
        torch.device("cpu"),
        checkpoint.temperature,
    )
    in_torch = measure(predict(predictor, data), data)
    name = GATE_METRIC[checkpoint.task]
    if not abs(in_torch[name] - metrics.values[name]) <= METRIC:
        limits = {"expected": f"{in_torch[name]:.4f} to within {METRIC}", "found": f"{metrics.values[name]:.4f}"}
        raise ParityError(data.name, quantity=name, **limits)
    return parity.model_copy(update={"torch_metrics": in_torch})


def _variant(
    precision: Precision, predictions: Mapping[Precision, Predictions], data: Data | None, float_layers: tuple[str, ...]
) -> Variant:
    if data is None or precision is Precision.FP32:
        return Variant()
    reference = predictions[Precision.FP32]
    name = GATE_METRIC[Task.CLASSIFICATION if isinstance(data, ClassificationData) else Task.DETECTION]
    values = measure(predictions[precision], data)
    return Variant(
        metrics=values,
        drop=round(100 * (measure(reference, data)[name] - values[name]), 4),
        agreement=agreement(reference, predictions[precision]),
        float_layers=float_layers,
    )


def _calibration(
    temperature: float, predictions: Mapping[Precision, Predictions], data: Data | None, metrics: Metrics | None
) -> Calibration | None:
    """How honest the probabilities are, without and with the temperature."""
    if temperature == 1:
        return None
    if data is None or metrics is None:
        return Calibration(temperature=temperature)
    found = predictions[Precision.FP32]
    assert isinstance(found, ClassificationPredictions)  # `served` refuses a detector with a temperature
    assert isinstance(data, ClassificationData)
    before = calibration_error(apply_temperature(found.probabilities, 1 / temperature), data.class_ids)
    return Calibration(temperature=temperature, ece_before=before, ece_after=metrics.values["ECE"])


def _explain(
    checkpoint: Checkpoint, input_size: tuple[int, int], bundle: Path, providers: Sequence[str]
) -> Explanation | None:
    preprocessing = checkpoint.read_preprocessing()
    network = checkpoint.build()
    module = explained(network, preprocessing.mean, preprocessing.std, checkpoint.temperature)
    if isinstance(network, MlpMixer):
        return Explanation(method="occlusion", patch_size=network.config.patch_size)
    if module is None:
        return None
    file = bundle / EXPLAIN_FILE
    export_explain_graph(module.eval(), input_size, file, bundle / MODEL_FILE)
    method = "class-activation" if "activation" in module.output_names else "attention"
    return Explanation(method=method, outputs=OnnxNetwork(file, providers=providers).outputs)


def _write_pictures(bundle: Path, network: OnnxNetwork, identity: Identity, data: Data, metrics: Metrics) -> None:
    predictor = make_predictor(network, identity.preprocessing, identity.labels)
    sample_sheet(predictor, data).save(bundle / SAMPLES_FILE, quality=85)
    if metrics.reliability is not None:
        (bundle / RELIABILITY_FILE).write_text(reliability_svg(metrics.reliability))


def _timed(
    module: ServedClassifier | ServedDetector,
    bundle: Path,
    precisions: Sequence[Precision],
    input_size: tuple[int, int],
    timing: Timing,
    providers: Sequence[str],
) -> Latency | None:
    if timing is Timing.NONE:
        return None
    files = {precision.file: bundle / precision.file for precision in precisions}
    with tempfile.TemporaryDirectory() as folder:
        traced, fused = Path(folder) / "traced.onnx", Path(folder) / "fused.onnx"
        export_graph(module, input_size, traced, optimised=False)
        fuse_transformer(bundle / MODEL_FILE, fused)
        files |= {
            "not optimised, as torch.onnx traces it": traced,
            "model.onnx with ONNX Runtime's transformer fusions": fused,
        }
        return measure_latency(module, files, input_size, providers=providers, others=timing is Timing.ALL)


def _reason(default: Precision, variants: Mapping[Precision, Variant], latency: Latency | None) -> str:
    if len(variants) == 1:
        return "It is the only variant."
    speed = ""
    if latency is not None:
        medians = {row.name: row.milliseconds for row in latency.rows}
        ratios = {
            other: float(np.mean(np.log(np.divide(medians[default.file], medians[other.file]))))
            for other in variants
            if other is not default
        }
        fastest = max(ratios, key=lambda other: ratios[other])
        speed = f" The fastest other, {fastest.value}, takes {np.exp(-ratios[fastest]):.2f} times its time here."
    if default is Precision.FP32:
        return f"It answers what torch answers.{speed}"
    return f"It was chosen at export; it loses {variants[default].drop:.2f} points against fp32.{speed}"


def _files(bundle: Path) -> list[Path]:
    """What the manifest lists: all but itself and the card that is written from it."""
    return sorted(file for file in bundle.iterdir() if file.name not in (MANIFEST_FILE, CARD_FILE))


def _as_json(manifest: Manifest) -> str:
    """Indented, with lists of plain values on one line."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    plain = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")
    return plain.sub(lambda found: "[" + re.sub(r",\n *", ", ", found[1]) + "]", text) + "\n"
