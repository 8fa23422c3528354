"""onnx: `encoder.onnx`, for ONNX Runtime and everything else that reads ONNX."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from lemon_muse.data.files import write_atomic
from lemon_muse.dense import DenseEncoder
from lemon_muse.errors import UserError
from lemon_muse.export import optional
from lemon_muse.export.program import (
    SAMPLE,
    apart,
    card_of,
    facts_of,
    output_names,
    outputs,
    reason_of,
    trace,
)
from lemon_muse.frozen import FrozenEncoder

NAME = "encoder.onnx"
# A protocol buffer, and so a single ONNX file, cannot be larger.
LARGEST = 2**31 - 1
USE = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("THIS_FOLDER/encoder.onnx")
images = np.random.randn(3, 3, SIDE, SIDE).astype(np.float32)  # normalised, any number of them
RESULT
```

Values are float32; windows have SIDE px. The facts above are also in the file's metadata
and in `EXPORT.json`."""
CROP = '(features,) = session.run(None, {"images": images})  # [3, DIM]'
DENSE = 'cls, map = session.run(None, {"images": images})'


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the graph, run it with ONNX Runtime, and return the largest difference.

    A MUSE network gives its class tokens and its maps.

    Raises:
        UserError: a package is missing, the graph is too large, or an operator is not supported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional(package, "format=onnx")
    payload = _graph(encoder)
    dense = isinstance(encoder, DenseEncoder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, payload)
    use = USE.replace("RESULT", DENSE if dense else CROP) + (SAMPLE if dense else "")
    text = card_of(encoder, library="onnx", use=use, card=card)
    write_atomic(folder / "README.md", text.encode())
    session = _session(folder)
    return apart(encoder, lambda images: _run(session, images))


def again(
    folder: Path, pair: dict[str, torch.Tensor], facts: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What ONNX Runtime makes of the input of a pair."""
    return outputs(_run(_session(folder), pair["input"]), pair, facts)


def _graph(encoder: FrozenEncoder) -> bytes:
    """The ONNX file; its inputs and outputs have names, and its metadata our facts."""
    program = trace(encoder, "format=onnx")
    size = sum(p.numel() * 4 for p in encoder.network.state_dict().values())
    if size > LARGEST - 2**26:
        raise UserError(
            f"{encoder.name} has {size / 2**30:.1f} GiB of weights, and one ONNX file holds 2 GiB; "
            f"use format=pt2 or format=timm."
        )
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about packages that nothing here needs
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=output_names(encoder),
        )
    except Exception as error:  # it raises errors of many kinds
        raise UserError(
            f"format=onnx: an operator of {encoder.name} has no ONNX form ({reason_of(error)}); "
            f"use format=pt2 or format=timm."
        ) from None
    finally:
        log.setLevel(level)
    assert made is not None
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for key, fact in facts_of(encoder).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, fact if isinstance(fact, str) else json.dumps(fact)
    return bytes(model.SerializeToString())


def _session(folder: Path) -> Any:
    runtime = optional("onnxruntime", "format=onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(folder / NAME), options, providers=["CPUExecutionProvider"])


def _run(session: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
