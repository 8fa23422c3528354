"""The released LEMON file against a forward pass written from its description, and bad files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lemon_muse import encoder as enc
from lemon_muse.errors import UserError
from lemon_muse.released import open_released
from tests.eval.standins import dense_network

State = dict[str, torch.Tensor]
QUERY = "module.base_encoder."


def sincos(cells: int, dim: int) -> torch.Tensor:
    """float [1 + cells², dim]: row 0 for the class token; the first half encodes the row index."""
    out = torch.zeros(1 + cells * cells, dim, dtype=torch.float64)
    quarter = dim // 4
    for i in range(cells):
        for j in range(cells):
            for k in range(quarter):
                omega = 10000 ** (-k / quarter)
                at = 1 + i * cells + j
                out[at, k], out[at, quarter + k] = math.sin(i * omega), math.cos(i * omega)
                out[at, 2 * quarter + k] = math.sin(j * omega)
                out[at, 3 * quarter + k] = math.cos(j * omega)
    return out


def lemon_state(
    *, depth: int = 2, dim: int = 384, patch: int = 8, cells: int = 5, seed: int = 0
) -> State:
    """The query encoder's keys and shapes, with weights large enough for attention to matter."""
    draw = torch.Generator().manual_seed(seed)

    def weight(*shape: int, scale: float = 0.05) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * scale

    out = {
        "cls_token": weight(1, 1, dim),
        "pos_embed": sincos(cells, dim)[None].float(),
        "patch_embed.proj.weight": weight(dim, 3, patch, patch),
        "patch_embed.proj.bias": weight(dim),
    }
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            out[f"blocks.{i}.{norm}.weight"] = 1 + weight(dim)
            out[f"blocks.{i}.{norm}.bias"] = weight(dim)
        shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        for name, shape in shapes.items():
            out[f"blocks.{i}.{name}.weight"] = weight(*shape)
            out[f"blocks.{i}.{name}.bias"] = weight(shape[0])
    return {**out, "norm.weight": 1 + weight(dim), "norm.bias": weight(dim)}


def checkpoint(state: State, **more: torch.Tensor) -> dict[str, Any]:
    """As MoCo v3's trainer saves it: query encoder with its head, momentum encoder, predictor."""
    out: State = {QUERY + key: value for key, value in state.items()}
    out[f"{QUERY}head.0.weight"] = torch.ones(8, 384)
    out[f"{QUERY}head.1.running_mean"] = torch.ones(8)
    out |= {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in state.items()}
    out["module.predictor.0.weight"] = torch.ones(8, 8)
    return {"epoch": 150, "arch": "vit_small", "state_dict": {**out, **more}, "scaler": {}}


def forward(state: State, images: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Class token after the final norm, float64, from the description alone."""
    s = {key: value.double() for key, value in state.items()}
    dim, patch = s["norm.weight"].numel(), s["patch_embed.proj.weight"].shape[-1]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (dim,), s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    weight, bias = s["patch_embed.proj.weight"], s["patch_embed.proj.bias"]
    patches = F.conv2d(images.double(), weight, bias, stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(images), -1, -1), patches], 1) + s["pos_embed"]
    for i in range(len({key.split(".")[1] for key in s if key.startswith("blocks.")})):
        block = f"blocks.{i}"
        q, k, v = linear(normed(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)
        out = []
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim / heads)
            out.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(out, -1), f"{block}.attn.proj")
        hidden = linear(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(F.gelu(hidden), f"{block}.mlp.fc2")
    return normed(x, "norm")[:, 0]


def written(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


def found(path: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return open_released(path)(images).double()


def test_lemon_is_its_description_with_12_heads(tmp_path: Path) -> None:
    state = lemon_state(depth=12)
    path = written(tmp_path / "lemon.pth.tar", checkpoint(state))
    encoder = enc.load(path)
    images = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = encoder(images).double()
    torch.testing.assert_close(got, forward(state, images, heads=12), rtol=1e-4, atol=1e-4)
    # Shapes cannot tell: with timm's 6 heads it would be another function.
    six = forward(state, images, heads=6)
    assert float((got - six).norm() / six.norm()) > 0.1
    assert (encoder.name, encoder.dim, encoder.feature) == ("lemon", 384, "token")
    assert (encoder.image_size, encoder.patch_size, encoder.num_heads) == (40, 8, 12)
    assert encoder.mpp == 0.25
    assert encoder.mean == (0.5626309, 0.3856308, 0.5453570)
    assert encoder.std == (0.1810322, 0.1668266, 0.1369456)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder.network.pos_embed, state["pos_embed"])


def test_patch_width_and_depth_come_from_the_shapes(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 40, 40)
    for given in ({"patch": 4, "cells": 10}, {"dim": 768, "depth": 1}):
        state = lemon_state(**given)
        path = written(tmp_path / "other.bin", checkpoint(state))
        wanted = forward(state, images, heads=12)
        torch.testing.assert_close(found(path, images), wanted, rtol=1e-4, atol=1e-4)
        assert open_released(path).name == "other"


def test_the_statistics_beside_the_file_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "lemon.pth.tar", checkpoint(lemon_state()))
    published = open_released(path)
    beside = tmp_path / "mean_std.json"
    beside.write_text(json.dumps({"mean": [0.5, 0.4, 0.6], "std": [0.1, 0.2, 0.3]}), "utf-8-sig")
    other = open_released(path)
    assert other.mean == (0.5, 0.4, 0.6) and other.std == (0.1, 0.2, 0.3)
    assert other.content_hash != published.content_hash
    for text, said in (
        ('{"mean": [0.5, 0.4, 0.6]}', r"mean_std\.json: 'std' must be three numbers"),
        ('{"mean": [143, 98, 139], "std": [46, 42, 35]}', "of pixels in 0..1"),
        ("[0.5, 0.4]", 'must hold {"mean"'),
        ("{", "is no JSON"),
    ):
        beside.write_text(text)
        with pytest.raises(UserError, match=said):
            open_released(path)


def test_lemon_becomes_a_folder_of_ours(tmp_path: Path) -> None:
    path = written(tmp_path / "lemon.pth.tar", checkpoint(lemon_state()))
    encoder = enc.load(path)
    back = enc.load(enc.save_encoder(encoder, tmp_path / "folder"))
    assert back.content_hash == encoder.content_hash and back.num_heads == 12


def edited(**changes: Any) -> State:
    """LEMON's keys with some replaced; None takes one out."""
    state: dict[str, Any] = {**lemon_state(depth=1), **changes}
    return {key: value for key, value in state.items() if value is not None}


NAN = torch.full((384,), float("nan"))


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (lambda: checkpoint(edited(**{"norm.weight": None})), r"Missing key.*norm\.weight"),
        (lambda: checkpoint(edited(extra=NAN)), "Unexpected key.*extra"),
        (
            lambda: checkpoint(edited(**{"norm.bias": torch.ones(9)})),
            r"size mismatch for norm\.bia",
        ),
        (lambda: checkpoint(edited(**{"norm.bias": NAN})), r"not finite \(norm\.bias\)"),
        (lambda: checkpoint(edited(pos_embed=None)), "holds no ViT"),
        (
            lambda: checkpoint(lemon_state(depth=1, dim=192)),
            "of width 192; LEMON's are 384 and 768",
        ),
        (lambda: checkpoint(lemon_state(depth=1, patch=16, cells=14)), "of 224 px images"),
        (lambda: {"state_dict": edited()}, r"neither .*LEMON.*nor .*MUSE.* has state_dict;"),
        (lambda: edited(), "has cls_token, pos_embed.*checkpoint_path="),
        (lambda: torch.ones(3), "it is none"),
        (lambda: {"teacher": {"module.head.x": torch.ones(1)}}, r"file\.pth: .*not a MUSE check"),
        (lambda: {"state_dict": {}, "model": torch.nn.Linear(1, 1)}, r"Python object \(torch\.nn"),
    ],
)
def test_files_of_another_kind(stored: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        enc.load(written(tmp_path / "file.pth", stored()))


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    whole = written(tmp_path / "lemon.pth.tar", checkpoint(lemon_state())).read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth.tar", "page.pth", "empty.pth"):
        with pytest.raises(UserError, match=f"{name} is .*not a file that torch.save wrote"):
            enc.load(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no file .*lemon2\.pth\.tar"):
        enc.load(tmp_path / "lemon2.pth.tar")


def test_muse_and_lemon_are_told_apart_by_content(tmp_path: Path) -> None:
    from lemon_muse.backbones.muse_weights import to_released

    lemon = written(tmp_path / "vit_s_16-224.pth", checkpoint(lemon_state(depth=1)))
    muse = written(tmp_path / "lemon.pth.tar", to_released(dense_network()))
    assert enc.load(lemon).kind == "crop" and enc.load(muse).kind == "muse"
