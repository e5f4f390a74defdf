"""Pin the dependencies for every supported Python, and check that each pin has a wheel (CPython, Linux, x86-64).

    python requirements/lock.py [--upgrade]

Pins stay at their versions where they can; with --upgrade everything is resolved anew. One universal resolution (uv)
serves every supported Python: where CPython on Linux or macOS differs, a line carries a marker, which pip understands.

serve.txt   what serving needs
train.txt   serve.txt and the extra `train`
dev.txt     train.txt and the extra `dev`
parity.txt  dev.txt and the extra `parity`

serve.hashes.txt  serve.txt with the SHA-256 hashes of every file of each release, for `pip install --require-hashes`
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import Marker

HERE = Path(__file__).parent
LAYERS = ("serve", "train", "dev", "parity")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
UNIVERSAL = ("--universal", "--python-version", PYTHONS[0])
PLATFORM = "x86_64-manylinux_2_28"
ENVIRONMENTS = [
    {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "sys_platform": system,
    }
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in PYTHONS
]


def main() -> None:
    """Write the files, then check the wheels."""
    upgrade = ["--upgrade"] if "--upgrade" in sys.argv else []
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder) / "everything.txt"
        pins = [line for layer in LAYERS for line in _pins(HERE / f"{layer}.txt")]
        everything.write_text("\n".join(pins))  # uv keeps what the output file already pins
        _compile(everything, LAYERS[1:], *upgrade)
        below: set[str] = set()
        for number, layer in enumerate(LAYERS):
            file = Path(folder) / f"{layer}.txt"
            _compile(file, LAYERS[1 : number + 1], "--constraints", str(everything))
            lines = [line for line in map(_relevant, _pins(file)) if line]
            header = "# Made by `make lock` from pyproject.toml, for Python 3.11 and newer.\n"
            above = f"-r {LAYERS[number - 1]}.txt\n" if number else ""
            (HERE / f"{layer}.txt").write_text(
                header + above + "".join(f"{line}\n" for line in lines if line not in below)
            )
            below |= set(lines)
        hashed = Path(folder) / "serve.hashes.txt"
        _uv(str(HERE / "serve.txt"), *UNIVERSAL, "--no-deps", "--generate-hashes", "--output-file", str(hashed))
        header = "# Made by `make lock`: serve.txt with the hash of every file, for `pip install --require-hashes`.\n"
        (HERE / hashed.name).write_text(header + hashed.read_text())
        for python in PYTHONS:
            wheels = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--python-platform", PLATFORM]
            _uv(str(everything), *wheels, "--output-file", str(Path(folder) / "wheels.txt"))
            print(f"CPython {python}, {PLATFORM}: every pin has a wheel")


def _compile(output: Path, extras: tuple[str, ...], *options: str) -> None:
    chosen = [option for extra in extras for option in ("--extra", extra)]
    _uv(
        str(HERE.parent / "pyproject.toml"),
        *(*UNIVERSAL, "--output-file", str(output)),
        *chosen,
        *options,
    )


def _uv(*arguments: str) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *arguments]
    subprocess.run(command, check=True)


def _relevant(pin: str) -> str:
    """Return the pin without a marker that always holds, or "" if its marker never does."""
    requirement, _, marker = pin.partition(" ; ")
    holds = {not marker or Marker(marker).evaluate(environment) for environment in ENVIRONMENTS}
    return "" if holds == {False} else requirement if holds == {True} else pin


def _pins(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if "==" in line]


if __name__ == "__main__":
    main()
