"""Vision transformers from training to an HTTP answer."""

from pathlib import Path

__version__ = "0.1.0"

# Links to the packages stand in for them here. Where links do not survive, as in a bento, the packages lie beside.
_folder = Path(__file__).parent
if not (_folder / "bundle").is_dir():
    __path__.append(str(_folder.parent))
