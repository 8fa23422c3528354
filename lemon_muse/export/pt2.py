"""pt2: `encoder.pt2`, which `torch.export.load` opens with neither timm nor this package."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from lemon_muse.data.files import write_atomic
from lemon_muse.dense import DenseEncoder
from lemon_muse.export.program import (
    FACTS,
    SAMPLE,
    apart,
    as_tuple,
    card_of,
    facts_of,
    outputs,
    trace,
)
from lemon_muse.frozen import FrozenEncoder

NAME = "encoder.pt2"
USE = """```python
import torch

model = torch.export.load("THIS_FOLDER/encoder.pt2").module()
images = torch.randn(3, 3, SIDE, SIDE)  # normalised windows, any number of them
with torch.inference_mode():
    RESULT
```

The program is for evaluation, in float32, for windows of SIDE px. The facts
above are also in `EXPORT.json`."""
CROP, DENSE = "features = model(images)  # [3, DIM]", "cls, map = model(images)"


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the program, load it again, and return the largest difference to the network.

    A MUSE network gives its class tokens and its maps.

    Raises:
        UserError: torch.export does not support the network.
    """
    program = trace(encoder, "format=pt2")
    dense = isinstance(encoder, DenseEncoder)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts_of(encoder))})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, buffer.getvalue())
    use = USE.replace("RESULT", DENSE if dense else CROP) + (SAMPLE if dense else "")
    text = card_of(encoder, library="pytorch", use=use, card=card)
    write_atomic(folder / "README.md", text.encode())
    loaded = torch.export.load(folder / NAME).module()
    return apart(encoder, lambda images: as_tuple(loaded(images)))


@torch.inference_mode()
def again(
    folder: Path, pair: dict[str, torch.Tensor], facts: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What the program makes of the input of a pair."""
    loaded = torch.export.load(folder / NAME).module()
    return outputs(as_tuple(loaded(pair["input"])), pair, facts)
