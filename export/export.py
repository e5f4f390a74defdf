"""`vitrine export`: convert a run to a verified bundle. If it fails, nothing is written."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from vitrine.bundle.files import hash_file
from vitrine.bundle.loading import golden_name, load_bundle, load_explain_network
from vitrine.bundle.manifest import (
    CARD_FILE,
    GATE_METRIC,
    GENERATED,
    GOLDEN_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    Calibration,
    DetectionPreprocessing,
    File,
    Identity,
    Latency,
    Licences,
    Manifest,
    Name,
    Precision,
    Variant,
    Version,
)
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.runtime import CPU, OnnxNetwork
from vitrine.bundle.tolerances import MAX_DROP
from vitrine.export.accuracy import measure_accuracy, measure_calibration, measure_variant
from vitrine.export.errors import AccuracyError, ExportError
from vitrine.export.explain import write_explanation
from vitrine.export.graph import export_graph, served_module, write_metadata
from vitrine.export.inputs import (
    Inputs,
    calibration_inputs,
    chosen_by,
    evaluation_data,
    make_inputs,
    parity_images,
    trace_size,
)
from vitrine.export.latency import Timing, time_bundle
from vitrine.export.model_card import write_manifest
from vitrine.export.parity import check_metrics, check_parity
from vitrine.export.pictures import RELIABILITY_FILE, SAMPLES_FILE, reliability_svg, sample_sheet
from vitrine.export.provenance import describe, provenance
from vitrine.export.variants import make_variant
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.evaluation.metrics import predict

_GOLDEN_IMAGES = 3
_GOLDEN_EDGES = 240, 320  # maximum for detection: keeps the file small and start-up fast


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

    Accuracy and parity are measured on the data's split `test`, or `val` without it. Without data, which only imported
    runs may lack, accuracy is not measured, and parity is measured on generated images.

    Args:
        data_path: the data set; by default where it was when the run was trained.
        licences: terms of the weights and of the data, for manifest and card.
        notes: what a reader of the figures must know.
        variants: additional graphs besides the float32 one; they need data, int8 also its training images.
        max_drop: points of top-1 accuracy or AP that a variant may lose.
        default: variant that is served unless a request selects another.
        timing: runtimes that are timed for the card.
        providers: ONNX Runtime execution providers to verify, measure and time with.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
        ExportError: `out` exists or is not a valid bundle path, or the weights are untrained or too large.
        ParityError: the ONNX graph's outputs differ from torch's.
        AccuracyError: a variant loses more than `max_drop`.
        ProviderError: a provider is not available or did not start.
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
    data = evaluation_data(data_path, checkpoint)
    calibration_batches = calibration_inputs(data_path, checkpoint, precisions[1:])
    module = served_module(run, checkpoint)
    source = GENERATED if data is None else data.name
    images = parity_images(data, preprocessing)
    size = trace_size(preprocessing)

    with _staged(out) as bundle:
        model = bundle / MODEL_FILE
        export_graph(module, size, model)
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
        float_layers = _write_variants(bundle, precisions, calibration_batches)
        for precision in precisions:
            write_metadata(bundle / precision.file, {METADATA_KEY: metadata, "variant": precision.value})
        networks = {p: OnnxNetwork(bundle / p.file, providers=providers) for p in precisions}
        _write_golden(bundle / GOLDEN_FILE, networks, identity, images)

        metrics = None
        calibration = None
        if (checkpoint.temperature, checkpoint.offset) != (1, 0):
            calibration = Calibration(temperature=checkpoint.temperature, offset=checkpoint.offset)
        listed = dict.fromkeys(precisions, Variant())
        if data is not None:
            predictors = {p: make_predictor(n, identity.preprocessing, identity.labels) for p, n in networks.items()}
            predictions = {precision: predict(predictor, data) for precision, predictor in predictors.items()}
            reference = predictions[Precision.FP32]
            metrics = measure_accuracy(reference, data, chosen=chosen_by(data, checkpoint), notes=notes)
            parity = check_metrics(parity, checkpoint, data, metrics)
            if calibration is not None:
                calibration = measure_calibration(calibration, reference, data)
            for precision in precisions[1:]:
                listed[precision] = measure_variant(reference, predictions[precision], data, float_layers[precision])
            sample_sheet(predictors[Precision.FP32], data).save(bundle / SAMPLES_FILE, quality=85)
            if metrics.reliability is not None:
                (bundle / RELIABILITY_FILE).write_text(reliability_svg(metrics.reliability))
        for precision, variant in listed.items():
            if variant.drop is not None and variant.drop > max_drop:
                metric = GATE_METRIC[identity.task]
                raise AccuracyError(precision, metric=metric, limit=max_drop, found=variant.drop)
        explanation = write_explanation(checkpoint, size, bundle, providers)
        latency = time_bundle(module, bundle, precisions, size, timing, providers)
        manifest = Manifest(
            **dict(identity) | {"metrics": metrics},
            parity=parity,
            calibration=calibration,
            variants=listed,
            default_variant=default,
            default_reason=_reason(default, listed, latency),
            latency=latency,
            explanation=explanation,
            files={file.name: File(sha256=hash_file(file), size=file.stat().st_size) for file in _files(bundle)},
        )
        write_manifest(bundle, manifest)
        for precision in precisions:
            load_bundle(bundle, variant=precision, providers=providers)
        load_explain_network(bundle, providers=providers)
    return manifest


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` at the end, and removed on failure."""
    out.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent.parent) as partial:
        # load_bundle checks a manifest against its folder's name
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


def _write_variants(
    bundle: Path, precisions: Sequence[Precision], calibration: Sequence[Inputs]
) -> dict[Precision, tuple[str, ...]]:
    """Write the graphs; return the layers that each leaves in float32."""
    float_layers: dict[Precision, tuple[str, ...]] = {Precision.FP32: ()}
    model = onnx.load(bundle / MODEL_FILE)
    for precision in precisions[1:]:
        variant = make_variant(model, precision, calibration)
        onnx.save(variant.model, bundle / precision.file)
        float_layers[precision] = variant.float_layers
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
        return f"Its outputs match torch's.{speed}"
    return f"It was chosen at export; it loses {variants[default].drop:.2f} points against fp32.{speed}"


def _files(bundle: Path) -> list[Path]:
    """Return the files that the manifest lists: all but itself and the card, which is written from it."""
    return sorted(file for file in bundle.iterdir() if file.name not in (MANIFEST_FILE, CARD_FILE))
