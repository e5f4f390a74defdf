"""Batch prediction: files and folders in, a results file (`batch.results`) or annotated pictures out.

A thread pool decodes images and runs them through the single-threaded network, one per call, which gives the highest
throughput. Results keep the order of the inputs, and only a few images are in memory at a time.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Protocol

from PIL import Image

from vitrine.batch.results import Record, Results, ResultsError
from vitrine.bundle.drawing import MAX_JPEG_EDGE, draw_classification, draw_detections
from vitrine.bundle.errors import ImageError, ImageTooLargeError, ParameterError, UnsupportedImageError, VitrineError
from vitrine.bundle.files import hash_file
from vitrine.bundle.images import SUPPORTED_FORMATS, ReducedImage, decode, decode_for
from vitrine.bundle.loading import Bundle
from vitrine.bundle.machine import available_cores
from vitrine.bundle.manifest import Manifest, Preprocessing
from vitrine.bundle.predictors import Classifier, Detector, Predictor

MAX_BYTES = 512 * 2**20  # per file: more than any image of `MAX_PIXELS` needs in any format
_PENDING_PER_THREAD = 4  # images per thread that are in progress, or done and waiting for an earlier one
_JPEG_QUALITY = 92


class UnreadableFileError(ImageError):
    """An image file is missing or cannot be read."""

    code = "unreadable_file"

    def __init__(self, error: OSError) -> None:
        super().__init__(f"file: expected one that can be read, found: {error.strerror or error}")


class Query(Protocol):
    """A predictor with its parameters, applied to every image."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that images are decoded for."""

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        """Return the answer in the service's fields, and its picture if the full-size image is given."""

    def parameters(self) -> dict[str, object]:
        """The parameters as JSON values."""


@dataclass(frozen=True)
class ClassificationQuery:
    """Classify with `Classifier.classify`."""

    classifier: Classifier
    top_k: int
    labels: tuple[str, ...] | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.classifier.preprocessing

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        predictions = self.classifier.classify(image, top_k=self.top_k, labels=self.labels)
        picture = None if whole is None else draw_classification(whole, predictions)
        return {"predictions": [asdict(prediction) for prediction in predictions]}, picture

    def parameters(self) -> dict[str, object]:
        return {"top_k": self.top_k, "labels": self.labels}


@dataclass(frozen=True)
class DetectionQuery:
    """Detect with `Detector.detect`."""

    detector: Detector
    threshold: float
    max_detections: int
    labels: tuple[str, ...] | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.detector.preprocessing

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        detections = self.detector.detect(
            image, threshold=self.threshold, max_detections=self.max_detections, labels=self.labels
        )
        picture = None if whole is None else draw_detections(whole, detections)
        return {"detections": [asdict(detection) for detection in detections]}, picture

    def parameters(self) -> dict[str, object]:
        return {"threshold": self.threshold, "max_detections": self.max_detections, "labels": self.labels}


def make_query(
    predictor: Predictor,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    max_detections: int | None = None,
    labels: Collection[str] | None = None,
) -> Query:
    """Return the query for a predictor; None stands for the service's default.

    Raises:
        ParameterError: a parameter is out of range or belongs to the other task, or a label does not exist.
    """
    selected = tuple(sorted(set(labels))) if labels else None
    if isinstance(predictor, Classifier):
        _reject_parameters("a detector", threshold=threshold, max_detections=max_detections)
        query = ClassificationQuery(predictor, 5 if top_k is None else top_k, selected)
        predictor.check_parameters(top_k=query.top_k, labels=selected)
        return query
    _reject_parameters("a classifier", top_k=top_k)
    threshold = 0.5 if threshold is None else threshold
    max_detections = 100 if max_detections is None else max_detections
    predictor.check_parameters(threshold=threshold, max_detections=max_detections, labels=selected)
    return DetectionQuery(predictor, threshold, max_detections, selected)


def _reject_parameters(task: str, **parameters: object) -> None:
    for name, value in parameters.items():
        if value is not None:
            raise ParameterError(name, expected=f"none: it is for {task}", found=value)


@dataclass(frozen=True, slots=True)
class Source:
    """A file that may be an image."""

    path: str  # as given on input, or below an input folder
    relative: str  # path below the input folder; the file name if the file itself is an input
    named: bool  # the file itself is an input, so it is an error if it is not an image


def find_sources(paths: Iterable[Path], *, exclude: Collection[Path] = ()) -> list[Source]:
    """Return the given files and, recursively and sorted by name, the files of the given folders.

    Duplicates are dropped, as are hidden files and everything in `exclude`, i.e. the program's own output. Symbolic
    links are followed, except to a folder that contains them.

    Raises:
        VitrineError: a folder cannot be read, or there is no file at all.
    """
    excluded = {_real_path(path) for path in exclude}
    sources: dict[str, Source] = {}
    for path in paths:
        if not os.path.isdir(path):
            sources.setdefault(str(path), Source(str(path), path.name, True))
            continue
        if any(_real_path(path).is_relative_to(folder) for folder in excluded):
            raise VitrineError(f"{path}: expected a folder of images, found one that pictures are written to")
        for file in _walk(path, excluded, frozenset()):
            sources.setdefault(str(file), Source(str(file), str(file.relative_to(path)), False))
    if not sources:
        raise VitrineError(f"{', '.join(map(str, paths)) or 'PATH'}: expected image files, found no file")
    return list(sources.values())


def _walk(folder: Path, excluded: Collection[Path], ancestors: frozenset[tuple[int, int]]) -> Iterator[Path]:
    names = {path.name for path in excluded}
    try:
        stat = folder.stat()
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise VitrineError(f"{folder}: expected a folder that can be read, found: {error.strerror}") from error
    ancestors |= {(stat.st_dev, stat.st_ino)}
    for name in entries:
        path = folder / name
        if name.startswith(".") or (name in names and _real_path(path) in excluded):
            continue
        if os.path.isdir(path):
            stat = path.stat()
            if (stat.st_dev, stat.st_ino) not in ancestors:
                yield from _walk(path, excluded, ancestors)
        elif os.path.isfile(path) or os.path.islink(path):  # a dangling link is an error of that image
            yield path


def _real_path(path: Path | str) -> Path:
    """Resolve symbolic links; unlike `Path.resolve`, also in a loop of links."""
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class Summary:
    """Counts of the processed files."""

    answered: int
    errors: int
    skipped: int  # files in folders that are not images
    resumed: int  # answered or failed in an earlier run


def predict_files(
    bundle: Bundle,
    query: Query,
    sources: Sequence[Source],
    *,
    out: Path | None = None,
    annotate: Path | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    callback: Callable[[int, Record | None], None] = lambda done, record: None,
) -> Summary:
    """Run a query on files, in order.

    A broken image becomes an error record and does not stop the run. A file found in a folder is skipped if neither its
    content nor its name is that of an image.

    Args:
        out: results file, see `batch.results`; an interrupted run of the same query is resumed.
        annotate: folder for a picture of each answer, at the image's path below its input folder: JPEG if the name
            says so, else PNG. A duplicate name gets a number. The folder must be new or empty, unless a run is resumed.
        providers: execution providers of the bundle; results of other providers are not resumed.
        threads: images in progress at once (default: `available_cores()`).
        callback: called after each file with the number of files done, including those of an earlier run, and the
            file's record, or None if it was skipped.

    Raises:
        ResultsError: `out` or `annotate` cannot be written or belongs to something else.
    """
    model = {"name": bundle.manifest.name, "version": bundle.manifest.version, "variant": bundle.variant}
    config = {
        **model,
        "graph_sha256": _graph_sha256(bundle),
        "providers": list(providers),
        **query.parameters(),
        "annotate": None if annotate is None else str(annotate),
    }
    skipped = 0
    failed: set[str] = set()
    with ExitStack() as stack:
        results = None
        if out is not None:
            boxes = isinstance(bundle.predictor, Detector)
            results = stack.enter_context(Results(out, config, bundle.manifest.labels, boxes=boxes))
        names: dict[str, str] = {}
        if annotate is not None:
            _check_picture_folder(annotate, sources, resumed=results is not None and results.has_header)
            names = picture_names(sources, {} if results is None else results.pictures)
        answered = {} if results is None else results.answered
        remaining = [source for source in sources if source.path not in answered]
        resumed = len(sources) - len(remaining)
        if results is not None:
            results.begin()
            failed = results.failed & {source.path for source in sources}

        def predict(source: Source) -> Record | None:
            picture = None if annotate is None else annotate / names[source.path]
            return _predict_file(source, query, model, picture, names.get(source.path))

        records = stack.enter_context(closing(_map_in_order(predict, remaining, threads or available_cores())))
        for done, record in enumerate(records, start=resumed + 1):
            if record is None:
                skipped += 1
            else:
                if "error" in record:
                    failed.add(record["path"])
                if results is not None:
                    results.add(record)
            callback(done, record)
        if results is not None:
            results.finish([source.path for source in sources])
    return Summary(len(sources) - skipped - len(failed), len(failed), skipped, resumed)


def _graph_sha256(bundle: Bundle) -> str:
    if isinstance(bundle.manifest, Manifest) and bundle.variant is not None:
        return bundle.manifest.files[bundle.variant.file].sha256
    return hash_file(bundle.path)


def _predict_file(source: Source, query: Query, model: Record, picture: Path | None, name: str | None) -> Record | None:
    """Return the record of a file, None to skip it. The picture is written before the record is returned."""
    expects_image = source.named or _format(source.path) is not None
    try:
        data = _read_file(source.path)
        if not data and not expects_image:
            return None
        image = decode_for(data, query.preprocessing)
        whole = None if picture is None else image.image if image.is_whole else decode(data)
    except UnsupportedImageError as error:
        return _error_record(source, error) if expects_image else None
    except ImageError as error:
        return _error_record(source, error)
    fields, drawn = query.answer(image, whole)
    if drawn is not None and picture is not None:
        _save_picture(drawn, picture)
        fields["annotated"] = name
    return {"path": source.path, "model": model, "image": {"width": image.width, "height": image.height}, **fields}


def _error_record(source: Source, error: ImageError) -> Record:
    return {"path": source.path, "error": {"code": error.code, "message": str(error)}}


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableFileError(error) from error
    if len(data) > MAX_BYTES:
        raise ImageTooLargeError(limit=MAX_BYTES, unit="bytes", found="more")
    return data


def _map_in_order(
    function: Callable[[Source], Record | None], sources: Iterable[Source], threads: int
) -> Generator[Record | None, None, None]:
    """Map a function over sources on a thread pool, with bounded look-ahead; yield the results in order."""
    pool = ThreadPoolExecutor(threads, "image")
    pending: deque[Future[Record | None]] = deque()
    try:
        for source in sources:
            if len(pending) == threads * _PENDING_PER_THREAD:
                yield pending.popleft().result()
            pending.append(pool.submit(function, source))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt must not wait for slow reads


def picture_names(sources: Sequence[Source], existing: Record) -> dict[str, str]:
    """Return the path of each file's picture below the picture folder, unique even on case-insensitive file systems.

    Args:
        existing: names of pictures from an earlier run, by the path of their image.
    """
    taken = {name.casefold() for name in existing.values()}
    numbers: dict[str, int] = {}  # last number used for a name
    names = dict(existing)
    for source in sources:
        if source.path in names:
            continue
        path = PurePath(source.relative)
        image_format = _format(path.name)
        if image_format != "JPEG":
            path = path.with_suffix(".png") if image_format else path.with_name(f"{path.name}.png")
        name, key = path, str(path).casefold()
        while str(name).casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            name = path.with_stem(f"{path.stem}-{numbers[key]}")
        taken.add(str(name).casefold())
        names[source.path] = str(name)
    return names


@lru_cache(maxsize=1)
def _formats_by_suffix() -> dict[str, str]:
    extensions = Image.registered_extensions().items()
    return {suffix: name for suffix, name in extensions if name in (*SUPPORTED_FORMATS, "MPO")}


def _format(name: str) -> str | None:
    """Return the image format, by Pillow's name, of a file's suffix; None if not supported."""
    return _formats_by_suffix().get(PurePath(name).suffix.lower())


def _check_picture_folder(folder: Path, sources: Sequence[Source], *, resumed: bool) -> None:
    """Create the folder for pictures and check that nothing else can be overwritten, above all the input images."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed and any(folder.iterdir()):
            raise ResultsError(folder, "expected a new or an empty folder for the pictures, found files in it")
    except OSError as error:
        raise ResultsError(folder, f"expected a folder for the pictures, found: {error.strerror}") from error
    real_folder = _real_path(folder)
    for source in sources:
        if source.named and _real_path(source.path).is_relative_to(real_folder):
            raise ResultsError(source.path, "expected an image elsewhere, found it in the folder of the pictures")


def _save_picture(picture: Image.Image, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if _format(file.name) == "JPEG":
            picture.thumbnail((MAX_JPEG_EDGE, MAX_JPEG_EDGE))
            picture.save(file, "JPEG", quality=_JPEG_QUALITY)
        else:
            picture.save(file, "PNG")
    except OSError as error:
        raise ResultsError(file, f"the picture cannot be written: {error.strerror or error}") from error


def format_record(record: Record) -> str:
    """Format a record as text: one line, plus one per object for detections, with coordinates in pixels."""
    if "error" in record:
        lines = [f"error: {record['error']['message']}"]
    elif "predictions" in record:
        lines = [", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in record["predictions"])]
    else:
        lines = [_plural(len(record["detections"]), "object")]
        for entry in record["detections"]:
            box = ", ".join(f"{name} {edge:.1f}" for name, edge in entry["box"].items())
            lines.append(f"  {entry['label']} {entry['score']:.1%}  {box}")
    text = "\n".join((f"{record['path']}: {lines[0]}", *lines[1:]))
    return text.encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8


def format_summary(summary: Summary) -> str:
    """Format a summary as one line."""
    counts = [_plural(summary.answered, "image"), _plural(summary.errors, "error")]
    if summary.skipped:
        counts.append(f"{_plural(summary.skipped, 'other file')} skipped")
    if summary.resumed:
        counts.append(f"{summary.resumed} done before")
    return ", ".join(counts)


def _plural(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
