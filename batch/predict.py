"""Many images through one bundle: files and folders in, a file of results (`batch.results`) or pictures out.

Images are decoded and run on a pool of threads, each with one call of a single-threaded network, which gives the
highest throughput; answers come in the order in which the images were named, and only a few images are in memory.
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
from vitrine.bundle.drawing import draw_classification, draw_detections
from vitrine.bundle.errors import ImageError, ImageTooLargeError, ParameterError, UnsupportedImageError, VitrineError
from vitrine.bundle.images import SUPPORTED_FORMATS, ReducedImage, decode, decode_for
from vitrine.bundle.loading import Bundle, hash_file
from vitrine.bundle.machine import available_cores
from vitrine.bundle.manifest import Manifest, Preprocessing
from vitrine.bundle.predictors import Classifier, Detector, Predictor

MAX_BYTES = 512 * 2**20  # of one file: more than any image of `MAX_PIXELS` has, however it is stored
_WAITING = 4  # images a thread that are in work, or answered and wait for one before them
_JPEG_QUALITY = 92
_JPEG_EDGE = 65_500  # pixels; no JPEG can be longer


class UnreadableFileError(ImageError):
    """The file of an image is not there or cannot be read."""

    code = "unreadable_file"

    def __init__(self, error: OSError) -> None:
        super().__init__(f"file: expected one that can be read, found: {error.strerror or error}")


class Query(Protocol):
    """What is asked of every image."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What the images are decoded for."""

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        """The answer to an image in the service's words, and its picture if there is the whole image to draw in."""

    def parameters(self) -> dict[str, object]:
        """What was asked for, as JSON."""


@dataclass(frozen=True)
class ClassificationQuery:
    """The most probable classes, as `Classifier.classify` answers them."""

    classifier: Classifier
    top_k: int
    labels: tuple[str, ...] | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.classifier.preprocessing

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        found = self.classifier.classify(image, top_k=self.top_k, labels=self.labels)
        picture = None if whole is None else draw_classification(whole, found)
        return {"predictions": [asdict(prediction) for prediction in found]}, picture

    def parameters(self) -> dict[str, object]:
        return {"top_k": self.top_k, "labels": self.labels}


@dataclass(frozen=True)
class DetectionQuery:
    """The objects in the image, as `Detector.detect` answers them."""

    detector: Detector
    threshold: float
    max_detections: int
    labels: tuple[str, ...] | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.detector.preprocessing

    def answer(self, image: ReducedImage, whole: Image.Image | None) -> tuple[Record, Image.Image | None]:
        found = self.detector.detect(
            image, threshold=self.threshold, max_detections=self.max_detections, labels=self.labels
        )
        picture = None if whole is None else draw_detections(whole, found)
        return {"detections": [asdict(detection) for detection in found]}, picture

    def parameters(self) -> dict[str, object]:
        return {"threshold": self.threshold, "max_detections": self.max_detections, "labels": self.labels}


def ask(
    predictor: Predictor,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    max_detections: int | None = None,
    labels: Collection[str] | None = None,
) -> Query:
    """The question that a predictor answers; None means the service's default.

    Raises:
        ParameterError: a parameter is outside its range or belongs to the other task, or there is no such label.
    """
    chosen = tuple(sorted(set(labels))) if labels else None
    if isinstance(predictor, Classifier):
        _refuse("a detector", threshold=threshold, max_detections=max_detections)
        query = ClassificationQuery(predictor, 5 if top_k is None else top_k, chosen)
        predictor.check(top_k=query.top_k, labels=chosen)
        return query
    _refuse("a classifier", top_k=top_k)
    limits = (0.5 if threshold is None else threshold, 100 if max_detections is None else max_detections)
    predictor.check(threshold=limits[0], max_detections=limits[1], labels=chosen)
    return DetectionQuery(predictor, *limits, chosen)


def _refuse(task: str, **parameters: object) -> None:
    for name, value in parameters.items():
        if value is not None:
            raise ParameterError(name, expected=f"none: it is for {task}", found=value)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that may be an image."""

    path: str  # as it was named, or below a folder as that was named
    relative: str  # below the folder that it was found in; the file's name alone where it was named itself
    named: bool  # itself, so that it is an error if it is no image


def find_sources(paths: Iterable[Path], *, leave_out: Collection[Path] = ()) -> list[Source]:
    """The files named, and those in folders named and in all folders below, sorted by their names.

    A file that was named twice comes once. What begins with a dot is left out, as is what `leave_out` holds: what the
    program writes itself. Links are followed, but to no folder that they lie in.

    Raises:
        VitrineError: a folder cannot be read, or there is no file at all.
    """
    hidden = {_real(path) for path in leave_out}
    sources: dict[str, Source] = {}
    for path in paths:
        if not os.path.isdir(path):
            sources.setdefault(str(path), Source(str(path), path.name, True))
            continue
        if any(_real(path).is_relative_to(folder) for folder in hidden):
            raise VitrineError(f"{path}: expected a folder of images, found one that pictures are written to")
        for file in _files(path, hidden, frozenset()):
            sources.setdefault(str(file), Source(str(file), str(file.relative_to(path)), False))
    if not sources:
        raise VitrineError(f"{', '.join(map(str, paths)) or 'PATH'}: expected image files, found no file")
    return list(sources.values())


def _files(folder: Path, hidden: Collection[Path], above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    names = {path.name for path in hidden}
    try:
        state = folder.stat()
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise VitrineError(f"{folder}: expected a folder that can be read, found: {error.strerror}") from error
    above |= {(state.st_dev, state.st_ino)}
    for name in entries:
        path = folder / name
        if name.startswith(".") or (name in names and _real(path) in hidden):
            continue
        if os.path.isdir(path):
            below = path.stat()
            if (below.st_dev, below.st_ino) not in above:
                yield from _files(path, hidden, above)
        elif os.path.isfile(path) or os.path.islink(path):  # a link that leads nowhere is an error of that image
            yield path


def _real(path: Path | str) -> Path:
    """The path without links; unlike `Path.resolve`, of links in a circle, too."""
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class Summary:
    """What became of the files."""

    answered: int
    errors: int
    skipped: int  # found in folders, but no images
    before: int  # of those with an answer or an error, in an earlier run


def predict_files(
    bundle: Bundle,
    query: Query,
    sources: Sequence[Source],
    *,
    out: Path | None = None,
    annotate: Path | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    each: Callable[[int, Record | None], None] = lambda done, record: None,
) -> Summary:
    """Ask a bundle about files, in their order.

    A broken image is an error of its own, and the others go on. A file found in a folder that neither is an image nor
    is called like one is skipped.

    Args:
        out: file of results, see `batch.results`; it goes on where an earlier run of the same question ended.
        annotate: folder for a picture of each image, with the image's path below the folder it was found in: JPEG for
            what is called so, else PNG. Of two with the same name the later gets a number. It must be new or empty,
            unless an earlier run is gone on with.
        providers: where the bundle computes; results of others are not gone on with.
        threads: images in work at once (default: `available_cores()`).
        each: called after every image with the number of files that are done, those of an earlier run included, and
            the image's record, or None for a file that is skipped.

    Raises:
        ResultsError: `out` or `annotate` cannot be written or belongs to something else.
    """
    identity = {"name": bundle.manifest.name, "version": bundle.manifest.version, "variant": bundle.variant}
    made_by = {
        **identity,
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
            results = stack.enter_context(Results(out, made_by, bundle.manifest.labels, boxes=boxes))
        names: dict[str, str] = {}
        if annotate is not None:
            _check_folder(annotate, sources, begun=results is not None and results.begun)
            names = picture_names(sources, {} if results is None else results.pictures)
        answered = {} if results is None else results.answered
        missing = [source for source in sources if source.path not in answered]
        before = len(sources) - len(missing)
        if results is not None:
            results.begin()
            failed = results.failed & {source.path for source in sources}

        def work(source: Source) -> Record | None:
            picture = None if annotate is None else annotate / names[source.path]
            return _record(source, query, identity, picture, names.get(source.path))

        answers = stack.enter_context(closing(_in_order(work, missing, threads or available_cores())))
        for done, record in enumerate(answers, start=before + 1):
            if record is None:
                skipped += 1
            else:
                if "error" in record:
                    failed.add(record["path"])
                if results is not None:
                    results.add(record)
            each(done, record)
        if results is not None:
            results.finish([source.path for source in sources])
    return Summary(len(sources) - skipped - len(failed), len(failed), skipped, before)


def _graph_sha256(bundle: Bundle) -> str:
    if isinstance(bundle.manifest, Manifest) and bundle.variant is not None:
        return bundle.manifest.files[bundle.variant.file].sha256
    return hash_file(bundle.path)


def _record(source: Source, query: Query, model: Record, picture: Path | None, name: str | None) -> Record | None:
    """What is known of one file; None if it is skipped. The picture is there before its record is."""
    expected = source.named or _format(source.path) is not None
    try:
        data = _read(source.path)
        if not data and not expected:
            return None
        image = decode_for(data, query.preprocessing)
        whole = None if picture is None else image.image if image.is_whole else decode(data)
    except UnsupportedImageError as error:
        return _failure(source, error) if expected else None
    except ImageError as error:
        return _failure(source, error)
    fields, drawn = query.answer(image, whole)
    if drawn is not None and picture is not None:
        _save(drawn, picture)
        fields["annotated"] = name
    return {"path": source.path, "model": model, "image": {"width": image.width, "height": image.height}, **fields}


def _failure(source: Source, error: ImageError) -> Record:
    return {"path": source.path, "error": {"code": error.code, "message": str(error)}}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableFileError(error) from error
    if len(data) > MAX_BYTES:
        raise ImageTooLargeError(limit=MAX_BYTES, unit="bytes", found="more")
    return data


def _in_order(
    work: Callable[[Source], Record | None], sources: Iterable[Source], threads: int
) -> Generator[Record | None, None, None]:
    pool = ThreadPoolExecutor(threads, "image")
    waiting: deque[Future[Record | None]] = deque()
    try:
        for source in sources:
            if len(waiting) == threads * _WAITING:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, source))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who interrupts need not wait for a slow disk to be told so


def picture_names(sources: Sequence[Source], given: Record) -> dict[str, str]:
    """The path of each file's picture below their folder, no two alike, not even where upper case is lower case.

    Args:
        given: the names that pictures have already, by the path of their image.
    """
    taken = {name.casefold() for name in given.values()}
    numbers: dict[str, int] = {}  # the last one given to a name
    names = dict(given)
    for source in sources:
        if source.path in names:
            continue
        path = PurePath(source.relative)
        form = _format(path.name)
        if form != "JPEG":
            path = path.with_suffix(".png") if form else path.with_name(f"{path.name}.png")
        name, wanted = path, str(path).casefold()
        while str(name).casefold() in taken:
            numbers[wanted] = numbers.get(wanted, 1) + 1
            name = path.with_stem(f"{path.stem}-{numbers[wanted]}")
        taken.add(str(name).casefold())
        names[source.path] = str(name)
    return names


@lru_cache(maxsize=1)
def _suffixes() -> dict[str, str]:
    return {end: form for end, form in Image.registered_extensions().items() if form in (*SUPPORTED_FORMATS, "MPO")}


def _format(name: str) -> str | None:
    """The type that a file is called, in Pillow's words; None if that is none of those supported."""
    return _suffixes().get(PurePath(name).suffix.lower())


def _check_folder(folder: Path, sources: Sequence[Source], *, begun: bool) -> None:
    """Nothing that is not ours may be overwritten, the images themselves least of all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not begun and any(folder.iterdir()):
            raise ResultsError(folder, "expected a new or an empty folder for the pictures, found files in it")
    except OSError as error:
        raise ResultsError(folder, f"expected a folder for the pictures, found: {error.strerror}") from error
    place = _real(folder)
    for source in sources:
        if source.named and _real(source.path).is_relative_to(place):
            raise ResultsError(source.path, "expected an image elsewhere, found it in the folder of the pictures")


def _save(picture: Image.Image, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if _format(file.name) == "JPEG":
            picture.thumbnail((_JPEG_EDGE, _JPEG_EDGE))
            picture.save(file, "JPEG", quality=_JPEG_QUALITY)
        else:
            picture.save(file, "PNG")
    except OSError as error:
        raise ResultsError(file, f"the picture cannot be written: {error.strerror or error}") from error


def text(record: Record) -> str:
    """A record for people: a line for a classification or an error; for detections one more an object, in pixels."""
    if "error" in record:
        lines = [f"error: {record['error']['message']}"]
    elif "predictions" in record:
        lines = [", ".join(f"{one['label']} {one['probability']:.1%}" for one in record["predictions"])]
    else:
        lines = [_count(len(record["detections"]), "object")]
        for one in record["detections"]:
            corners = ", ".join(f"{name} {edge:.1f}" for name, edge in one["box"].items())
            lines.append(f"  {one['label']} {one['score']:.1%}  {corners}")
    shown = "\n".join((f"{record['path']}: {lines[0]}", *lines[1:]))
    return shown.encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8


def summary_text(summary: Summary) -> str:
    """A summary for people."""
    counts = [_count(summary.answered, "image"), _count(summary.errors, "error")]
    if summary.skipped:
        counts.append(f"{_count(summary.skipped, 'other file')} skipped")
    if summary.before:
        counts.append(f"{summary.before} done before")
    return ", ".join(counts)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
