"""EXPORT.json: what an export wrote and how near it came, and the check of a folder later.

It lists SHA-256 sums of all other files, so a folder that was copied, uploaded or fetched can be
compared; and the folder's input/output pair is repeated with the packages of the place.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lemon_muse import __version__
from lemon_muse.data.files import write_atomic
from lemon_muse.encoder import load
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import READERS
from lemon_muse.export.program import facts_of
from lemon_muse.frozen import FrozenEncoder

SEAL, PAIR, CARD = "EXPORT.json", "check.safetensors", "README.md"
SECTION = "Export"
# Of the largest value of the output. On export both run here; later another CPU sums in another
# order, and another release of a package may use other kernels.
ON_EXPORT, LATER = 1e-4, 1e-3
PACKAGES = ("torch", "timm", "transformers", "onnxruntime")
Tensors = dict[str, torch.Tensor]


def seal(
    folder: Path,
    encoder: FrozenEncoder,
    *,
    form: str,
    apart: float,
    network: str | None = None,
) -> None:
    """Finish an exported folder: its pair, the card's section on the export, and EXPORT.json last.

    Args:
        encoder: the source.
        form: the format.
        apart: largest difference of the exported features to the source's.
        network: which encoder of a checkpoint it was.

    Raises:
        RunError: the difference is too large, or not a number.
    """
    pair = encoder.cpu().check_pair()
    if not (folder / PAIR).is_file():
        write_atomic(folder / PAIR, save(pair))
    scale = max(1.0, float(pair["output"].abs().max()))
    if not apart < ON_EXPORT * scale:
        raise RunError(
            f"the exported {form} encoder differs from its source by {apart:.2g}; nothing was "
            f"written."
        )
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {encoder.name}\n"
    sums = sums_of(folder, without={CARD})
    listed = "\n".join(f"{digest}  {name}" for name, digest in sums.items())
    said = (
        f"## {SECTION}\n\nFormat `{form}` of {encoder.content_hash}. Largest difference to the "
        f"source's features: {apart:.2g}.\n`{PAIR}` holds one input/output pair. `lemon-muse "
        f"export check=THIS_FOLDER` compares the sums and repeats the pair.\n\n"
        f"SHA-256:\n\n```text\n{listed}\n```\n"
    )
    write_atomic(card, f"{text.rstrip()}\n\n{said}".encode())
    manifest = {
        "format": form,
        "encoder": facts_of(encoder),
        "network": network,
        "largest_difference": apart,
        "version": __version__,
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "sha256": sums_of(folder, without=set()),
    }
    write_atomic(folder / SEAL, json.dumps(manifest, indent=1).encode())


def check(folder: Path) -> str:
    """Compare an exported folder with its EXPORT.json and repeat its pair; one line of what holds.

    Raises:
        UserError: not an exported folder, or a package of its format is missing.
        RunError: files that differ, that do not open, or that compute something else.
    """
    manifest = manifest_of(folder)
    form, wanted = manifest["format"], manifest["sha256"]
    found = sums_of(folder, without={SEAL})
    wrong = [
        f"{name} is missing" if name not in found else f"{name} has other bytes (SHA-256)"
        for name, digest in wanted.items()
        if found.get(name) != digest
    ]
    if wrong:
        raise RunError(
            f"{folder} is not what was exported: {'; '.join(wrong)}; fetch it or export it again."
        )
    more = sorted(found.keys() - wanted.keys())
    beside = f" (beside them: {', '.join(more[:5])})" if more else ""
    say = f"{folder}: {form}, {len(wanted)} files as exported{beside}"
    if form not in READERS:
        return f"{say}; the pair is not repeated, for this version does not read {form}"
    return f"{say}; largest difference to the stored output {_repeat(folder, manifest):.1g}"


def manifest_of(folder: Path) -> dict[str, Any]:
    """What EXPORT.json says; errors as for `check`."""
    path = folder / SEAL
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {SEAL}, so it is no finished export; give a folder that "
            f"'lemon-muse export' wrote."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shapes = {"format": str, "sha256": dict, "encoder": dict, "packages": dict}
        if not all(isinstance(manifest[key], kind) for key, kind in shapes.items()):
            raise ValueError("a value of another kind than written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); fetch it or export it again.") from None
    return dict(manifest)


def sums_of(folder: Path, *, without: set[str]) -> dict[str, str]:
    """SHA-256 of every file below a folder, name -> hex; unfinished files are left out."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in without and path.suffix != ".tmp":
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _repeat(folder: Path, manifest: dict[str, Any]) -> float:
    """Largest difference between the stored output and what the files give now."""
    form = manifest["format"]
    then, now = manifest["packages"], {name: _version(name) for name in manifest["packages"]}
    moved = ", ".join(f"{k} {v}, now {now[k]}" for k, v in then.items() if now[k] != v)
    hint = f"exported with {moved}" if moved else "the packages have the versions of the export"
    try:
        pair = load_file(folder / PAIR)
        found = READERS[form](folder, pair, manifest["encoder"])
        apart = torch.stack([(v - pair[k]).abs().max() for k, v in found.items()]).max()
        scale = max(1.0, *(float(pair[k].abs().max()) for k in found))
    except UserError as error:
        if "extra '" in str(error):
            raise
        raise RunError(f"{folder}: {error}") from None
    except Exception as error:  # each library has errors of its own
        first = str(error).split("\n")[0][:200]
        raise RunError(
            f"{folder}: the files are those of the export, but they do not open as {form} here "
            f"({first}); {hint}."
        ) from None
    if not apart < LATER * scale:
        raise RunError(
            f"{folder}: the files are those of the export, but the features differ from the stored "
            f"ones by {float(apart):.2g}; {hint}."
        )
    return float(apart)


def again_muse(folder: Path, pair: Tensors, facts: dict[str, Any]) -> Tensors:
    """What a network read from the released layout makes of a pair."""
    return _of_file(folder, "*.pth", pair)


def again_lemon(folder: Path, pair: Tensors, facts: dict[str, Any]) -> Tensors:
    """What an encoder read from the released layout makes of a pair."""
    return _of_file(folder, "*.pth.tar", pair)


@torch.inference_mode()
def _of_file(folder: Path, pattern: str, pair: Tensors) -> Tensors:
    encoder = load(next(iter(sorted(folder.glob(pattern))), folder / pattern))
    return encoder.check_output(pair)


@torch.inference_mode()
def again_cellvit(folder: Path, pair: Tensors, facts: dict[str, Any]) -> Tensors:
    """What a plain ViT with the settings that CellViT gets makes of a pair: all tokens."""
    import timm

    said = json.loads((folder / "cellvit.json").read_text(encoding="utf-8"))
    stored = torch.load(folder / said["file"], map_location="cpu", weights_only=True)
    state = {k.removeprefix("encoder."): v for k, v in stored.get("teacher", stored).items()}
    size = {384: "small", 768: "base"}[said["model"]["embed_dim"]]
    network: Any = timm.create_model(
        f"vit_{size}_patch16_224", num_classes=0, num_heads=said["model"]["num_heads"]
    )
    network.load_state_dict(state)
    return {"tokens": network.eval().forward_features(pair["input"])}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
