"""Crash-safe results files.

While images are processed, records are appended to `<out>.partial`: a header line with the configuration (graph,
parameters), then one line per image, each passed to the system in one piece. The same command reads that file again,
drops an incomplete last line, and resumes with the remaining images; a file with another configuration is refused. Once
all images are done, the results are written to `<out>.finishing`, synced, and renamed to `<out>`: a file of that name
is always complete, and an existing one is never touched. Then `<out>.partial` is removed.

Formats by the suffix of `<out>`, images in input order:

    .jsonl       one record per line, see `Record`
    .csv         one row per class or object, with the path first and the error last; an image without objects has no
                 row, a broken one has a row with its path and error only
    .coco.json   COCO annotations, detections only: `category_id` is the class id, `file_name` the path, `bbox` is
                 x, y, width, height in pixels; broken images are listed under "errors"
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from vitrine.bundle.errors import VitrineError

SUFFIXES = (".jsonl", ".csv", ".coco.json")
FORMAT = "vitrine predict 1"  # of the partial file; the number is its version

CLASS_COLUMNS = ("label", "class_id", "probability")
OBJECT_COLUMNS = ("label", "class_id", "score", "x_min", "y_min", "x_max", "y_max")

Record = dict[str, Any]
"""The result for one image, in the fields of the service's answers (`service/http/schemas.py`).

    {"path", "model": {"name", "version", "variant"}, "image": {"width", "height"}, "predictions" or "detections"}
    {"path", "error": {"code", "message"}}

With annotated pictures, an answer also has "annotated", the picture's path below the picture folder.
"""


class ResultsError(VitrineError):
    """The results file or the picture folder cannot be written or belongs to something else."""

    code = "results"

    def __init__(self, file: object, problem: str) -> None:
        super().__init__(f"{file}: {problem}")


def check_suffix(out: Path, *, boxes: bool) -> None:
    """Check that the format of a results file can hold the answers; `boxes`: those of a detector.

    Raises:
        ResultsError: the suffix is unknown, or its format needs boxes.
    """
    suffix = _suffix(out)
    if not suffix:
        found = out.suffix or "no ending"
        raise ResultsError(out, f"expected a name that ends in {', '.join(SUFFIXES)}, found {found}")
    if suffix == ".coco.json" and not boxes:
        raise ResultsError(
            out, "expected .jsonl or .csv for the answers of a classifier, found COCO's, which has boxes"
        )


def result_files(out: Path) -> tuple[Path, Path, Path]:
    """Return the paths of the results file, its partial file and its temporary file while finishing."""
    return out, out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.finishing")


class Results:
    """The records of one run in `<out>.partial`; a context manager that closes the file.

    `answered` maps the path of each image that has a record to the byte offset of its line.
    """

    def __init__(self, out: Path, config: Mapping[str, object], labels: Sequence[str], *, boxes: bool) -> None:
        """Open an existing partial file or create one; call `begin` next.

        Args:
            config: what the records depend on, as JSON values.
            labels: labels of the bundle, by class id.
            boxes: whether the answers are those of a detector.

        Raises:
            ResultsError: `out` exists or has an unknown suffix, or its partial file has another configuration, is in
                use, or cannot be written.
        """
        check_suffix(out, boxes=boxes)
        self.out, self.partial, self._finishing = result_files(out)
        self.answered: dict[str, int] = {}
        self.pictures: dict[str, str] = {}  # image path to picture path below the picture folder
        self.failed: set[str] = set()  # paths of images with an error
        self.has_header = False  # from an earlier run, or after `begin`
        self._config, self._labels, self._boxes = config, labels, boxes
        self._file = self._open_locked()
        try:
            if out.exists() or out.is_symlink():
                problem = "is there already, and complete results are never overwritten; move it, or choose another"
                raise ResultsError(out, problem)
            self._resume()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the partial file and remove it if it is empty."""
        if not self._file.closed:
            with suppress(OSError):
                if os.fstat(self._file.fileno()).st_size == 0:
                    self.partial.unlink(missing_ok=True)
            self._file.close()

    def begin(self) -> None:
        """Write the header, unless an earlier run has.

        Raises:
            ResultsError: writing failed.
        """
        if not self.has_header:
            self._append_line(self._header())
            self.has_header = True

    def add(self, record: Record) -> None:
        """Append a record. Once this returns, the record survives the end of the process.

        Raises:
            ResultsError: writing failed; earlier records are kept.
        """
        self._index(record, self._append_line(_encode_record(record)))

    def records(self, paths: Iterable[str]) -> Iterator[Record]:
        """Yield the records of these images in this order, without those that have none."""
        for line in self._read_lines(paths):
            yield json.loads(line)

    def finish(self, paths: Sequence[str]) -> None:
        """Write the results file, with these images in this order, and remove the partial file.

        Raises:
            ResultsError: writing failed; the partial file is kept.
        """
        try:
            with self._finishing.open("wb") as stream:
                self._write(stream, paths)
                stream.flush()
                os.fsync(stream.fileno())
            self._finishing.replace(self.out)
        except BaseException as error:
            with suppress(OSError):
                self._finishing.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._write_error(self.out, error) from error
            raise
        self.partial.unlink(missing_ok=True)

    def _write(self, stream: BinaryIO, paths: Sequence[str]) -> None:
        match _suffix(self.out):
            case ".jsonl":
                stream.writelines(self._read_lines(paths))
            case ".csv":
                _write_csv(stream, self.records(paths), OBJECT_COLUMNS if self._boxes else CLASS_COLUMNS)
            case ".coco.json":
                _write_coco(stream, lambda: self.records(paths), self._config, self._labels)

    def _open_locked(self) -> io.FileIO:
        """Open the partial file with an exclusive lock: two processes appending to it would corrupt it."""
        while True:
            try:
                file = io.FileIO(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            except OSError as error:
                raise self._write_error(self.partial, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                    return file
            except BlockingIOError as error:
                file.close()
                raise ResultsError(self.partial, "another process is writing it at this moment") from error
            except FileNotFoundError:  # its previous owner removed it after it was opened here
                pass
            except OSError:  # a file system without locks
                return file
            file.close()

    def _resume(self) -> None:
        """Index the records of an earlier run, up to the last complete line, and truncate the rest."""
        header, end = self._header(), 0
        with self.partial.open("rb") as stream:
            first = stream.readline()
            if header.startswith(first):  # empty, or an incomplete header of this run
                end = len(first) if first == header else 0
            else:
                self._check_header(first)
                end = len(first)
            self.has_header = end > 0
            for line in stream:
                record = _parse_line(line)
                if record is None or "path" not in record:  # incomplete, or zeros after a power failure
                    break
                self._index(record, end)
                end += len(line)
        try:
            self._file.truncate(end)
        except OSError as error:
            raise self._write_error(self.partial, error) from error
        self._file.seek(end)

    def _header(self) -> bytes:
        return _encode_record({"format": FORMAT, **self._config})

    def _check_header(self, line: bytes) -> None:
        earlier = _parse_line(line)
        if earlier is None or earlier.get("format") != FORMAT:
            raise ResultsError(self.partial, f"expected results that can be resumed ({FORMAT}), found another file")
        for name in dict.fromkeys((*earlier, *self._config)):
            before, now = (json.dumps(config.get(name)) for config in (earlier, {"format": FORMAT, **self._config}))
            if before != now:
                problem = f"{name}: expected {before}, as in the results so far, found {now}"
                raise ResultsError(self.partial, f"{problem}; remove it to start over, or choose another --out")

    def _index(self, record: Record, offset: int) -> None:
        path = record["path"]
        self.answered[path] = offset
        if "error" in record:
            self.failed.add(path)
        if "annotated" in record:
            self.pictures[path] = record["annotated"]

    def _append_line(self, line: bytes) -> int:
        """Append a line; return its offset."""
        offset, rest = self._file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._write_error(self.partial, error) from error
        return offset

    def _read_lines(self, paths: Iterable[str]) -> Iterator[bytes]:
        with self.partial.open("rb") as stream:
            position = 0
            for path in paths:
                offset = self.answered.get(path)
                if offset is None:
                    continue
                if offset != position:  # seeking discards the buffer, and the next line is almost always the next image
                    stream.seek(offset)
                line = stream.readline()
                position = offset + len(line)
                yield line

    def _write_error(self, file: Path, error: OSError) -> ResultsError:
        count = len(self.answered)
        answers = "1 answer is" if count == 1 else f"{count} answers are"
        kept = f"; {answers} kept, and the same command resumes" if count else ""
        return ResultsError(file, f"cannot be written: {error.strerror or error}{kept}")


def _suffix(out: Path) -> str:
    return next((suffix for suffix in SUFFIXES if out.name.lower().endswith(suffix)), "")


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encode(text: str) -> bytes:
    """Encode JSON as UTF-8. Undecodable bytes of file names, surrogates in Python, become JSON escapes."""
    return text.encode("utf-8", "backslashreplace")


def _encode_record(record: Mapping[str, object]) -> bytes:
    return _encode(_to_json(record) + "\n")


def _parse_line(line: bytes) -> Record | None:
    """Return the object in a line; None if the line is incomplete."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_csv(stream: BinaryIO, records: Iterable[Record], columns: Sequence[str]) -> None:
    # File names that are not UTF-8 keep their bytes on disk.
    text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(("path", *columns, "error"))
    for record in records:
        path = record["path"]
        if "error" in record:
            writer.writerow((path, *("" for _ in columns), record["error"]["message"]))
        for entry in (*record.get("predictions", ()), *record.get("detections", ())):
            fields = {**entry, **entry.get("box", {})}
            writer.writerow((path, *(fields[column] for column in columns), ""))
    text.detach()


def _write_coco(
    stream: BinaryIO, records: Callable[[], Iterator[Record]], config: Mapping[str, object], labels: Sequence[str]
) -> None:
    """Write a COCO document, one object per line. Records are read once per list and never all held in memory."""

    def images() -> Iterator[object]:
        for number, record in enumerate(answers(), start=1):
            yield {"id": number, "file_name": record["path"], **record["image"]}

    def annotations() -> Iterator[object]:
        detections = ((image, entry) for image, record in enumerate(answers(), 1) for entry in record["detections"])
        for i, (image, entry) in enumerate(detections, start=1):  # COCOeval treats an annotation id of 0 as no match
            x_min, y_min, x_max, y_max = entry["box"].values()
            width, height = x_max - x_min, y_max - y_min
            yield {
                "id": i,
                "image_id": image,
                "category_id": entry["class_id"],
                "bbox": [x_min, y_min, width, height],
                "score": entry["score"],
                "area": width * height,
                "iscrowd": 0,
            }

    def answers() -> Iterator[Record]:
        return (record for record in records() if "error" not in record)

    parts: dict[str, Iterable[object]] = {
        "categories": ({"id": class_id, "name": label} for class_id, label in enumerate(labels)),
        "images": images(),
        "annotations": annotations(),
        "errors": (record for record in records() if "error" in record),
    }
    stream.write(_encode(f'{{"info": {_to_json(config)}'))
    for name, entries in parts.items():
        stream.write(_encode(f',\n"{name}": ['))
        for i, entry in enumerate(entries):
            stream.write(_encode(f"{',' if i else ''}\n{_to_json(entry)}"))
        stream.write(b"]")
    stream.write(b"}\n")
