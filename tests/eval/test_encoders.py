"""Encoders that are not ours: torchvision's, a user's function, and which word opens which."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from eval.encoders import open_encoder
from eval.encoders.foreign import ForeignEncoder
from eval.samplers import Words
from lemon_muse.backbones.muse_weights import to_released
from lemon_muse.errors import UserError
from tests.eval.standins import dense_network, small_encoder

HALF = Words(mpp=0.5)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = torchvision.models.resnet18(weights=None, num_classes=1000)
    network.train()(torch.randn(4, 3, 64, 64))  # batch norm has seen something
    return network.eval()


def before_the_classifier(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return create_feature_extractor(network, ["flatten"])(images)["flatten"]


@pytest.mark.parametrize("classifier", [True, False])
def test_torchvision_is_its_own_forward_before_the_classifier(
    tmp_path: Path, classifier: bool
) -> None:
    whole = resnet18()
    state = {k: v for k, v in whole.state_dict().items() if classifier or not k.startswith("fc.")}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ssl.pth")
    encoder = open_encoder(f"torchvision:resnet18,weights={tmp_path / 'ssl.pth'}", HALF)
    images = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), before_the_classifier(whole, images))
    assert (encoder.name, encoder.dim, encoder.image_size) == ("resnet18.ssl", 512, 224)
    assert encoder.mpp == 0.5 and encoder.mean == (0.485, 0.456, 0.406)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_torchvision_hash_and_random_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.save(resnet18(seed).state_dict(), tmp_path / f"{seed}.pth")
    word = f"torchvision:resnet18,image_size=40,weights={tmp_path}"
    first, again, other = (open_encoder(f"{word}/{n}.pth", HALF) for n in (0, 0, 1))
    finer = open_encoder(f"{word}/0.pth", Words(mpp=0.25))
    assert first.content_hash == again.content_hash and first.image_size == 40
    assert len({e.content_hash for e in (first, other, finer)}) == 3
    assert isinstance(first, ForeignEncoder)
    before = first.content_hash
    fresh = first.fresh(seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = torchvision.models.resnet18(weights=None).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(fresh(images), before_the_classifier(wanted, images))
    assert first.content_hash == before != fresh.content_hash
    assert fresh.content_hash == first.fresh(seed=5).content_hash
    assert fresh.content_hash != first.fresh(seed=6).content_hash
    # Random weights need no file and no network, and are those of `fresh`.
    random = open_encoder("torchvision:resnet18,image_size=40", HALF, random=True)
    assert isinstance(random, ForeignEncoder)
    state = random.fresh(seed=5).network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in fresh.network.state_dict().items())


def test_torchvision_words_that_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for word, words, said in (
        ("resnet18", Words(), r"add mpp=0\.5"),
        ("resnet51", HALF, "no classifier 'resnet51'; near names: .*resnet50"),
        ("resnet18,weights=V9", HALF, r"'V9' is neither a file nor weights .*IMAGENET1K_V1"),
        ("resnet18,size=40", HALF, "'size' is not known"),
        ("resnet18,image_size=big", HALF, "'image_size=big' is not known"),
        ("resnet18,weights", HALF, "'weights' is no argument=value"),
        ("squeezenet1_1", HALF, "has 0 classifiers instead of one"),
        (f"resnet18,weights={tmp_path / 'other.pth'}", HALF, "must be a state dict of the same"),
        (f"resnet18,weights={tmp_path / 'text.pth'}", HALF, "must be a state dict of the same"),
    ):
        random = word == "squeezenet1_1"  # so that nothing is fetched before the refusal
        with pytest.raises(UserError, match=said):
            open_encoder(f"torchvision:{word}", words, random=random)
    # A network that refuses every connection.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UserError, match=r"cannot be fetched .* as weights=FILE"):
        open_encoder("torchvision:resnet18,weights=IMAGENET1K_V1", HALF)


HOOK = """
import types

import timm
import torch

MEAN, STD = (0.7, 0.5, 0.7), (0.2, 0.25, 0.2)


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGUMENTS)


class Both(torch.nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit, self.scale = vit, torch.nn.Parameter(torch.ones(96))

    def forward(self, images):
        tokens = self.vit.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1) * self.scale


def plain(seed=0, mpp=0.5):
    return {"network": vit(seed), "image_size": 32, "mpp": mpp, "mean": MEAN, "std": STD}


def both(seed=0):
    return types.SimpleNamespace(
        network=Both(vit(seed)),
        image_size=32,
        mpp=0.5,
        mean=torch.tensor(MEAN),
        std=list(STD),
        name="tiny-both",
        tokens=lambda network, images: network.vit.forward_features(images)[:, 1:],
    )


def wrong(key, value=None, network=None):
    out = {**plain(), "tokens": None}
    out[key] = {"linear": torch.nn.Linear(3, 3), "map": torch.nn.Identity()}.get(network, value)
    return out


def fails():
    return {"network": undefined_name}
""".replace("ARGUMENTS", repr(SMALL))


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `hooks_of_a_user` in the current folder, which is not on sys.path."""
    (tmp_path / "hooks_of_a_user.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "hooks_of_a_user", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return tmp_path


def test_a_function_of_the_users(hooks: Path) -> None:
    encoder = open_encoder("python:hooks_of_a_user.plain,seed=3")
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), vit(images))
    assert (encoder.name, encoder.dim, encoder.mpp, encoder.image_size) == ("plain", 48, 0.5, 32)
    assert encoder.mean == (0.7, 0.5, 0.7) and encoder.std == (0.2, 0.25, 0.2)
    assert encoder.patch_size == 8 and not encoder.training
    assert str(hooks) not in sys.path

    other = open_encoder("python:hooks_of_a_user.both")
    with torch.inference_mode():
        assert other(images).shape == (2, 96)
    assert other.name == "tiny-both" and other.patch_size is None
    assert other.mean == pytest.approx((0.7, 0.5, 0.7))


def test_the_hash_of_a_function_follows_weights_arguments_and_text(
    hooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "python:hooks_of_a_user.plain"
    first = open_encoder(word).content_hash
    assert first == open_encoder(word).content_hash
    # The same weights and facts, said by an argument.
    found = {first, open_encoder(f"{word},seed=0").content_hash}
    found.add(open_encoder(f"{word},seed=1").content_hash)
    found.add(open_encoder(f"{word},mpp=0.25").content_hash)
    assert len(found) == 4
    # The same weights by other code: the file is read again in another process.
    (hooks / "hooks_of_a_user.py").write_text(HOOK.replace(".mean(1)", ".amax(1)"))
    monkeypatch.delitem(sys.modules, "hooks_of_a_user")
    assert open_encoder(word).content_hash != first
    loud = open_encoder(word)
    with torch.no_grad():
        loud.network.norm.bias += 0.1  # type: ignore[union-attr, operator]
    assert loud.content_hash != open_encoder(word).content_hash


def test_random_weights_of_a_function(hooks: Path) -> None:
    encoder = open_encoder("python:hooks_of_a_user.both,seed=3")
    assert isinstance(encoder, ForeignEncoder)
    state = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    fresh, again = encoder.fresh(seed=1), encoder.fresh(seed=1)
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, state[key])
    drawn = fresh.network.state_dict()
    learnt = [k for k, v in state.items() if v.dim() > 1]
    assert len(learnt) == 11 and not any(torch.equal(drawn[k], state[k]) for k in learnt)
    # Nothing of the old weights is left to correlate with, and the scale stays.
    for key in learnt:
        a, b = drawn[key].flatten(), state[key].flatten()
        if key not in ("vit.cls_token",) and b.std() > 0:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2, key
    assert fresh.content_hash == again.content_hash != encoder.fresh(seed=2).content_hash
    assert fresh.patch_tokens is encoder.patch_tokens  # takes the network that it is given


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nowhere", "use python:MODULE.FUNCTION"),
        ("no_such_module.uni", "no module 'no_such_module' in .* or among the installed"),
        ("hooks_of_a_user.plane", "has no function 'plane'; it has .*plain"),
        ("hooks_of_a_user.plain,sede=1", "raises TypeError .*sede"),
        ("hooks_of_a_user.fails", r"raises NameError in line \d+ of .*hooks_of_a_user\.py"),
        (
            "hooks_of_a_user.vit",
            "gives VisionTransformer without network, image_size, mpp, mean, std",
        ),
        ("hooks_of_a_user.wrong,key=meam", "gives 'meam', which is not known"),
        ("hooks_of_a_user.wrong,key=mpp", "gives dict without mpp;"),
        ("hooks_of_a_user.wrong,key=mpp,value=-1", "mpp must be µm per pixel"),
        ("hooks_of_a_user.wrong,key=image_size,value=32.5", "image_size must be a whole number"),
        ("hooks_of_a_user.wrong,key=image_size,value=30", r"fails on float32 \[1, 3, 30, 30\]"),
        ("hooks_of_a_user.wrong,key=network,value=1", "network must be a torch.nn.Module"),
        ("hooks_of_a_user.wrong,key=network,network=map", r"gives \[1, 3, 32, 32\].*\[B, D\]"),
        ("hooks_of_a_user.wrong,key=network,network=linear", "fails on float32"),
        ("hooks_of_a_user.wrong,key=tokens,value=1", "tokens must be a function"),
        ("hooks_of_a_user.wrong,key=mean,value=0.5", "'mean' must be three numbers"),
        ("hooks_of_a_user.wrong,key=std,value=[51", "value of 'value' cannot be read"),
        ("broken_hook.uni", "importing broken_hook raises ZeroDivisionError"),
        ("needy_hook.uni", "needs 'conch_of_nobody', which is not installed"),
    ],
)
def test_functions_that_do_not_work(word: str, said: str, hooks: Path) -> None:
    (hooks / "broken_hook.py").write_text("1 / 0\n")
    (hooks / "needy_hook.py").write_text("import conch_of_nobody\n")
    with pytest.raises(UserError, match=said):
        open_encoder(f"python:{word}")


def test_statistics_of_0_to_255_are_refused(hooks: Path) -> None:
    (hooks / "bytes_hook.py").write_text(HOOK.replace("(0.7, 0.5, 0.7)", "(178, 127, 178)"))
    with pytest.raises(UserError, match="'mean' must be three numbers"):
        open_encoder("python:bytes_hook.plain")


def test_the_functions_of_the_docs_read_class_token_and_patches() -> None:
    """The gated weights are not here; how Virchow2's feature is read off its tokens is."""
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class Read" in b)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, reg_tokens=4, global_pool="", **SMALL
    ).eval()
    names["hub"] = lambda name, **arguments: vit
    given = names["virchow2"](mpp=0.25)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = vit.forward_features(images)  # class token, 4 registers, 16 patches
        wanted = torch.cat([tokens[:, 0], tokens[:, 5:].sum(1) / 16], 1)
        torch.testing.assert_close(given["network"](images), wanted)
        torch.testing.assert_close(given["tokens"](given["network"], images), tokens[:, 5:])
    assert given["mpp"] == 0.25 and names["h_optimus"](0)["name"] == "h_optimus_0"


def test_which_word_opens_what(tmp_path: Path) -> None:
    ours = open_encoder(str(small_encoder(tmp_path / "run" / "encoder")))
    assert open_encoder(str(tmp_path / "run")).content_hash == ours.content_hash
    torch.save(to_released(dense_network()), tmp_path / "muse.bin")
    assert open_encoder(str(tmp_path / "muse.bin")).kind == "muse"
    with pytest.raises(UserError, match=r"no such file or folder; use .*torchvision:NAME"):
        open_encoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="not an encoder folder"):
        open_encoder(str(tmp_path))
    with pytest.raises(UserError, match="opened by a python: function"):
        open_encoder("timm:hf-hub:MahmoodLab/UNI", HALF)


def test_positions_of_a_released_muse_file_as_published(tmp_path: Path) -> None:
    from lemon_muse.backbones.muse_weights import from_released

    stored = to_released(dense_network(seed=2))
    torch.save(stored, tmp_path / "vit.pth")
    word = str(tmp_path / "vit.pth")
    images = torch.randn(2, 3, 64, 64)
    plain, published = (from_released(stored, pos_resample=flag) for flag in (False, True))
    for words, name, wanted in (
        (Words(), "vit", plain),
        (Words(align="released"), "vit:pos_resample", published),
        (Words(pos_resample=True), "vit:pos_resample", published),
        (Words(align="released", pos_resample=False), "vit", plain),
    ):
        encoder = open_encoder(word, words)
        assert encoder.name == name
        with torch.inference_mode():
            torch.testing.assert_close(encoder.dense(images), wanted(images)[1])  # type: ignore[operator]
    table = "encoder.encoder.pos_embed"
    assert not torch.allclose(plain.state_dict()[table], published.state_dict()[table], atol=1e-3)
    hashes = {open_encoder(word, Words(pos_resample=on)).content_hash for on in (True, False)}
    assert len(hashes) == 2


def test_a_lemon_file_is_not_opened_as_a_timm_model(tmp_path: Path) -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    state = {f"module.base_encoder.{k}": v for k, v in vit.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "lemon.pth.tar")
    words = ",".join(f"{k}={v}" for k, v in SMALL.items())
    file = tmp_path / "lemon.pth.tar"
    with pytest.raises(UserError, match="12 heads; use encoder="):
        open_encoder(f"timm:vit_tiny_patch16_224,checkpoint_path={file},{words}", HALF)
