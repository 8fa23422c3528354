"""Encoders by a word: ours, the released ones, timm's, torchvision's, and any by a function."""

from pathlib import Path

from eval.samplers import ALL_OWN, Words
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder

ACCEPTED = (
    "an encoder or run folder, a released MUSE or LEMON file, a timm folder, timm:NAME, "
    "torchvision:NAME, python:MODULE.FUNCTION, and random: before any of these"
)


def open_encoder(word: str, words: Words = ALL_OWN, *, random: bool = False) -> FrozenEncoder:
    """The encoder that a word means, in evaluation mode, on the CPU; see docs/encoders.md.

    Args:
        word: an encoder or run folder of ours; a released MUSE or LEMON file, known by what is in
            it; a timm folder; 'timm:NAME[,…]', 'torchvision:NAME[,…]', 'python:MODULE.FUNCTION[,…]'
            with further argument=value.
        words: `mpp` is needed where neither file nor function says it; `resamples_positions` is
            how a released MUSE ViT is opened.
        random: the weights do not matter: none are fetched where it can be helped.

    Raises:
        UserError: nothing of these, or it cannot be opened; says why.
    """
    from eval.encoders import hook, timm, torchvision
    from lemon_muse.encoder import load

    if word.startswith(timm.PREFIX):
        return timm.from_word(word, mpp=words.mpp, random=random)
    if word.startswith(torchvision.PREFIX):
        return torchvision.from_word(word, mpp=words.mpp, random=random)
    if word.startswith(hook.PREFIX):
        return hook.from_word(word)
    path = Path(word)
    if not path.exists():
        raise UserError(f"encoder='{word}': there is no such file or folder; use {ACCEPTED}.")
    if timm.is_timm_folder(path):
        return timm.from_folder(path, mpp=words.mpp)
    return load(path, pos_resample=words.resamples_positions)
