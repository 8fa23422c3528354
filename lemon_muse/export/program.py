"""What pt2 and onnx share: the network as a program without Python, its check and its card."""

import json
from collections.abc import Callable
from typing import Any

import torch

from lemon_muse.backbones.sampling import sample
from lemon_muse.dense import DenseEncoder
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder

# Facts inside a .pt2 file; the folder has them in EXPORT.json.
FACTS = "lemon_muse.json"
# How to read a map, in torch alone: users of a program do not have our package.
SAMPLE = """
`points` of nuclei, x and y in px of a window, are read from its map like this:

```python
def at_nuclei(map, points):  # one map [DIM, h, w], float [n, 2] -> [n, DIM]
    grid = 2 * points / SIDE - 1
    read = torch.nn.functional.grid_sample(
        map[None], grid[None, None], padding_mode="border", align_corners=ALIGNED
    )
    return read[0, :, 0].T
```"""


def trace(encoder: FrozenEncoder, what: str) -> torch.export.ExportedProgram:
    """The network for windows of the encoder's size and any number of them, in float32.

    Raises:
        UserError: torch.export does not support something in it; `what` names the format.
    """
    network = encoder.cpu().float().eval().network
    images = encoder.check_input()["input"]
    try:
        with torch.no_grad():
            return torch.export.export(
                network,
                (images,),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
                # MUSE's network takes the length of a tensor, which plain tracing fixes.
                strict=isinstance(encoder, DenseEncoder),
            )
    except Exception as error:  # it raises errors of many kinds
        raise UserError(
            f"{what}: torch.export does not support the network of {encoder.name} "
            f"({reason_of(error)}); use format=timm."
        ) from None


def reason_of(error: Exception) -> str:
    """The first line of an error of torch's exporters, which fill pages, at most 200 letters."""
    lines = (line.strip() for line in str(error).split("\n"))
    return next((line for line in lines if line), type(error).__name__)[:200]


def output_names(encoder: FrozenEncoder) -> list[str]:
    """What the program gives, in order."""
    return ["cls", "map"] if isinstance(encoder, DenseEncoder) else ["features"]


@torch.inference_mode()
def apart(
    encoder: FrozenEncoder, program: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> float:
    """Largest difference between program and network, over batches of 1, 3 and 8 windows."""
    generator, side = torch.Generator().manual_seed(1), encoder.image_size
    worst = torch.zeros(())
    for count in (1, 3, 8):
        images = torch.randn(count, 3, side, side, generator=generator)
        wanted = as_tuple(encoder.network(images))
        for one, other in zip(program(images), wanted, strict=True):
            # Unlike max(), this keeps a NaN.
            worst = torch.maximum(worst, (one - other).abs().max())
    return float(worst)


def outputs(
    found: tuple[torch.Tensor, ...], pair: dict[str, torch.Tensor], facts: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """A program's outputs under the names of a check pair; maps are read at the pair's points."""
    if len(found) == 1:
        return {"output": found[0]}
    size = (pair["input"].shape[-2], pair["input"].shape[-1])
    convention = facts["settings"]["convention"]
    read = sample(found[1], pair["points"], pair["owner"], size=size, convention=convention)
    return {"cls": found[0], "output": read}


def facts_of(encoder: FrozenEncoder) -> dict[str, Any]:
    """All that a user of an exported network must know beside it; plain values."""
    return {
        **encoder.facts(),
        "kind": encoder.kind,
        "dim": encoder.dim,
        "name": encoder.name,
        "content_hash": encoder.content_hash,
    }


def as_tuple(found: Any) -> tuple[torch.Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def card_of(encoder: FrozenEncoder, *, library: str, use: str, card: dict[str, Any]) -> str:
    """The model card of a format that is not timm's: our facts, and how its own library opens it.

    Args:
        library: Hugging Face's name of the library.
        use: Markdown in which SIDE, DIM and ALIGNED stand for this encoder's.
        card: further sections, title -> Markdown or a dict.
    """
    aligned = isinstance(encoder, DenseEncoder) and encoder.settings.convention == "released"
    for word, value in (("SIDE", encoder.image_size), ("DIM", encoder.dim), ("ALIGNED", aligned)):
        use = use.replace(word, str(value))
    lines = [
        "---",
        f"library_name: {library}",
        "tags: [pathology, histology, nucleus, self-supervised]",
        "---",
        f"# {encoder.name}",
        "",
        "A nucleus encoder for H&E, pretrained without labels by lemon_muse.",
        "",
        *(line for line in encoder.describe() if line.startswith("- ")),
        "",
        use,
        "",
    ]
    for title, body in card.items():
        text = body if isinstance(body, str) else f"```json\n{json.dumps(body, indent=1)}\n```"
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)
