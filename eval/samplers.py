"""How the feature of a nucleus is read off an encoder: `sampler=`, `window=`, `valid=`, `mpp=` …

crop    the encoder's feature of its own window, with the nucleus in the middle; with `resize=true`
        of a window of another side, brought to that of the network's input (as the LEMON paper
        gives 40 px crops to tile encoders)
map     the dense map of a MUSE encoder, read at the nucleus
tokens  the last patch tokens of a ViT (through its final norm), read at the nucleus
cls     the class token of a ViT (MUSE: the encoder's image feature) of a window around the nucleus
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from eval.dense import dense_features, per_pass
from eval.features import cache_key, features
from eval.readers import ClassToken, Resized, Tokens
from lemon_muse.data.table import Table
from lemon_muse.dense import DenseEncoder
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
    network was trained. `resize` brings the window to the side of the network's input.
    `pos_resample` is for released MUSE ViTs: the published evaluation resamples their positions
    once more; None = where its convention is asked for.
    """

    sampler: Sampler = "auto"
    window: int | None = None
    valid: int | None = None
    mpp: float | None = None
    align: Align = "centre"
    resize: bool = False
    pos_resample: bool | None = None

    @property
    def any(self) -> bool:
        """Whether something is asked for that a floor cannot have."""
        asked = (self.sampler, self.window, self.valid, self.mpp, self.resize)
        return asked != ("auto", None, None, None, False)

    @property
    def resamples_positions(self) -> bool:
        """Whether a released MUSE ViT is opened as the published evaluation opens it."""
        return self.align == "released" if self.pos_resample is None else self.pos_resample


ALL_OWN = Words()


@dataclass(frozen=True)
class Look:
    """One way to read features off one encoder.

    Attributes:
        sampler: crop, map, tokens or cls.
        window: side of what is cut out, px at `mpp`: what the network sees, unless `resize`.
        valid: side of the middle part that nuclei are read in, px; None where the nucleus is in
            the middle of a window of its own.
        align: convention of the reading; '' where nothing is read off a map.
        own: the way that the encoder was made for.
        resize: side that the window is brought to before the network sees it, px; None = it is not.
    """

    sampler: str
    window: int
    valid: int | None
    mpp: float
    align: str
    own: bool
    resize: int | None = None

    @property
    def side(self) -> int:
        """Side of what the network sees, px."""
        return self.resize or self.window

    @property
    def tag(self) -> str:
        """What is added to the encoder's name; '' for its own way."""
        if self.own:
            return ""
        how = f":{self.sampler}" if self.sampler in ("tokens", "cls") else ""
        how = ":resized" if self.resize else how
        valid = f"/{self.valid}" if self.valid else ""
        return f"{how}@{self.window}{valid}px{self.mpp:g}"

    def hash(self, content: str) -> str:
        """What a row is known by: the encoder's content hash, or one of it and this way."""
        if self.own:
            return content
        parts = (self.sampler, self.window, self.valid or 0, self.mpp, self.align)
        return cache_key(content, *parts, *((self.resize,) if self.resize else ()))

    def facts(self, content: str) -> dict[str, float | int | str]:
        """For `params` of a result row."""
        said: dict[str, float | int | str] = {"sampler": self.sampler, "window": self.window}
        said |= {"valid": self.valid, "align": self.align} if self.valid else {}
        said |= {"resize": self.resize} if self.resize else {}
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
    resize = _resize(encoder, words, sampler)
    if sampler == "crop" and window != encoder.image_size and not resize:
        raise UserError(
            f"window={window}: sampler=crop takes the window of {encoder.name}, "
            f"{encoder.image_size} px; add resize=true to bring yours to that side, or use "
            f"sampler=cls or tokens."
        )
    patch = encoder.patch_size
    if patch and (resize or window) % patch:
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
    return Look(sampler, window, valid, mpp, align, own, resize)


def _resize(encoder: Any, words: Words, sampler: str) -> int | None:
    """Side that the window is brought to; None where it has it, or is taken as it is."""
    if not words.resize:
        return None
    if sampler != "crop":
        raise UserError(
            f"resize=true goes with sampler=crop, not {sampler}: nuclei are read off windows as "
            f"they are."
        )
    if words.window is None:
        raise UserError(
            f"resize=true needs the window that is brought to the {encoder.image_size} px of "
            f"{encoder.name}, as in window=40 mpp=0.25."
        )
    side = int(encoder.image_size)
    return side if words.window != side else None


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
    if sampler == "tokens" and getattr(encoder, "patch_tokens", None):
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
        batch = min(batch, per_pass(batch, look.side))
        return features(reader(encoder, look), table, batch=batch, **common)
    return dense_features(
        reader(encoder, look),
        table,
        window=look.window,
        valid=look.valid,
        mpp=look.mpp,
        batch=batch,
        **common,
    )


def reader(encoder: Any, look: Look) -> nn.Module:
    """The module that reads the encoder this way.

    With `look.valid` it keeps the contract of `eval.dense` (`nuclei`, mean, std), else that of
    `eval.features` (image_size, mpp, mean, std, and `forward` of windows normalised by them).
    """
    if look.valid is not None:
        return Tokens(encoder, look.window, look.align) if look.sampler == "tokens" else encoder
    if look.sampler == "cls":
        return ClassToken(encoder, look.window, look.mpp)
    if look.resize:
        return Resized(encoder, look.window, look.mpp, side=look.resize)
    if look.mpp == encoder.mpp:
        return encoder
    other = copy.copy(encoder)
    other.mpp = look.mpp
    return other
