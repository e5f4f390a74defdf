"""Vision transformers from training to an HTTP answer."""

from pathlib import Path

__version__ = "0.1.0"

# The packages are symbolic links here. Where links are not preserved, as in a bento, they lie in the parent folder.
_folder = Path(__file__).parent
if not (_folder / "bundle").is_dir():
    __path__.append(str(_folder.parent))
