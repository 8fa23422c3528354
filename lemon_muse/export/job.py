"""The `export` job: from a run, an encoder folder or a checkpoint to a target format."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lemon_muse.config import Config
from lemon_muse.errors import RunError, UserError
from lemon_muse.export.embedded import Tokens

Form = Literal["timm", "hf", "pt2", "onnx", "muse", "lemon", "cellvit", "cellvit_tokens"]


class Export(Config):
    """Export an encoder; its features are compared with the source's before it counts as done."""

    run: Path | None = Field(
        None, description="run folder, encoder folder, or released LEMON or MUSE file"
    )
    checkpoint: Path | None = Field(None, description="a checkpoint file of a run, instead of run=")
    network: Literal["recipe", "query", "momentum", "teacher", "student", "crop", "dense"] = Field(
        "recipe",
        description="with checkpoint=: which encoder: query or momentum (moco_v3), teacher or "
        "student (dinov2, muse), crop or dense (joint); recipe = as configured",
    )
    embedded: Path | None = Field(
        None, description="a table of lemon-muse embed, instead of run=, for format=cellvit_tokens"
    )
    format: Form = Field(
        "timm",
        description="timm: a folder for timm, and bare weights (of a MUSE network, its encoder); "
        "hf: for transformers' AutoModel; pt2: torch.export; onnx: ONNX Runtime (both with the map "
        "of a MUSE network); muse, lemon: the released files; cellvit: for CellViT and CellViT++; "
        "cellvit_tokens: features of nuclei for CellViT++'s cell classifier",
    )
    tokens: Tokens = Field(Tokens(), description="with format=cellvit_tokens: the token cache")
    out: Path | None = Field(None, description="folder to write; it appears when it is finished")
    check: Path | None = Field(
        None,
        description="instead of an export: an exported folder, whose SHA-256 sums are compared and "
        "whose input/output pair is repeated",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Export":
        if self.check is not None:
            if self.model_fields_set - {"check"}:
                raise ValueError("check=FOLDER goes alone: it says itself what format it has.")
            return self
        if self.format == "cellvit_tokens":
            if self.embedded is None or self.run or self.checkpoint:
                raise ValueError(
                    "format=cellvit_tokens takes embedded=TABLE, of lemon-muse embed, and neither "
                    "run= nor checkpoint= ."
                )
        elif self.embedded is not None or "tokens" in self.model_fields_set:
            raise ValueError("embedded= and tokens= go with format=cellvit_tokens.")
        elif (self.run is None) == (self.checkpoint is None):
            raise ValueError(
                "give exactly one of run=FOLDER and checkpoint=FILE, or check=FOLDER alone."
            )
        if self.out is None:
            raise ValueError("'out' is required: give out=FOLDER.")
        if self.network != "recipe" and self.checkpoint is None:
            raise ValueError("network= goes with checkpoint=FILE: run= holds one encoder only.")
        return self


def run(cfg: Export) -> Path:
    """Write `cfg.out` and print the largest difference to the source; or check a folder."""
    from lemon_muse import encoder
    from lemon_muse.export import FORMATS, check_format, verify

    if cfg.check is not None:
        print(verify.check(cfg.check))
        return cfg.check
    assert cfg.out is not None
    _refuse(cfg.out, cfg)
    if cfg.embedded is not None:
        from lemon_muse.export import embedded

        print(embedded.write(cfg.embedded, cfg.out, cfg.tokens))
        return cfg.out
    if cfg.checkpoint is not None:
        source, card = _of_checkpoint(cfg.checkpoint, cfg.network)
    else:
        assert cfg.run is not None
        source, card = encoder.load(cfg.run), _sections(cfg.run)
    check_format(source, cfg.format)
    with _staged(cfg.out) as folder:
        apart = FORMATS[cfg.format](source, folder, card)
        network = cfg.network if cfg.checkpoint is not None else None
        verify.seal(folder, source, form=cfg.format, apart=apart, network=network)
    print(
        f"{cfg.out}: {cfg.format}, {source.content_hash}, largest difference to "
        f"the source {apart:.1g}"
    )
    return cfg.out


def _refuse(out: Path, cfg: Export) -> None:
    """Refuse a folder in which an export would replace something else.

    Raises:
        UserError: a file, a run, the source itself, or an export in another format.
    """
    from lemon_muse.export import verify

    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; give a folder.")
    own = {p.resolve() for p in (cfg.run, cfg.run and cfg.run / "encoder") if p}
    if cfg.embedded is not None and out.resolve() == cfg.embedded.resolve():
        raise UserError(f"out={out} is the table itself; give another folder.")
    if out.resolve() in own or any((out / name).is_dir() for name in ("encoder", "checkpoints")):
        raise UserError(f"out={out} is the folder of a run or of its encoder; give another one.")
    if (out / verify.SEAL).is_file():
        try:
            held = verify.manifest_of(out)["format"]
        except RunError:
            raise UserError(f"out={out} holds a damaged {verify.SEAL}; remove it.") from None
        if held != cfg.format:
            raise UserError(
                f"out={out} holds an export in format={held}; give another folder for {cfg.format}."
            )


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose files move there once all are written, EXPORT.json last."""
    from lemon_muse.export import verify

    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        out.mkdir(exist_ok=True)
        # Files of an earlier export must not be taken for those of this one while it moves in.
        if (out / verify.SEAL).is_file():
            # Only what lies in the folder: names come from a file.
            held = verify.sums_of(out, without={verify.SEAL})
            for name in held.keys() & verify.manifest_of(out)["sha256"].keys():
                (out / name).unlink()
            (out / verify.SEAL).unlink()
        for path in sorted(folder.iterdir(), key=lambda p: p.name == verify.SEAL):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sections(path: Path) -> dict[str, str]:
    """What the source's model card says beside its facts: recipe, data, scores."""
    from lemon_muse.export import verify

    for folder in (path, path / "encoder"):
        file = folder / verify.CARD
        if (folder / "config.json").is_file() and file.is_file():
            break
    else:
        return {}
    found: dict[str, str] = {}
    for part in f"\n{file.read_text(encoding='utf-8')}".split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title not in (verify.SECTION, "Bare weights"):
            found[title] = body.strip()
    return found


def _of_checkpoint(path: Path, network: str) -> tuple[Any, dict[str, Any]]:
    """The encoder in a training checkpoint; needs neither the run folder nor the shards."""
    import torch

    from lemon_muse.config import validate
    from lemon_muse.methods import METHODS
    from lemon_muse.recipe import Train

    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        config, facts = json.loads(state["config"]), json.loads(state["shards"])
    except FileNotFoundError:
        raise UserError(
            f"there is no checkpoint {path}; a run keeps them in checkpoints/."
        ) from None
    except Exception as error:
        first = str(error).split("\n")[0]
        raise UserError(f"{path} is not a lemon_muse checkpoint ({first}).") from None
    if network != "recipe":
        config["method"]["export"] = network
    cfg = validate(Train, config)
    method = METHODS[cfg.method.name][1](cfg.method, cfg.setting_again(facts))
    method.load_state_dict(state["method"])
    encoder = method.encoder()
    encoder.name = cfg.name
    return encoder.eval(), {"Recipe": config}
