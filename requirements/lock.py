"""Pin the dependencies of pyproject.toml: install each layer into a fresh environment and write down what came.

What is pinned already stays at its version; with --upgrade everything is chosen anew.

serve.txt   what serving needs
train.txt   serve.txt and the extra `train`
dev.txt     train.txt and the extra `dev`
parity.txt  dev.txt and the extra `parity`
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Write the four files."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    layers = {
        "serve": project["dependencies"],
        "train": extras["train"],
        "dev": extras["dev"],
        "parity": extras["parity"],
    }
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        kept = [] if "--upgrade" in sys.argv else [HERE / f"{layer}.txt" for layer in layers]
        lines_kept = [line for file in kept for line in file.read_text().splitlines() if "==" in line]
        constraints.write_text("\n".join(lines_kept))
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
        pinned: set[str] = set()
        below = ""
        for layer, requirements in layers.items():
            install = [python, "-m", "pip", "install", "--quiet", "-c", constraints]
            subprocess.run([*install, *requirements], check=True)
            freeze = [python, "-m", "pip", "freeze", "--all", "--exclude", "pip"]
            frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
            lines = {re.sub(r"\+cpu$", "", line) for line in frozen.splitlines()}
            new = sorted(lines - pinned)
            header = f"# Made by `make lock` from pyproject.toml, for CPython 3.11 on Linux x86-64.\n{below}"
            (HERE / f"{layer}.txt").write_text(header + "".join(f"{line}\n" for line in new))
            pinned |= lines
            below = f"-r {layer}.txt\n"


if __name__ == "__main__":
    main()
