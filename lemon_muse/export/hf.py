"""hf: the folder that transformers opens: `AutoModel.from_pretrained(FOLDER)` (its timm wrapper).

It is timm's folder with the two keys by which transformers knows the wrapper, so timm opens it too.
"""

import json
from pathlib import Path
from typing import Any

import torch

from lemon_muse.data.files import write_atomic
from lemon_muse.encoder import save_encoder
from lemon_muse.export import optional
from lemon_muse.export.program import card_of
from lemon_muse.export.timm import apart, crop_encoder
from lemon_muse.frozen import FrozenEncoder

USE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("THIS_FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("THIS_FOLDER")
windows = [Image.new("RGB", (SIDE, SIDE), (200, 150, 190))]  # yours, cut at the µm/px above
with torch.inference_mode():
    found = model(**processor(windows, return_tensors="pt"))
features = found.pooler_output  # [1, DIM]
```

The processor resizes whatever it is given to SIDE px: give it windows of SIDE px, cut at the µm/px
above, or nuclei change their size. transformers needs the package timm for this model."""


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the folder, open it with transformers, and return the largest difference.

    Of a MUSE network the encoder alone is written.

    Raises:
        UserError: transformers is not installed.
    """
    optional("transformers", "format=hf")
    part, card = crop_encoder(encoder, card)
    save_encoder(part, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    text = card_of(part, library="transformers", use=USE, card=card)
    write_atomic(folder / "README.md", text.encode())
    return apart(part, lambda pair: again(folder, pair))


@torch.inference_mode()
def again(
    folder: Path, pair: dict[str, torch.Tensor], facts: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """What transformers makes of the input of a pair, from the folder alone."""
    transformers = optional("transformers", "format=hf")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return {"output": model(pixel_values=pair["input"]).pooler_output}
