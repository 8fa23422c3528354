"""How the feature of a nucleus is read off an encoder: `sampler=`, `window=`, `valid=`, `mpp=`.

crop    the encoder's feature of its own window, with the nucleus in the middle
map     the dense map of a MUSE encoder, read at the nucleus
tokens  the last patch tokens of a ViT (through its final norm), read at the nucleus
cls     the class token of a ViT (MUSE: the encoder's image feature) of a window around the nucleus
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from eval.dense import dense_features, per_pass
from eval.features import cache_key, features
from lemon_muse.backbones.sampling import sample
from lemon_muse.data.table import Table
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder
from lemon_muse.errors import UserError

Sampler = Literal["auto", "crop", "map", "tokens", "cls"]
Align = Literal["centre", "released"]
# MUSE's square: the published evaluation reads nuclei in the middle 224 px of every window.
VALID = 224
# Side of the window, px, that stands for a nucleus of a dense encoder in pictures and floors.
NUCLEUS = 40


@dataclass(frozen=True)
class Words:
    """What the user asks for; None = the encoder's own.

    `align` is how tokens are read: 'centre' (a token stands in the middle of its patch) or
    'released' (corners aligned, as in the published evaluation of MUSE). A map is read as its
    network was trained.
    """

    sampler: Sampler = "auto"
    window: int | None = None
    valid: int | None = None
    mpp: float | None = None
    align: Align = "centre"

    @property
    def any(self) -> bool:
        """Whether something is asked for that a floor cannot have."""
        return (self.sampler, self.window, self.valid, self.mpp) != ("auto", None, None, None)


ALL_OWN = Words()


@dataclass(frozen=True)
class Look:
    """One way to read features off one encoder.

    Attributes:
        sampler: crop, map, tokens or cls.
        window: side of what the network sees, px at `mpp`.
        valid: side of the middle part that nuclei are read in, px; None where the nucleus is in
            the middle of a window of its own.
        align: convention of the reading; '' where nothing is read off a map.
        own: the way that the encoder was made for.
    """

    sampler: str
    window: int
    valid: int | None
    mpp: float
    align: str
    own: bool

    @property
    def tag(self) -> str:
        """What is added to the encoder's name; '' for its own way."""
        if self.own:
            return ""
        how = f":{self.sampler}" if self.sampler in ("tokens", "cls") else ""
        valid = f"/{self.valid}" if self.valid else ""
        return f"{how}@{self.window}{valid}px{self.mpp:g}"

    def hash(self, content: str) -> str:
        """What a row is known by: the encoder's content hash, or one of it and this way."""
        if self.own:
            return content
        parts = (self.sampler, self.window, self.valid or 0, self.mpp, self.align)
        return cache_key(content, *parts)

    def facts(self, content: str) -> dict[str, float | int | str]:
        """For `params` of a result row."""
        said: dict[str, float | int | str] = {"sampler": self.sampler, "window": self.window}
        said |= {"valid": self.valid, "align": self.align} if self.valid else {}
        return {**said, "mpp": self.mpp, **({} if self.own else {"content_hash": content})}


def choose(encoder: Any, words: Words = Words()) -> Look:
    """The way to read an encoder, from the user's words.

    Raises:
        UserError: the encoder has no such features, or a window that it cannot take.
    """
    dense = isinstance(encoder, DenseEncoder)
    sampler = words.sampler
    if sampler == "auto":
        sampler = "map" if dense else "crop"
    assert sampler in get_args(Sampler)
    _possible(encoder, sampler)
    window, mpp = words.window or int(encoder.image_size), words.mpp or float(encoder.mpp)
    if sampler == "crop" and window != encoder.image_size:
        raise UserError(
            f"window={window}: sampler=crop takes the window of {encoder.name}, "
            f"{encoder.image_size} px; use sampler=cls or tokens for another."
        )
    patch = encoder.patch_size
    if patch and window % patch:
        raise UserError(
            f"window={window} cannot be cut into patches of {patch} px; use "
            f"window={max(1, round(window / patch)) * patch}."
        )
    whole = sampler in ("crop", "cls")
    if whole and words.valid is not None:
        raise UserError(f"valid={words.valid} goes with sampler=map or tokens, not {sampler}.")
    valid = None if whole else words.valid or min(window, VALID)
    if valid and valid > window:
        raise UserError(f"valid={valid} is larger than window={window}; use at most {window}.")
    align = "" if whole else encoder.settings.convention if dense else words.align
    usual = ("map" if dense else "crop", encoder.image_size, min(window, VALID) if dense else None)
    own = (sampler, window, valid) == usual and mpp == float(encoder.mpp)
    return Look(sampler, window, valid, mpp, align, own)


def _possible(encoder: Any, sampler: str) -> None:
    """Refuse what the encoder does not have."""
    dense = isinstance(encoder, DenseEncoder)
    if sampler == "crop" and dense:
        raise UserError(
            f"sampler=crop: {encoder.name} is read at nuclei; use sampler=map, or sampler=cls for "
            f"its feature of a window around each nucleus."
        )
    if sampler == "map" and not dense:
        raise UserError(
            f"sampler=map: {encoder.name} has no dense map; use sampler=crop, or sampler=tokens "
            f"for a ViT."
        )
    if dense or sampler == "crop":
        return
    network = encoder.network
    if not hasattr(network, "num_prefix_tokens") or not hasattr(network, "patch_embed"):
        raise UserError(f"sampler={sampler} needs a ViT, and {encoder.name} is none.")
    if sampler == "cls" and getattr(network, "cls_token", None) is None:
        raise UserError(f"sampler=cls: {encoder.name} has no class token; use tokens or crop.")


def features_of(
    encoder: Any,
    look: Look,
    table: Table,
    *,
    batch: int,
    workers: int,
    device: str,
    name: str,
) -> np.ndarray:
    """Features of every row of the table, float32 [n, dim]."""
    common: dict[str, Any] = {"workers": workers, "device": device, "name": name}
    if look.valid is None:
        reader = encoder
        if look.sampler == "cls":
            reader = ClassToken(encoder, look.window, look.mpp)
            batch = min(batch, per_pass(batch, look.window))
        elif look.mpp != encoder.mpp:
            reader = copy.copy(encoder)
            reader.mpp = look.mpp
        return features(reader, table, batch=batch, **common)
    reader = Tokens(encoder, look.window, look.align) if look.sampler == "tokens" else encoder
    return dense_features(
        reader, table, window=look.window, valid=look.valid, mpp=look.mpp, batch=batch, **common
    )


class Tokens(nn.Module):
    """Patch tokens of a ViT, read at nuclei; keeps the contract of `eval.dense`.

    A ViT whose positions were learnt for another window gets its position table resampled once, by
    timm's `set_input_size` (bicubic, antialiased); of a MUSE encoder the last map of the encoder is
    read, and its positions are resampled as in training.
    """

    def __init__(self, encoder: Any, window: int, align: str) -> None:
        super().__init__()
        self.mean, self.std, self.align = encoder.mean, encoder.std, align
        self.dense = isinstance(encoder, DenseEncoder)
        self.network = encoder if self.dense else vit_for(encoder, window)

    def nuclei(
        self, images: torch.Tensor, points: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """float [B, 3, H, W], [n, 2] px, int64 [n] -> float [n, dim]."""
        network: Any = self.network
        if self.dense:
            return network.tokens(images, points, owner)
        size = (images.shape[-2], images.shape[-1])
        tokens = normed_tokens(network, images)[:, network.num_prefix_tokens :]
        grid = tuple(network.patch_embed.grid_size)
        maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        return sample(maps, points, owner, size=size, convention=self.align)  # type: ignore[arg-type]


class ClassToken(nn.Module):
    """One feature of a whole window; keeps the contract of `eval.features`."""

    def __init__(self, encoder: Any, window: int, mpp: float) -> None:
        super().__init__()
        self.mean, self.std, self.image_size, self.mpp = encoder.mean, encoder.std, window, mpp
        self.dense = isinstance(encoder, DenseEncoder)
        self.network = encoder if self.dense else vit_for(encoder, window)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, window, window] -> [B, width]."""
        return self.network(images) if self.dense else normed_tokens(self.network, images)[:, 0]


def vit_for(encoder: Encoder, window: int) -> nn.Module:
    """The encoder's ViT for windows of this side; a copy where positions must be resampled."""
    network: Any = encoder.network
    if tuple(network.patch_embed.img_size or ()) == (window, window):
        return network
    if not hasattr(network, "set_input_size"):
        raise UserError(
            f"window={window}: {encoder.name} takes only {encoder.image_size} px; leave it out."
        )
    network = copy.deepcopy(network)
    network.set_input_size(img_size=(window, window))
    return network


def normed_tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    """All last tokens of a timm ViT through its final norm, float [B, prefix + patches, D]."""
    tokens = network.forward_features(images)
    # Pooling ViTs norm after pooling: their tokens come without.
    if isinstance(getattr(network, "norm", None), nn.Identity):
        tokens = network.fc_norm(tokens)
    return tokens
