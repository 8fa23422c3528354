"""The released MUSE networks as plain functions over a dict of tensors, from their description.

Written from the list of keys and shapes and from the facts of the released code, with none of
lemon_muse, timm or torch.nn in it: the oracle of the tests.
"""

import math

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]


def vit_shapes(dim: int, depth: int = 12, patch: int = 16, cells: int = 14) -> dict[str, tuple]:
    """Every key and shape below `module.backbone.` of a released ViT."""
    e = "encoder.encoder."
    out: dict[str, tuple] = {
        f"{e}cls_token": (1, 1, dim),
        f"{e}pos_embed": (1, 1 + cells**2, dim),
        f"{e}patch_embed.proj.weight": (dim, 3, patch, patch),
        f"{e}patch_embed.proj.bias": (dim,),
    }
    linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linear |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            out |= {f"{e}blocks.{i}.{norm}.{part}": (dim,) for part in ("weight", "bias")}
        for name, shape in linear.items():
            out |= {f"{e}blocks.{i}.{name}.weight": shape, f"{e}blocks.{i}.{name}.bias": shape[:1]}
    out |= {f"{e}norm.weight": (dim,), f"{e}norm.bias": (dim,)}
    levels = (dim // 4, dim // 2, dim, 2 * dim)
    out |= {f"decoder.dim_map_layers.{i}.weight": (c, dim, 1, 1) for i, c in enumerate(levels)}
    return out | decoder_shapes(levels, dim // 4)


def resnet50_shapes() -> dict[str, tuple]:
    e = "encoder.encoder."
    out: dict[str, tuple] = {f"{e}conv1.weight": (64, 3, 7, 7), **norm_shapes(f"{e}bn1", 64)}
    inputs = 64
    for stage, (count, mid) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for i in range(count):
            b = f"{e}layer{stage}.{i}."
            for conv, (o, n, k) in enumerate(((mid, inputs, 1), (mid, mid, 3), (4 * mid, mid, 1))):
                out[f"{b}conv{conv + 1}.weight"] = (o, n, k, k)
                out |= norm_shapes(f"{b}bn{conv + 1}", o)
            if i == 0:
                out[f"{b}downsample.0.weight"] = (4 * mid, inputs, 1, 1)
                out |= norm_shapes(f"{b}downsample.1", 4 * mid)
            inputs = 4 * mid
    return out | decoder_shapes((256, 512, 1024, 2048), 256)


def decoder_shapes(levels: tuple[int, ...], width: int) -> dict[str, tuple]:
    out: dict[str, tuple] = {}
    for i in (3, 2, 1):
        fine, d = levels[i - 1], f"decoder.decoder{i}."
        convs = (("first_block", levels[i] + fine), ("last_block.conv1", fine))
        for name, inputs in (*convs, ("last_block.conv2", fine)):
            out[f"{d}{name}.layer.0.weight"] = (fine, inputs, 3, 3)
            out |= norm_shapes(f"{d}{name}.layer.1", fine)
    for i, channels in enumerate(levels):
        h = f"decoder.hyper_feats.conv_list.{i}.layer."
        out[f"{h}0.weight"] = (width, channels, 1, 1)
        out |= norm_shapes(f"{h}1", width)
    return out


def norm_shapes(key: str, dim: int) -> dict[str, tuple]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{part}": (dim,) for part in parts} | {f"{key}.num_batches_tracked": ()}


def random_state(shapes: dict[str, tuple], seed: int = 0) -> State:
    """Weights that keep activations near one, so that every part of the network shows."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            out[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            out[key] = 0.5 + noise.abs()
        elif len(shape) > 1 and "token" not in key and "pos_embed" not in key:
            out[key] = noise * 1.2 / math.sqrt(math.prod(shape[1:]))
        elif key.endswith("weight"):
            out[key] = 1 + 0.2 * noise
        else:
            out[key] = 0.2 * noise
    return out


def move_positions(table: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """DINO's resampling: bicubic (a = -0.75), step = old / (new + 0.1), no class token in `table`.

    The same separable filter as a plain loop: two small matrices.
    """
    side = math.isqrt(len(table))

    def matrix(new: int) -> torch.Tensor:
        out = torch.zeros(new, side, dtype=torch.float64)
        for i in range(new):
            place = (i + 0.5) * side / (new + 0.1) - 0.5
            base = math.floor(place)
            for tap in range(base - 1, base + 3):
                t = abs(place - tap)
                near = 1.25 * t**3 - 2.25 * t**2 + 1
                far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
                out[i, min(max(tap, 0), side - 1)] += near if t <= 1 else far
        return out

    grid = table.double().reshape(side, side, -1)
    grid = torch.einsum("ri,cj,ijd->rcd", matrix(rows), matrix(cols), grid)
    return grid.flatten(0, 1).to(table.dtype)


def vit_forward(s: State, images: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    e, patch = "encoder.encoder.", s["encoder.encoder.patch_embed.proj.weight"].shape[-1]
    rows, cols = images.shape[2] // patch, images.shape[3] // patch
    x = F.conv2d(images, s[f"{e}patch_embed.proj.weight"], s[f"{e}patch_embed.proj.bias"], patch)
    x = torch.cat([s[f"{e}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    table = s[f"{e}pos_embed"][0]
    if not (rows == cols and rows * cols == len(table) - 1):
        table = torch.cat([table[:1], move_positions(table[1:], rows, cols)])
    x = x + table
    depth = len({key.split(".")[3] for key in s if key.startswith(f"{e}blocks.")})
    taps = []
    for i in range(depth):
        b = f"{e}blocks.{i}."
        x = x + attention(layer_norm(x, s, f"{b}norm1"), s, b, heads)
        y = F.linear(layer_norm(x, s, f"{b}norm2"), s[f"{b}mlp.fc1.weight"], s[f"{b}mlp.fc1.bias"])
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + F.linear(y, s[f"{b}mlp.fc2.weight"], s[f"{b}mlp.fc2.bias"])
        if (i + 1) % (depth // 4) == 0:
            taps.append(layer_norm(x, s, f"{e}norm"))
    cls = taps[-1][:, 0]
    levels = []
    for i, tap in enumerate(taps):
        level = tap[:, 1:].transpose(1, 2).reshape(len(tap), -1, rows, cols)
        level = F.conv2d(level, s[f"decoder.dim_map_layers.{i}.weight"])
        levels.append(scaled(level, patch / (4, 8, 16, 32)[i]))
    return cls, decode(s, levels)


def attention(x: torch.Tensor, s: State, block: str, heads: int) -> torch.Tensor:
    qkv = F.linear(x, s[f"{block}attn.qkv.weight"], s[f"{block}attn.qkv.bias"])
    q, k, v = qkv.chunk(3, -1)
    width = x.shape[-1] // heads
    out = torch.empty_like(x)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        out[..., part] = score.softmax(-1) @ v[..., part]
    return F.linear(out, s[f"{block}attn.proj.weight"], s[f"{block}attn.proj.bias"])


def layer_norm(x: torch.Tensor, s: State, key: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / scale * s[f"{key}.weight"] + s[f"{key}.bias"]


def resnet50_forward(s: State, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    e = "encoder.encoder."
    x = F.relu(norm(F.conv2d(images, s[f"{e}conv1.weight"], None, 2, 3), s, f"{e}bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    levels = []
    for stage, count in enumerate((3, 4, 6, 3), 1):
        for i in range(count):
            b, stride = f"{e}layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1
            y = F.relu(norm(F.conv2d(x, s[f"{b}conv1.weight"]), s, f"{b}bn1"))
            y = F.relu(norm(F.conv2d(y, s[f"{b}conv2.weight"], None, stride, 1), s, f"{b}bn2"))
            y = norm(F.conv2d(y, s[f"{b}conv3.weight"]), s, f"{b}bn3")
            if i == 0:
                x = norm(
                    F.conv2d(x, s[f"{b}downsample.0.weight"], None, stride), s, f"{b}downsample.1"
                )
            x = F.relu(x + y)
        levels.append(x)
    return x.mean((2, 3)), decode(s, levels)


def norm(x: torch.Tensor, s: State, key: str) -> torch.Tensor:
    parts = (s[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, training=False, eps=1e-5)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


def decode(s: State, levels: list[torch.Tensor]) -> torch.Tensor:
    """The U-Net and the concatenation of all levels, at stride 4."""
    x, decoded = levels[3], [levels[3]]
    for i in (3, 2, 1):
        d, fine = f"decoder.decoder{i}.", levels[i - 1]
        x = torch.cat([scaled(x, 2), fine], 1)
        for block in ("first_block", "last_block.conv1", "last_block.conv2"):
            y = F.conv2d(x, s[f"{d}{block}.layer.0.weight"], padding=1)
            y = norm(y, s, f"{d}{block}.layer.1")
            if block == "first_block":
                x = shortcut = F.relu(y)
            elif block == "last_block.conv1":
                x = F.relu(y)
            else:
                x = F.relu(y + shortcut)
        decoded.insert(0, x)
    out = []
    for i, level in enumerate(decoded):
        h = f"decoder.hyper_feats.conv_list.{i}.layer."
        out.append(scaled(norm(F.conv2d(level, s[f"{h}0.weight"]), s, f"{h}1"), 2**i))
    return torch.cat(out, 1)
