"""`vitrine import` end to end: recognition, strictness, heads, output files, memory, the command line."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrine import cli
from vitrine.export.errors import ExportError
from vitrine.export.export import export_run
from vitrine.models.build import build_model
from vitrine.models.published import detr
from vitrine.models.published.errors import (
    ImportSettingError,
    MismatchError,
    WeightsError,
)
from vitrine.models.published.importing import ImportResult, import_weights
from vitrine.models.published.labels import read_labels
from vitrine.models.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
LABELS = "blue\ngreen\nred\n"
RESNET = {"num_heads": 2, "embed_dim": 16, "backbone_layers": [1, 1, 1, 1], "backbone_width": 8}


def timm_vit(classes: int = 3, **settings: Any) -> dict[str, Tensor]:
    names = build_model("vit", {**TINY, **settings}, classes).state_dict()
    names["pos_embed"] = names.pop("pos_embed.embedding")
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(weight.shape, generator=random) for name, weight in names.items()}


def resnet() -> dict[str, Tensor]:
    """A tiny ResNet classifier under torchvision's names."""
    torch.manual_seed(0)
    state = build_model("detr", {**RESNET, "backbone_norm": "frozen"}, 3).state_dict()
    published = {
        source: weight
        for rule in detr.RESNET.rules
        for target, weight in state.items()
        for source in rule.source_names(target) or ()
    }
    return {**published, "fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny timm ViT, with a file of its three labels."""
    save_file(timm_vit(), tmp_path / "vit.safetensors")
    (tmp_path / "labels.txt").write_text(LABELS)
    return tmp_path / "vit.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "some" / "runs" / "vit"


def make(file: Path, out: Path, *changes: str, labels: str | None = "labels.txt", **options: Any) -> ImportResult:
    chosen = str(file.parent / labels) if labels == "labels.txt" else labels
    return import_weights(file, out, labels=chosen, changes=["num_heads=2", *changes], **options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; return its exit status and output."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vitrine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out + printed.err

    return run


# What is no network --------------------------------------------------------------------------------------------------


def test_a_file_without_tensors(tmp_path: Path, out: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError) as error:
        import_weights(tmp_path / "m.safetensors", out)
    assert "begin with ;" not in str(error.value)


def test_names_of_tensors_cannot_write_on_the_terminal(
    tmp_path: Path, out: Path, command: Callable[..., tuple[int, str]]
) -> None:
    torch.save({"a\n\x1b[2Jimported: all is well\n": torch.zeros(1)}, tmp_path / "m.pth")
    status, output = command("import", tmp_path / "m.pth", "--out", out)
    assert status == 1
    assert output.count("\n") == 1
    assert "\x1b" not in output


def test_file_name_is_ignored(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    torch.save(timm_vit(), tmp_path / "detr_resnet50_swin_deit_distilled.npz")
    imported = make(tmp_path / "detr_resnet50_swin_deit_distilled.npz", out)
    assert imported.checkpoint.architecture == "vit"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file({f"{prefix}{key}": weight for key, weight in timm_vit().items()}, tmp_path / "m.safetensors")
    weights = make(tmp_path / "m.safetensors", out).checkpoint.weights
    assert torch.equal(weights["head.weight"], timm_vit()["head.weight"])


def test_a_resnet_classifier_asks_for_the_labels_of_the_detector(tmp_path: Path, out: Path) -> None:
    torch.save(resnet(), tmp_path / "resnet.pth")
    with pytest.raises(ImportSettingError, match="a new head needs --labels"):
        import_weights(tmp_path / "resnet.pth", out)
    assert not out.parent.parent.exists()


def test_variant_has_all_settings_of_a_new_detector(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    torch.save(resnet(), tmp_path / "resnet.pth")
    labels = str(tmp_path / "labels.txt")
    changes = ["backbone_layers=[1,1,1,1]", "backbone_width=8"]
    import_weights(tmp_path / "resnet.pth", out, labels=labels, variant="detr_small", changes=changes)


def test_a_resnet_classifier_becomes_the_backbone_of_an_untrained_detector(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    torch.save(resnet(), tmp_path / "resnet.pth")
    changes = ("embed_dim=16", "encoder_layers=1", "decoder_layers=1", "feedforward_dim=16", "num_queries=4")
    made = make(tmp_path / "resnet.pth", out, *changes).checkpoint
    assert made.labels == ["blue", "green", "red"]
    assert torch.equal(made.weights["backbone.conv1.weight"], resnet()["conv1.weight"])
    assert made.origin is not None
    assert {"class_embed", "bbox_embed", "encoder", "decoder"} <= set(made.origin.untrained)
    assert "backbone" not in made.origin.untrained


# Strictness -----------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    state = timm_vit()
    del state["blocks.1.norm2.bias"]
    state |= {"decoder.weight": torch.zeros(2), "head.weight": torch.zeros(3, 9)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(MismatchError) as error:
        make(tmp_path / "m.safetensors", out)
    message = str(error.value)
    assert "missing in the file: blocks.1.norm2.bias" in message
    assert "unexpected in the file: decoder.weight" in message
    assert "head.weight: expected shape (3, 8), found (3, 9)" in message
    assert not out.parent.parent.exists()


@pytest.mark.parametrize("key", sorted(timm_vit()))
def test_every_tensor_is_needed(key: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file({name: weight for name, weight in timm_vit().items() if name != key}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError):
        make(tmp_path / "m.safetensors", out)
    assert not out.parent.parent.exists()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 7, 7, 7, 7)], ids=str)
@pytest.mark.parametrize("key", sorted(key for key in timm_vit() if "blocks.1" not in key))
def test_no_tensor_of_another_shape_gets_in(key: str, shape: tuple[int, ...], tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file({**timm_vit(), key: torch.zeros(shape)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError):
        make(tmp_path / "m.safetensors", out)
    assert not out.parent.parent.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["head.bias", "blocks.1.attn.qkv.weight", "pos_embed"])
def test_weights_that_are_no_numbers_are_refused(key: str, value: float, tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    state = timm_vit()
    state[key].view(-1)[3 if key != "head.bias" else 1] = value
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=f"{re.escape(key)}: expected finite numbers"):
        make(tmp_path / "m.safetensors", out)
    assert not out.parent.parent.exists()


def test_numbers_beyond_float32_are_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file({**timm_vit(), "head.bias": torch.tensor([0, 1e300, 0], dtype=torch.float64)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"head\.bias: expected finite numbers"):
        make(tmp_path / "m.safetensors", out)


@pytest.mark.parametrize("bare_first", [True, False])
def test_a_tensor_that_is_there_with_and_without_the_prefix_is_refused(
    bare_first: bool, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    wrapped = {f"module.{key}": weight for key, weight in timm_vit().items()}
    bare = {"norm.weight": torch.zeros(8)}
    torch.save({**bare, **wrapped} if bare_first else {**wrapped, **bare}, tmp_path / "m.pth")
    with pytest.raises(MismatchError, match=r"unexpected in the file: (module\.)?norm\.weight"):
        make(tmp_path / "m.pth", out)


@pytest.mark.parametrize("key", ["optimizer", "ema", "head2.weight", "blocks.0.norm3.weight", "head.weight.1"])
def test_nothing_is_left_over(key: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file({**timm_vit(), key: torch.zeros(8)}, tmp_path / "m.safetensors")
    with pytest.raises(MismatchError, match=re.escape(key)):
        make(tmp_path / "m.safetensors", out)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("vit_bse_patch16", "did you mean 'vit_base_patch16'"),
        ("mixer_b16", "Known: vit_tiny_patch16"),
        ("detr_resnet50", "Known: vit_tiny_patch16"),
        ("", "Known: vit_tiny_patch16"),
    ],
)
def test_an_unknown_variant_names_those_of_the_architecture(variant: str, said: str, file: Path, out: Path) -> None:
    with pytest.raises(ImportSettingError, match=said) as error:
        make(file, out, variant=variant)
    assert "--variant: unknown" in str(error.value)
    assert "Known: " in str(error.value)
    assert "detr" not in str(error.value).partition("Known: ")[2]
    assert not out.parent.parent.exists()


def test_a_variant_of_another_size_does_not_fit(file: Path, out: Path) -> None:
    with pytest.raises(MismatchError, match="expected shape"):
        make(file, out, variant="vit_tiny_patch16")


def test_number_of_heads_is_required_if_it_cannot_be_inferred(file: Path, out: Path) -> None:
    with pytest.raises(ImportSettingError, match="num_heads: cannot be inferred from the file; pass num_heads=VALUE"):
        import_weights(file, out, labels=str(file.parent / "labels.txt"))


# The head -------------------------------------------------------------------------------------------------------------


def test_a_new_head_is_made_for_other_labels(file: Path, out: Path) -> None:
    (file.parent / "five.txt").write_text("a\nb\nc\nd\ne\n")
    torch.manual_seed(1)
    make(file, out, labels=str(file.parent / "five.txt"), reset_head=True)
    loaded = load_checkpoint(out)
    assert loaded.labels == list("abcde")
    assert loaded.origin is not None
    assert loaded.origin.untrained == ["head"]
    assert "--reset-head" in loaded.origin.arguments
    expected = timm_vit()
    expected["pos_embed.embedding"] = expected.pop("pos_embed")
    assert loaded.weights.keys() == expected.keys()
    assert loaded.weights["head.weight"].shape == (5, 8)
    assert loaded.weights["head.weight"].std() > 0
    assert all(torch.equal(loaded.weights[key], weight) for key, weight in expected.items() if "head" not in key)
    assert loaded.build()(torch.zeros(1, 3, 16, 16)).shape == (1, 5)


def test_a_new_head_of_the_old_size_is_new_all_the_same(file: Path, out: Path) -> None:
    made = make(file, out, reset_head=True).checkpoint
    assert made.origin is not None
    assert made.origin.untrained == ["head"]
    assert not torch.equal(made.weights["head.weight"], timm_vit()["head.weight"])


def test_a_file_without_a_head_gets_one(tmp_path: Path, out: Path) -> None:
    (tmp_path / "labels.txt").write_text(LABELS)
    state = {key: weight for key, weight in timm_vit().items() if not key.startswith("head")}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ImportSettingError, match="it has no head: --reset-head with --labels makes a new one"):
        make(tmp_path / "m.safetensors", out)
    made = make(tmp_path / "m.safetensors", out, reset_head=True).checkpoint
    assert made.weights["head.weight"].shape == (3, 8)


def test_a_new_head_needs_labels(file: Path, out: Path) -> None:
    with pytest.raises(ImportSettingError, match="a new head needs --labels"):
        make(file, out, labels=None, reset_head=True)
    assert not out.parent.parent.exists()


def test_an_untrained_head_is_not_exported(file: Path, out: Path, tmp_path: Path) -> None:
    make(file, out, reset_head=True)
    with pytest.raises(ExportError, match="expected a trained network, found random numbers in head"):
        export_run(out, tmp_path / "bundles" / "x" / "1")
    assert not (tmp_path / "bundles").exists()


def test_labels_of_another_count_leave_nothing(file: Path, out: Path) -> None:
    with pytest.raises(ImportSettingError, match="--reset-head makes a new head"):
        make(file, out, labels="coco")
    assert not out.parent.parent.exists()


def test_the_origin_of_the_weights_is_written_down(file: Path, out: Path) -> None:
    make(file, out, "preprocessing.crop_pct=0.8")
    origin = load_checkpoint(out).origin
    assert origin is not None
    assert (origin.file, origin.layout, origin.untrained) == ("vit.safetensors", "timm's ViT", [])
    assert re.fullmatch(r"[0-9a-f]{64}", origin.sha256)
    assert origin.arguments[:2] == ["num_heads=2", "preprocessing.crop_pct=0.8"]


# What is written ------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused_and_left_unchanged(file: Path, out: Path) -> None:
    make(file, out)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(ImportSettingError, match="a run is already there; choose another --out"):
        make(file, out, reset_head=True)
    assert (out / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]


def test_other_files_in_the_run_folder_are_left_alone(file: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError):
        make(file, out, labels="coco")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    make(file, out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["a_file/run", "a_file/deep/run", "a_file", "new/" + "x" * 300, "/proc/vitrine/run"])
def test_a_run_that_cannot_be_written_is_a_sentence(
    place: str, file: Path, command: Callable[..., tuple[int, str]]
) -> None:
    (file.parent / "a_file").write_text("mine")
    before = sorted(file.parent.rglob("*"))
    labels = file.parent / "labels.txt"
    status, output = command("import", file, "num_heads=2", "--labels", labels, "--out", file.parent / place)
    assert status == 1
    assert output.startswith("vitrine: ")
    assert output.count("\n") == 1
    assert sorted(file.parent.rglob("*")) == before


def test_a_full_disk_leaves_nothing(file: Path, out: Path, root: Path) -> None:
    limit = 2_000  # bytes that the process may write to a file

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [sys.executable, "-m", "vitrine", "import", str(file), "num_heads=2"]
    line += ["--labels", str(file.parent / "labels.txt"), "--out", str(out)]
    result = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False, preexec_fn=little_room)
    assert not out.parent.parent.exists()
    assert result.returncode == 1
    assert result.stderr.startswith("vitrine: ")
    assert "Traceback" not in result.stderr


# Command line ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.file), os.O_CREAT)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_is_one_line_and_no_run(
    archive: bool, tmp_path: Path, out: Path, run_vitrine: Callable[..., str]
) -> None:
    trace = tmp_path / "executed"
    content = {"model": timm_vit(), "args": Malicious(trace)}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    output = run_vitrine("import", tmp_path / "m.pth", "--out", out, status=1)
    assert output == (
        f"vitrine: {tmp_path / 'm.pth'}: cannot be read: it names posix.open, code that loading it would run; "
        "only tensors and plain values are read\n"
    )
    assert not trace.exists()
    assert not out.parent.parent.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("{file}",),
        ("{file}", "--labels", "{folder}/labels.txt"),
        ("{file}", "num_heads=2", "--labels", "coco"),
        ("{file}", "num_heads=2", "--labels", "nowhere"),
        ("{file}", "num_heads=2", "--reset-head"),
        ("{file}", "num_heads=2", "--variant", "detr_resnet50"),
        ("{file}", "nun_heads=2"),
        ("{folder}",),
        ("{folder}/nowhere",),
        ("{folder}/labels.txt",),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_errors_are_one_line_and_no_run(
    arguments: tuple[str, ...], file: Path, out: Path, command: Callable[..., tuple[int, str]]
) -> None:
    said = [argument.format(file=file, folder=file.parent) for argument in arguments]
    status, output = command("import", *said, "--out", out)
    assert status == 1
    assert output.startswith("vitrine: ")
    assert output.count("\n") == 1
    assert not out.parent.parent.exists()


def test_from_published_weights_to_a_bundle(
    file: Path,
    out: Path,
    tmp_path: Path,
    colours: Path,
    run_vitrine: Callable[..., str],
    command: Callable[..., tuple[int, str]],
) -> None:
    labels = file.parent / "labels.txt"
    output = run_vitrine("import", file, "num_heads=2", "--out", out, "--labels", labels)
    assert "preprocessing is the published default of timm's ViT, because the file has none" in output
    parameters = sum(weight.numel() for weight in timm_vit().values())
    assert f"imported: {out}  timm's ViT, {parameters / 1e6:.2f} M parameters, 3 labels" in output
    assert "to be trained" not in output

    bundle = tmp_path / "bundles" / "x" / "1"
    summary = "x 1  image-classification, 3 labels, accuracy not measured"
    status, output = command("export", out, "--out", bundle)
    assert (status, output) == (0, f"exported: {bundle}  {summary}\n")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["metrics"] is None
    assert manifest["parity"]["data"] == "generated"
    assert manifest["labels"] == ["blue", "green", "red"]
    assert manifest["provenance"]["training"] is None
    assert manifest["provenance"]["imported"]["file"] == "vit.safetensors"
    assert manifest["provenance"]["imported"]["arguments"] == ["num_heads=2", "--labels", str(labels)]

    assert command("verify", bundle) == (0, f"verified: {summary} (fp32, explain)\n")
    assert command("bundles", tmp_path / "bundles") == (0, f"{summary}  {bundle}\n")
    status, of_run = command("evaluate", out, "--data", colours)
    assert status == 0
    assert re.search(r"^top1\t0\.\d{4}$", of_run, flags=re.MULTILINE)
    status, of_bundle = command("evaluate", bundle, "--data", colours)
    assert status == 0
    figure = re.compile(r"\d\.\d{4}")  # the last digit may be rounded differently
    assert figure.sub("", of_bundle) == figure.sub("", of_run)
    figures = [list(map(float, figure.findall(text))) for text in (of_bundle, of_run)]
    assert figures[0] == pytest.approx(figures[1], abs=1.01e-4)


def test_an_imported_network_measured_at_its_export(
    file: Path, out: Path, tmp_path: Path, colours: Path, command: Callable[..., tuple[int, str]]
) -> None:
    make(file, out)
    bundle = tmp_path / "bundles" / "x" / "1"
    status, _ = command("export", out, "--out", bundle, "--data", colours)
    assert status == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["metrics"]["data"] == manifest["parity"]["data"] == "colours"


def test_new_head_is_reported_to_need_training(file: Path, out: Path, command: Callable[..., tuple[int, str]]) -> None:
    status, output = command("import", file, "num_heads=2", "--labels", "coco", "--reset-head", "--out", out)
    assert status == 0
    assert "80 labels" in output
    assert "to be trained: head" in output
    status, output = command("export", out, "--out", out.parent / "x" / "1")
    assert status == 1
    assert output == f"vitrine: {out}: weights: expected a trained network, found random numbers in head\n"


def test_assumed_labels_are_reported(tmp_path: Path, out: Path, command: Callable[..., tuple[int, str]]) -> None:
    save_file(timm_vit(1000), tmp_path / "m.safetensors")
    status, output = command("import", tmp_path / "m.safetensors", "num_heads=2", "--out", out)
    assert status == 0
    assert "labels are those of ImageNet-1k, because the head has 1,000 classes" in output
    assert load_checkpoint(out).labels == read_labels("imagenet-1k")


def test_assumed_number_of_heads_is_reported(tmp_path: Path, out: Path) -> None:
    """A width of 192 allows any number of heads; three is only that of the published networks."""
    (tmp_path / "labels.txt").write_text(LABELS)
    save_file(timm_vit(embed_dim=192, num_heads=3), tmp_path / "m.safetensors")
    imported = import_weights(tmp_path / "m.safetensors", out, labels=str(tmp_path / "labels.txt"))
    assert imported.checkpoint.settings["num_heads"] == 3
    assert any("num_heads" in note for note in imported.notes)


# Memory ---------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(status)
"""


def google_base() -> dict[str, np.ndarray[Any, Any]]:
    """ViT-B/16 under Google's names."""
    dim, hidden, heads = 768, 3072, (12, 64)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, dim),
        "embedding/kernel": (16, 16, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, 197, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, 1000),
        "head/bias": (1000,),
    }
    for i in range(12):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        shapes |= {f"{block}/LayerNorm_{n}/{part}": (dim,) for n in (0, 2) for part in ("scale", "bias")}
        shapes |= {f"{attention}/{part}/kernel": (dim, *heads) for part in ("query", "key", "value")}
        shapes |= {f"{attention}/{part}/bias": heads for part in ("query", "key", "value")}
        shapes |= {f"{attention}/out/kernel": (*heads, dim), f"{attention}/out/bias": (dim,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (dim, hidden), f"{block}/MlpBlock_3/Dense_0/bias": (hidden,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (hidden, dim), f"{block}/MlpBlock_3/Dense_1/bias": (dim,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def timm_base() -> dict[str, Tensor]:
    """ViT-B/16 under timm's names."""
    with torch.device("meta"):
        network = build_model("vit", {"embed_dim": 768, "num_heads": 12}, 1000)
    state = {name: torch.zeros(weight.shape) for name, weight in network.state_dict().items()}
    state["pos_embed"] = state.pop("pos_embed.embedding")
    return state


@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch-before-1.6", "npz"])
def test_a_large_file_takes_less_than_three_times_its_size(kind: str, tmp_path: Path, root: Path) -> None:
    file, run = tmp_path / "weights", tmp_path / "run"
    if kind == "safetensors":
        save_file(timm_base(), file)
    elif kind == "npz":
        with file.open("wb") as stream:
            np.savez(stream, **google_base())  # type: ignore[arg-type]
    else:
        torch.save(timm_base(), file, _use_new_zipfile_serialization=kind == "torch")
    size = file.stat().st_size
    line = [sys.executable, "-c", PEAK, sys.executable, "-m", "vitrine", "import", str(file), "--out", str(run)]
    result = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    written = (run / "checkpoint.pt").exists()
    file.unlink()
    (run / "checkpoint.pt").unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    assert written
    peak = int(result.stdout)
    assert size > 340e6
    assert peak < 3 * size, f"{peak / 1e6:.0f} MB of memory for {size / 1e6:.0f} MB of weights"
