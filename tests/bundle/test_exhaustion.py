"""A lack of memory, file descriptors or threads is reported as what it is, never as a fault of the bundle."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitrine.bundle.errors import BundleError, ResourceError
from vitrine.bundle.exhaustion import exhausted_resource, naming_exhaustion


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "resource"),
    [
        (MemoryError(), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.EMFILE, "Too many open files"), "file descriptors"),
        (OSError(errno.ENFILE, "Too many open files in system"), "file descriptors"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk space"),
        (RuntimeError("can't start new thread"), "threads"),
        (RuntimeError("env.cc:327 pthread_create failed, error code: 11"), "threads"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 7372800"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (caused(BundleError("a", "b", expected="c", found="d"), MemoryError()), "memory"),
        (caused(ValueError(), caused(BundleError("a", "b", expected="c", found="d"), MemoryError())), "memory"),
        (BundleError("a", "b", expected="c", found="bad_alloc"), ""),  # a quotation
        (OSError(errno.EACCES, "Permission denied"), ""),
        (ValueError("bad"), ""),
        (None, ""),
    ],
)
def test_the_exhausted_resource_is_found(error: Exception | None, resource: str) -> None:
    assert exhausted_resource(error) == resource


def test_other_errors_pass_through() -> None:
    for error in (BundleError("a", "b", expected="c", found="d"), KeyError("x"), ResourceError("a", "memory")):
        with pytest.raises(type(error)) as caught, naming_exhaustion("b"):
            raise error
        assert caught.value is error
    with (
        pytest.raises(ResourceError, match="b: expected to load it, found the process out of memory"),
        naming_exhaustion("b"),
    ):
        raise MemoryError


LIMITED = """
import collections, json, os, resource, sys, tempfile
from pathlib import Path
import vitrine.bundle.repository
from vitrine.bundle.loading import load_bundle
vitrine.bundle.repository._FIRST_PAUSE = 0.0
path, kind, steps, step = Path(sys.argv[1]), getattr(resource, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
repository = vitrine.bundle.repository.Repository(path.parent.parent, cache=Path(tempfile.mkdtemp()))
load_bundle(path)

def in_use():
    if kind == resource.RLIMIT_AS:
        return 4096 * int(open("/proc/self/statm").read().split()[0])
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    return free

def outcome(load, extra):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (in_use() + extra, before[1]))
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(kind, before)
    return "loaded"

def reload():
    os.utime(path / "manifest.json")
    repository.load(path.parent.name)

def refresh():
    os.utime(path / "manifest.json")
    for change in repository.refresh():
        if change.startswith("refused: "):
            raise RuntimeError(change)

loads = (lambda: load_bundle(path), reload, refresh)
outcomes = collections.Counter(outcome(load, extra) for extra in range(0, steps * step, step) for load in loads)
for load in loads:
    load()
outcome(refresh, 0)
repository.refresh()
assert [(entry.ready, entry.reason) for entry in repository.index()] == [(True, "")]
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize(
    ("limit", "steps", "step", "resources"),
    [("RLIMIT_NOFILE", 4, 1, {"file descriptors"}), ("RLIMIT_AS", 12, 1_200_000, {"memory", "threads"})],
)
def test_a_bundle_that_cannot_be_loaded_for_lack_of_something_is_not_blamed(
    limit: str, steps: int, step: int, resources: set[str], root: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(root / "bundles" / "vit-cifar10" / "1", tmp_path / "vit-cifar10" / "1"))
    command = [sys.executable, "-c", LIMITED, str(path), limit, str(steps), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # ONNX Runtime prints nothing
    found = set(json.loads(line)) - {"loaded"}
    assert found
    for outcome in found:
        assert re.match(rf"(ResourceError|RuntimeError: refused): {tmp_path}", outcome), outcome
        assert outcome.rpartition(" out of ")[2] in resources
    assert not done.stderr
