"""The command line. Commands only dispatch, and import their package when they run, so that serving needs no torch."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitrine import __version__
from vitrine.bundle.errors import VitrineError, printable, unknown
from vitrine.bundle.explaining import Explainer, Method, Point, default_question, methods_of
from vitrine.bundle.images import decode
from vitrine.bundle.loading import (
    Bundle,
    default_root,
    find_bundles,
    load_bundle,
    load_explain_network,
    load_file,
    read_manifest,
)
from vitrine.bundle.machine import available_cores
from vitrine.bundle.manifest import MAIN_METRIC, MANIFEST_FILE, NOT_STATED, Identity, Licences, Precision, Task
from vitrine.bundle.predictors import Prediction
from vitrine.bundle.runtime import parse_providers
from vitrine.bundle.tolerances import MAX_DROP

app = typer.Typer(
    help="Vision transformers from training to an HTTP answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Providers = Annotated[str, typer.Option("--providers", help="ONNX Runtime's execution providers in order: cuda,cpu.")]
Variant = Annotated[
    Precision | None, typer.Option(help="Graph of the bundle (default: the one that it serves).", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitrine {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision transformers from training to an HTTP answer."""


data_app = typer.Typer(help="Fetch and check data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A name in `vitrine recipes`, or a file: .py or .yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data set (default: data/ and the end of the recipe's name).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/ and the recipe's name).")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="A run, trained or imported, whose weights to start from.")
    ] = None,
    finetune: Annotated[
        bool,
        typer.Option("--finetune", help="Then train the backbone's last stage, too; the head's run is kept in head/."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the run folder.")] = False,
) -> None:
    """Train a network; KEY=VALUE changes the recipe. Under torchrun, on many processes."""
    from vitrine.models.published.catalogue import CATALOGUE
    from vitrine.models.published.importing import import_by_name
    from vitrine.models.training.checkpoint import load_checkpoint
    from vitrine.models.training.evaluation.report import write_report
    from vitrine.models.training.loop import train as run_training
    from vitrine.models.training.registry import load_recipe, pretrained_weights, recipe_name

    changes, name = settings or [], recipe_name(recipe)
    run = out or Path("runs") / name
    data_path = data or Path("data") / name.rpartition("_")[2]
    weights = None if start is not None else pretrained_weights(recipe, changes)
    if weights is not None:
        if weights not in CATALOGUE:
            raise VitrineError(f"{recipe}: pretrained: {unknown(weights, list(CATALOGUE))}; or pretrained=null, --from")
        start = import_by_name(weights, Path("runs"))
    chosen = load_recipe(recipe, changes, None if start is None else load_checkpoint(start))
    first = run / "head" if finetune else run
    trained = run_training(chosen, data_path, first, resume=resume, start=start, changes=changes)
    if finetune and trained.is_finished:
        tuned = load_recipe("last_stages", [], trained)
        trained = run_training(tuned, data_path, run, resume=resume, start=first)
    if int(os.environ.get("RANK", "0")) == 0 and trained.is_finished:  # else it was interrupted
        typer.echo(f"trained: {run}")
        typer.echo(f"report: {write_report(run, data_path=data_path)}")


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="A recipe, to print its description and settings.")] = "",
    start: Annotated[
        Path | None, typer.Option("--from", help="The run to start from, for a recipe that needs one.")
    ] = None,
) -> None:
    """List the recipes of `vitrine train`, or one with its settings."""
    from vitrine.models.training.checkpoint import load_checkpoint
    from vitrine.models.training.recipe import flatten
    from vitrine.models.training.registry import describe_recipes, load_recipe, needs_start, recipe_description

    if not name:
        typer.echo("\n".join(f"{known:<18}  {description}" for known, description in describe_recipes().items()))
        return
    typer.echo(recipe_description(name))
    if start is None and needs_start(name):
        typer.echo("Its settings depend on the network: --from RUN prints them.")
        return
    chosen = load_recipe(name, [], None if start is None else load_checkpoint(start))
    for key, value in flatten(chosen.model_dump(mode="json")).items():
        typer.echo(f"{key}={value if isinstance(value, str) else json.dumps(value)}")


@data_app.command("check")
def check_data(
    path: Annotated[Path, typer.Argument(help="Data set.")],
    split: Annotated[
        list[str] | None, typer.Option(help="Split; may be repeated (default: all).", show_default=False)
    ] = None,
    sheets: Annotated[
        Path | None, typer.Option(help="Folder for a contact sheet of each split.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every finding.")] = False,
) -> None:
    """Count a data set; report broken, empty, duplicate and misplaced items. Exit status 1 if there are errors."""
    from vitrine.models.training.data.check import check_data, format_summary

    summary = check_data(path, split or (), sheets=sheets, show=True)
    typer.echo(json.dumps(summary.as_json(), indent=2) if as_json else format_summary(summary))
    raise typer.Exit(1 if summary.errors else 0)


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(help="Name of a public data set; without it, they are listed.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to make (default: data/NAME).", show_default=False)] = None,
) -> None:
    """Download a public data set, verify it and arrange it for training."""
    from vitrine.models.training.data.fetch import SOURCES, fetch

    if not name:
        typer.echo("\n".join(f"{source.name:<14}  {source.terms}" for source in SOURCES.values()))
        return
    if name not in SOURCES:
        raise VitrineError(unknown(name, list(SOURCES)))
    folder = out or Path("data") / name
    done = "fetched" if fetch(SOURCES[name], folder) else "already there"
    typer.echo(f"{done}: {folder}  {SOURCES[name].terms}")


@data_app.command("crops")
def crop_data(
    path: Annotated[Path, typer.Argument(help="Data set with boxes.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    split: Annotated[str, typer.Option(help="Split.")] = "train",
    margin: Annotated[float, typer.Option(min=0, help="Margin around each box, as a fraction of its edge.")] = 0.1,
    smallest: Annotated[int, typer.Option(min=1, help="Shortest edge in pixels; smaller objects are skipped.")] = 16,
) -> None:
    """Crop the objects of a detection set: a classification set to pretrain a detector's backbone on."""
    from vitrine.bundle.manifest import Task
    from vitrine.models.training.data.crops import write_crops
    from vitrine.models.training.data.dataset import DetectionData
    from vitrine.models.training.data.layouts import load_split

    data = load_split(path, Task.DETECTION, split)
    assert isinstance(data, DetectionData)
    count = write_crops(data, out / f"{split}.npz", margin=margin, smallest=smallest, show=True)
    typer.echo(f"{count:,} objects of {len(data):,} images: {out}")


def _print_catalogue(wanted: bool) -> None:
    if wanted:
        from vitrine.models.published.catalogue import CATALOGUE

        for weights in CATALOGUE.values():
            typer.echo(f"{weights.name:<18}  {weights.licence:<10}  {weights.result:<46}  {weights.source}")
        raise typer.Exit


@app.command("import")
def import_(
    weights: Annotated[
        str,
        typer.Argument(
            help="A name in --list, hf:OWNER/NAME, timm:NAME or https://...; or a path: "
            "safetensors, .pth, .bin, .npz, a folder."
        ),
    ],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant, if the file does not determine it: detr_resnet50_dc5, ...")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="imagenet-1k, coco or a file with a label on each line.")] = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="Initialise a new, untrained head for --labels.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/ and the weights' name).")] = None,
    list_: Annotated[
        bool, typer.Option("--list", callback=_print_catalogue, is_eager=True, help="List the names, and exit.")
    ] = False,
) -> None:
    """Turn published weights into a run; KEY=VALUE overrides a setting (image_size=384, preprocessing.crop_pct=1)."""
    from vitrine.models.published.catalogue import find_weights
    from vitrine.models.published.importing import import_weights

    name, path, known_variant = find_weights(weights)
    out = out or Path("runs") / name
    variant = variant or known_variant
    imported = import_weights(path, out, variant=variant, labels=labels, reset_head=reset_head, changes=settings or [])
    for note in imported.notes:
        typer.echo(f"  {note}")
    made = imported.checkpoint
    assert made.origin is not None
    size = f"{imported.parameters / 1e6:.2f} M parameters"
    typer.echo(f"imported: {out}  {made.origin.layout}, {size}, {len(made.labels)} labels")
    if made.origin.untrained:
        typer.echo(f"  to be trained: {', '.join(made.origin.untrained)}")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run, a bundle, or an ONNX file of a bundle.")],
    data: Annotated[Path, typer.Option(help="Data set.")],
    split: Annotated[str | None, typer.Option(help="Split (default: test, or val if there is no test).")] = None,
    variant: Variant = None,
    providers: Providers = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole confusion matrix.")] = False,
) -> None:
    """Measure the accuracy or average precision of a run (in torch) or a bundle (in ONNX Runtime)."""
    from vitrine.models.training.data.dataset import ClassificationData
    from vitrine.models.training.data.layouts import has_split, load_split
    from vitrine.models.training.evaluation.metrics import (
        ClassificationPredictions,
        confusion_matrix,
        confusion_text,
        measure,
        predict,
    )

    if path.is_file() or (path / MANIFEST_FILE).is_file():
        bundle = _load(path, variant, parse_providers(providers), available_cores())
        predictor, task = bundle.predictor, bundle.manifest.task
    else:
        from vitrine.models.training.checkpoint import load_checkpoint
        from vitrine.models.training.network import checkpoint_predictor

        checkpoint = load_checkpoint(path)
        if checkpoint.progress is None and checkpoint.origin is not None and checkpoint.origin.untrained:
            untrained = ", ".join(checkpoint.origin.untrained)
            typer.echo(f"warning: {path}: {untrained} are randomly initialised: train before evaluating", err=True)
        predictor, task = checkpoint_predictor(checkpoint)
    images = load_split(data, task, split or ("test" if has_split(data, "test") else "val"))
    predictions = predict(predictor, images)
    metrics = measure(predictions, images)
    confusion = None
    if isinstance(predictions, ClassificationPredictions) and isinstance(images, ClassificationData):
        confusion = confusion_matrix(predictions, images)
    if as_json:
        document: dict[str, object] = {
            "data": images.name,
            "split": images.split,
            "images": len(images),
            "seconds": round(predictions.seconds, 3),
            "metrics": metrics,
        }
        if confusion is not None:
            document |= {"labels": images.labels, "confusion": confusion.tolist()}
        typer.echo(json.dumps(document))
        return
    typer.echo("\n".join(f"{name}\t{value:.4f}" for name, value in metrics.items()))
    if confusion is not None:
        typer.echo(f"\n{confusion_text(confusion, images.labels)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[
        Path | None, typer.Option(help="Data set (default: where it was when the run was trained).")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to search for mistakes.")] = "val",
    out: Annotated[Path | None, typer.Option(help="HTML file to write (default: report.html in the run).")] = None,
) -> None:
    """Write an HTML report of a run: learning curves, metrics and mistakes."""
    from vitrine.models.training.evaluation.report import write_report

    typer.echo(f"report: {write_report(run, out, data_path=data, split=split)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="The bundle to write: .../NAME/VERSION.")],
    data: Annotated[
        Path | None, typer.Option(help="Data set (default: where it was when the run was trained).")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights, for the model card.")] = NOT_STATED,
    data_licence: Annotated[str, typer.Option(help="Terms of the data, for the model card.")] = NOT_STATED,
    notes: Annotated[str, typer.Option(help="Caveats about the measurements, for the model card.")] = "",
    variant: Annotated[
        list[Precision] | None,
        typer.Option(help="Smaller or faster graph to add; may be repeated.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Points of top-1 or AP that a variant may lose, else the export fails.", min=0)
    ] = MAX_DROP,
    default: Annotated[Precision, typer.Option(help="The variant that is served.")] = Precision.FP32,
    latency: Annotated[
        Literal["none", "own", "all"],
        typer.Option(
            help="What to time for the card: torch and the graphs (own), also torch.compile and OpenVINO (all)."
        ),
    ] = "own",
    providers: Providers = "cpu",
) -> None:
    """Export a run as a verified bundle."""
    from vitrine.export.export import export_run
    from vitrine.export.latency import Timing

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves no partial bundle
    manifest = export_run(
        run,
        out,
        data_path=data,
        licences=Licences(weights=licence, data=data_licence),
        notes=notes,
        variants=variant or (),
        max_drop=max_drop,
        default=default,
        timing=Timing(latency),
        providers=parse_providers(providers),
    )
    typer.echo(f"exported: {out}  {_summary(manifest)}")
    if manifest.metrics is not None and manifest.metrics.chosen:
        typer.echo(
            f"on other images, expect less: training chose {manifest.metrics.chosen} by these (a split named test, or "
            "another --data, is measured on instead)"
        )


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, .../NAME/VERSION.")],
    run: Annotated[
        Path | None, typer.Option(help="The run it was exported from; also compare with torch.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Images to compare on (default: where they were when the run was trained).")
    ] = None,
    providers: Providers = "cpu",
) -> None:
    """Verify a bundle's files, graphs and golden outputs without torch; with --run, also against torch."""
    chosen = parse_providers(providers)
    manifest = read_manifest(bundle)
    for variant in manifest.variants:
        load_bundle(bundle, variant=variant, providers=chosen)
    graphs = [variant.value for variant in manifest.variants]
    if load_explain_network(bundle, providers=chosen) is not None:
        graphs.append("explain")
    typer.echo(f"verified: {_summary(manifest)} ({', '.join(graphs)})")
    if run is not None:
        from vitrine.export.parity import verify_run

        parity = verify_run(run, bundle, data_path=data, providers=chosen)
        differences = ", ".join(f"{name} {value:.1e}" for name, value in parity.max_abs_diff.items())
        typer.echo(f"matches torch: largest difference {differences} on {parity.images} images of {parity.data}")


@app.command()
def explain(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, .../NAME/VERSION.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[Path, typer.Option(help="Picture to write: the image with a heat map, of a detector one a box.")],
    method: Annotated[
        Method | None, typer.Option(help="How to explain; the bundle's first if none is named.", show_default=False)
    ] = None,
    point: Annotated[
        tuple[float, float] | None,
        typer.Option("--point", metavar="X Y", help="In pixels, for encoder-attention.", show_default=False),
    ] = None,
    opacity: Annotated[float, typer.Option(help="Of the hottest color.", min=0, max=1)] = 0.6,
) -> None:
    """Draw what a bundle's network looks at in an image."""
    from vitrine.bundle.drawing import draw_explanations

    loaded = load_bundle(bundle, variant=Precision.FP32, threads=available_cores())
    network = load_explain_network(bundle, threads=available_cores())
    changes = {} if method is None else {"method": method}
    question = default_question(loaded.manifest, **changes, point=None if point is None else Point(*point))
    try:
        decoded = decode(image.read_bytes())
        explained = Explainer(loaded.manifest, loaded.predictor, network).explain(decoded, question)
        draw_explanations(decoded, explained, question.method, opacity=opacity).save(out)
    except (OSError, ValueError) as error:  # the image is not there, or the picture has no known ending
        raise VitrineError(f"{error}") from error
    answers = [entry.target for entry in explained if not isinstance(entry.target, Point)]
    typer.echo(f"explained by {question.method}: {out}")
    for answer in answers:
        value = answer.probability if isinstance(answer, Prediction) else answer.score
        typer.echo(f"  {answer.label} {value:.1%}")


@app.command()
def faithfulness(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, .../NAME/VERSION.")],
    data: Annotated[Path, typer.Option(help="Data set: its split test, or val without it.")],
    images: Annotated[int, typer.Option(help="Images to measure on, evenly spaced.", min=1)] = 200,
) -> None:
    """Measure whether answers depend on what a bundle's heat maps mark, and write it to its manifest and card."""
    from tqdm import tqdm

    from vitrine.export.faithfulness import measure_faithfulness, write_faithfulness

    with tqdm(total=images, desc=bundle.parent.name, disable=None) as bar:
        measured = measure_faithfulness(bundle, data, images=images, progress=lambda: bar.update())
    manifest = write_faithfulness(bundle, measured)
    for entry in measured.maps:
        typer.echo(f"{entry.name:18} deletion {entry.deletion:.3f}  insertion {entry.insertion:.3f}")
    typer.echo(f"on {measured.images} images; the default method is {methods_of(manifest)[0]}")


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, .../NAME/VERSION, or an ONNX file of one.")],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Image files, and folders of them.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .jsonl, .csv or .coco.json (default: print).", show_default=False),
    ] = None,
    annotate: Annotated[
        Path | None, typer.Option(help="Folder for a picture of each answer.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Number of classes per image (default: 5).", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Minimum score of an object (default: 0.5).", show_default=False)
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(help="Maximum number of objects per image (default: 100).", show_default=False)
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Return only this label; may be repeated.", show_default=False)
    ] = None,
    variant: Variant = None,
    providers: Providers = "cpu",
) -> None:
    """Classify images or detect objects without a server; with the same --out, an interrupted job resumes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vitrine.batch.predict import find_sources, format_record, format_summary, make_query, predict_files
    from vitrine.batch.results import check_suffix, result_files

    chosen = parse_providers(providers)
    loaded = _load(bundle, variant, chosen)
    query = make_query(loaded.predictor, top_k=top_k, threshold=threshold, max_detections=max_detections, labels=label)
    if out is not None:
        check_suffix(out, boxes=loaded.manifest.task is Task.DETECTION)
    own = [*(result_files(out) if out is not None else ()), *([annotate] if annotate is not None else ())]
    sources = find_sources(paths, exclude=own)
    # Lines printed to a terminal show the progress by themselves.
    visible = sys.stderr.isatty() and (out is not None or not sys.stdout.isatty())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    done = 0
    with Progress(*columns, console=Console(stderr=True), disable=not visible, redirect_stdout=False) as progress:
        bar = progress.add_task(loaded.manifest.name, total=len(sources))

        def each(number: int, record: dict[str, Any] | None) -> None:
            nonlocal done
            done = number
            progress.update(bar, completed=number)
            if out is None and record is not None:
                typer.echo(format_record(record))

        try:
            summary = predict_files(loaded, query, sources, out=out, annotate=annotate, providers=chosen, callback=each)
        except KeyboardInterrupt:
            progress.stop()
            kept = "" if out is None else f"; they are kept, and the same command resumes {out}"
            typer.echo(f"vitrine: interrupted after {done} of {len(sources)} files{kept}", err=True)
            raise typer.Exit(130) from None
    counts = format_summary(summary)
    typer.echo(counts if out is None else f"predicted: {out}  {counts}", err=out is None)
    raise typer.Exit(1 if summary.errors else 0)


@app.command()
def bundles(
    root: Annotated[
        Path | None, typer.Argument(help="Folder of NAME/VERSION (default: that of serve).", show_default=False)
    ] = None,
) -> None:
    """List the bundles in a folder and where they are."""
    for path in find_bundles(root or default_root()):
        typer.echo(f"{_summary(read_manifest(path))}  {path}")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on, instead of VITRINE_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, instead of VITRINE_PORT.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port, instead of VITRINE_GRPC_PORT; 0 disables gRPC.")
    ] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="YAML file of settings, instead of VITRINE_SETTINGS.")
    ] = None,
    print_settings: Annotated[bool, typer.Option(help="Print the effective settings and exit.")] = False,
) -> None:
    """Serve the bundles in VITRINE_BUNDLES (default: bundles/, or else those of vitrine-bundles) over HTTP and gRPC."""
    from vitrine.service.access import Keys
    from vitrine.service.launch import check_address, check_bundles, isolate_imports, resolve_host, run, shared_folder
    from vitrine.service.observability.logs import wants_json
    from vitrine.service.rate_limit import RateLimit
    from vitrine.service.settings import FILE_VARIABLE, SettingsError, as_yaml, read_settings

    given = {"--host": host, "--port": port, "--grpc-port": grpc_port}
    options = {
        f"VITRINE_{option[2:].replace('-', '_').upper()}": option for option in given if given[option] is not None
    }
    os.environ.update({variable: str(given[option]) for variable, option in options.items()})
    if settings_file is not None:
        os.environ[FILE_VARIABLE] = str(settings_file)
    try:
        settings = read_settings()
    except SettingsError as error:
        variable, _, rest = str(error).partition(": ")
        raise SettingsError(f"{options.get(variable, variable)}: {rest}") from None
    if print_settings:
        typer.echo(as_yaml(settings, options))
        return
    isolate_imports()
    hashes = ",".join(settings.api_keys)
    if os.environ.get("VITRINE_API_KEYS", hashes) != hashes:  # the initial environment can be read in /proc
        os.environ["VITRINE_API_KEYS"] = hashes
        os.execv(sys.executable, [sys.executable, "-m", "vitrine", *sys.argv[1:]])
    address = resolve_host(settings.host)
    check_address(address, settings.port, "--port")
    if settings.grpc_port:
        check_address(address, settings.grpc_port, "--grpc-port")
    Keys(settings.api_keys, settings.api_keys_file)
    manifests = check_bundles(settings)
    RateLimit(settings.key_rate, shared_folder())
    if not wants_json(settings.log_format):
        _greet(settings.bundles, settings.host, settings.port, manifests)
    sys.stdout.flush()
    run(settings, address)


def _greet(roots: Sequence[Path], host: str, port: int, manifests: Sequence[Identity]) -> None:
    """Print the served models, the address and an example request for each task."""
    host = f"[{host}]" if ":" in host else host
    typer.echo(f"Vitrine serves {', '.join(map(str, roots))} on http://{host}:{port}")
    for manifest in manifests:
        typer.echo(f"  {_summary(manifest)}")
    for task, (route, example) in _ROUTES.items():
        names = [manifest.name for manifest in manifests if manifest.task is task]
        if names:
            image = example if Path(example).is_file() else "IMAGE.jpg"
            typer.echo(f"  try: curl -F image=@{image} -F model={names[-1]} http://{host}:{port}{route}")


@app.command()
def key(name: Annotated[str, typer.Option(help="Name of the key's owner, stored in its line.")] = "") -> None:
    """Make an API key, and its line for VITRINE_API_KEYS_FILE."""
    import secrets

    from vitrine.service.settings import MAX_KEY_NAME, hash_key, is_key_name

    if name and not is_key_name(name):
        expected = f"one word of at most {MAX_KEY_NAME} printable characters, without # and not a hash"
        raise VitrineError(f"--name: expected {expected}, found {name!r}")
    made = secrets.token_urlsafe(32)
    typer.echo(f"key, shown only once:  {made}")
    typer.echo(f"line for the file:     {f'{name} {hash_key(made)}'.strip()}")


_ROUTES = {  # path and example image of each task
    Task.CLASSIFICATION: ("/classify", "examples/frog.jpg"),
    Task.DETECTION: ("/detect", "examples/blood.jpg"),
}


def _load(path: Path, variant: Precision | None, providers: Sequence[str], threads: int = 1) -> Bundle:
    """Load a bundle from its folder, or one of its graphs from its file.

    Raises:
        VitrineError: as `load_bundle` and `load_file`, or a variant is named beside a file.
    """
    if not path.is_file():
        return load_bundle(path, variant=variant, threads=threads, providers=providers)
    if variant is not None:
        raise VitrineError(f"--variant: expected none, as {path} is one graph, found {variant}")
    return load_file(path, threads=threads, providers=providers)


def _summary(manifest: Identity) -> str:
    measured = "accuracy not measured"
    if manifest.metrics is not None:
        metric = MAIN_METRIC[manifest.task]
        value = manifest.metrics.values[metric]
        measured = f"{metric} {value:.1%} on {manifest.metrics.data} {manifest.metrics.split}"
    return f"{manifest.name} {manifest.version}  {manifest.task}, {len(manifest.labels)} labels, {measured}"


def main() -> None:
    """Entry point: errors that a user can act on are one line, never a traceback."""
    try:
        app()
    except VitrineError as error:
        typer.echo(f"vitrine: {printable(str(error))}", err=True)
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        needs = f"this command needs {error.name}, which is not installed"
        how = "pip install 'vitrine-serving[train]', in a checkout pip install -r requirements/train.txt"
        typer.echo(f"vitrine: {needs}: {how}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
