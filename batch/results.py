"""A file of results that survives whatever ends the process that writes it.

While images are answered, their records are lines of `<out>.partial`: first one that says what made them (which graph,
asked for what), then one an image, each handed to the system in one piece. The same command reads that file again, cuts
off a line that was only half written, and goes on with the images that it lacks; what was made otherwise is refused.
When no image is missing, all is written to `<out>.finishing`, synchronised, and renamed to `<out>`: a file of that name
is always complete, and one that is there already is never touched. Then `<out>.partial` is removed.

The endings of `<out>` and what they hold, images in the order in which they were named:

    .jsonl       one record a line, see `Record`
    .csv         one row for each class or object, with the path before and the error behind; an image without objects
                 has no row, a broken one has a row with nothing but its path and error
    .coco.json   COCO's document of annotations, of detections only: `category_id` is the class id, `file_name` the
                 path, `bbox` is x, y, width, height in pixels; broken images stand under "errors"
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

ENDINGS = (".jsonl", ".csv", ".coco.json")
FORMAT = "vitrine predict 1"  # of a partial file; the number changes with what its lines mean

CLASS_COLUMNS = ("label", "class_id", "probability")
OBJECT_COLUMNS = ("label", "class_id", "score", "x_min", "y_min", "x_max", "y_max")

Record = dict[str, Any]
"""What is known of one image; fields and values are those of the service's answers (`service/schemas.py`).

    {"path", "model": {"name", "version", "variant"}, "image": {"width", "height"}, "predictions" or "detections"}
    {"path", "error": {"code", "message"}}

Where pictures were drawn, an answer also has "annotated", the picture's path below their folder.
"""


class ResultsError(VitrineError):
    """The file of results, or the folder of pictures, cannot be written or belongs to something else."""

    code = "results"

    def __init__(self, file: object, problem: str) -> None:
        super().__init__(f"{file}: {problem}")


def check_ending(out: Path, *, boxes: bool) -> None:
    """Refuse a file whose format is unknown or cannot hold the answers (`boxes`: those of a detector).

    Raises:
        ResultsError: that.
    """
    ending = _ending(out)
    if not ending:
        raise ResultsError(out, f"expected a name that ends in {', '.join(ENDINGS)}, found {out.suffix or 'no ending'}")
    if ending == ".coco.json" and not boxes:
        raise ResultsError(
            out, "expected .jsonl or .csv for the answers of a classifier, found COCO's, which has boxes"
        )


def files_of(out: Path) -> tuple[Path, Path, Path]:
    """The file of results, the partial one before it, and that one while it is turned into it."""
    return out, out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.finishing")


class Results:
    """The records of one run, in `<out>.partial`; a context manager, which closes that file.

    `answered` are the paths of the images that have a record, each with the place of its line, in bytes.
    """

    def __init__(self, out: Path, made_by: Mapping[str, object], labels: Sequence[str], *, boxes: bool) -> None:
        """Open what is there, or an empty file; `begin` comes next.

        Args:
            made_by: what the records depend on, as JSON.
            labels: of the bundle, by class id.
            boxes: the answers are those of a detector.

        Raises:
            ResultsError: `out` is there already or has an unknown ending, or its partial file was made otherwise, is
                in use, or cannot be written.
        """
        check_ending(out, boxes=boxes)
        self.out, self.partial, self._finishing = files_of(out)
        self.answered: dict[str, int] = {}
        self.pictures: dict[str, str] = {}  # path of an image: path of its picture below their folder
        self.failed: set[str] = set()  # paths of the images that have an error
        self.begun = False
        self._made_by, self._labels, self._boxes = made_by, labels, boxes
        self._file = self._open()
        try:
            if out.exists() or out.is_symlink():
                problem = "is there already, and complete results are never overwritten; move it, or choose another"
                raise ResultsError(out, problem)
            self._read()
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
        """Close the partial file; it is removed if nothing was begun in it."""
        if not self._file.closed:
            with suppress(OSError):
                if os.fstat(self._file.fileno()).st_size == 0:
                    self.partial.unlink(missing_ok=True)
            self._file.close()

    def begin(self) -> None:
        """Write what makes the records, unless an earlier run has.

        Raises:
            ResultsError: that failed.
        """
        if not self.begun:
            self._append(self._header())
            self.begun = True

    def add(self, record: Record) -> None:
        """Keep a record: once this returns, no end of the process loses it.

        Raises:
            ResultsError: that failed; what was kept before is kept.
        """
        self._keep(record, self._append(_line(record)))

    def records(self, paths: Iterable[str]) -> Iterator[Record]:
        """The records of these images, in this order, of those that have one."""
        for line in self._lines(paths):
            yield json.loads(line)

    def finish(self, paths: Sequence[str]) -> None:
        """Turn the partial file into the file of results, with these images in this order.

        Raises:
            ResultsError: that failed; the partial file is kept.
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
                raise self._cannot_write(self.out, error) from error
            raise
        self.partial.unlink(missing_ok=True)

    def _write(self, stream: BinaryIO, paths: Sequence[str]) -> None:
        match _ending(self.out):
            case ".jsonl":
                stream.writelines(self._lines(paths))
            case ".csv":
                _write_csv(stream, self.records(paths), OBJECT_COLUMNS if self._boxes else CLASS_COLUMNS)
            case ".coco.json":
                _write_coco(stream, lambda: self.records(paths), self._made_by, self._labels)

    def _open(self) -> io.FileIO:
        """The partial file, for this process alone: two that append to one file would spoil it."""
        while True:
            try:
                file = io.FileIO(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            except OSError as error:
                raise self._cannot_write(self.partial, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                    return file
            except BlockingIOError as error:
                file.close()
                raise ResultsError(self.partial, "another process is writing it at this moment") from error
            except FileNotFoundError:  # the process that had it has removed it since it was opened here
                pass
            except OSError:  # a file system without locks
                return file
            file.close()

    def _read(self) -> None:
        """Take over what an earlier run has left, up to the last line that is whole."""
        header, end = self._header(), 0
        with self.partial.open("rb") as stream:
            first = stream.readline()
            if header.startswith(first):  # nothing, or a part of what this run would begin with
                end = len(first) if first == header else 0
            else:
                self._check_header(first)
                end = len(first)
            self.begun = end > 0
            for line in stream:
                record = _parsed(line)
                if record is None or "path" not in record:  # half written, or of zeros, as a power failure leaves them
                    break
                self._keep(record, end)
                end += len(line)
        try:
            self._file.truncate(end)
        except OSError as error:
            raise self._cannot_write(self.partial, error) from error
        self._file.seek(end)

    def _header(self) -> bytes:
        return _line({"format": FORMAT, **self._made_by})

    def _check_header(self, line: bytes) -> None:
        found = _parsed(line)
        if found is None or found.get("format") != FORMAT:
            raise ResultsError(
                self.partial, f"expected results that can be gone on with ({FORMAT}), found another file"
            )
        for name in dict.fromkeys((*found, *self._made_by)):
            before, now = (json.dumps(made.get(name)) for made in (found, {"format": FORMAT, **self._made_by}))
            if before != now:
                problem = f"{name}: expected {before}, as the results in it were made, found {now}"
                raise ResultsError(self.partial, f"{problem}; remove it to begin anew, or choose another --out")

    def _keep(self, record: Record, place: int) -> None:
        path = record["path"]
        self.answered[path] = place
        if "error" in record:
            self.failed.add(path)
        if "annotated" in record:
            self.pictures[path] = record["annotated"]

    def _append(self, line: bytes) -> int:
        place, rest = self._file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._cannot_write(self.partial, error) from error
        return place

    def _lines(self, paths: Iterable[str]) -> Iterator[bytes]:
        with self.partial.open("rb") as stream:
            place = 0
            for path in paths:
                wanted = self.answered.get(path)
                if wanted is None:
                    continue
                if wanted != place:  # seeking empties the buffer, and nearly always the next line is the next image
                    stream.seek(wanted)
                line = stream.readline()
                place = wanted + len(line)
                yield line

    def _cannot_write(self, file: Path, error: OSError) -> ResultsError:
        count = len(self.answered)
        answers = "1 answer is" if count == 1 else f"{count} answers are"
        kept = f"; {answers} kept, and the same command goes on" if count else ""
        return ResultsError(file, f"cannot be written: {error.strerror or error}{kept}")


def _ending(out: Path) -> str:
    return next((ending for ending in ENDINGS if out.name.lower().endswith(ending)), "")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encoded(text: str) -> bytes:
    """JSON in UTF-8. Bytes of a file name that are none, surrogates in Python, become JSON's escapes of those."""
    return text.encode("utf-8", "backslashreplace")


def _line(record: Mapping[str, object]) -> bytes:
    return _encoded(_json(record) + "\n")


def _parsed(line: bytes) -> Record | None:
    """The object in a whole line; None if it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_csv(stream: BinaryIO, records: Iterable[Record], columns: Sequence[str]) -> None:
    # Names of files that are not UTF-8 keep the bytes that they have on disk.
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
    stream: BinaryIO, records: Callable[[], Iterator[Record]], made_by: Mapping[str, object], labels: Sequence[str]
) -> None:
    """COCO's document, one object a line; the records are read once for each of its lists, never held together."""

    def images() -> Iterator[object]:
        for number, record in enumerate(answers(), start=1):
            yield {"id": number, "file_name": record["path"], **record["image"]}

    def annotations() -> Iterator[object]:
        found = ((number, entry) for number, record in enumerate(answers(), 1) for entry in record["detections"])
        for i, (number, entry) in enumerate(found, start=1):  # COCOeval takes an annotation 0 for none
            x_min, y_min, x_max, y_max = entry["box"].values()
            width, height = x_max - x_min, y_max - y_min
            yield {
                "id": i,
                "image_id": number,
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
    stream.write(_encoded(f'{{"info": {_json(made_by)}'))
    for name, entries in parts.items():
        stream.write(_encoded(f',\n"{name}": ['))
        for i, entry in enumerate(entries):
            stream.write(_encoded(f"{',' if i else ''}\n{_json(entry)}"))
        stream.write(b"]")
    stream.write(b"}\n")
