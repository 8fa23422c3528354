"""How names and numbers of the result files read on the page."""

import math
import re

TIMES, DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"

METRIC_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "weighted_f1": "weighted F1",
    "pearson": "Pearson's r",
}
_FLOORS = {
    "floor:majority": "majority class",
    "floor:colour": "colour statistics",
    "floor:histogram": "colour histogram",
    "floor:pixel_pca": "PCA of raw pixels",
}
_PROBES = {
    "knn": "KNN",
    "logistic": "Logistic regression",
    "linear": "Linear probe",
    "ridge": "Ridge regression",
    "uni": "UNI's probe",
    "finetune": "Fine-tuning",
}


def encoder_words(name: str, *, window: bool = True) -> str:
    """'floor:histogram@40px0.25' -> 'colour histogram (40 px, 0.25 µm/px)'; encoders stay as is.

    With `window=False` the part in brackets is left out.
    """
    base, _, suffix = name.partition("@")
    suffix = suffix if window else ""
    if base.startswith("random:"):
        words = f"randomly initialised {base.removeprefix('random:')}"
    elif base.startswith("floor:"):
        words = _FLOORS.get(base, base.removeprefix("floor:").replace("_", " "))
    else:
        return name
    size = re.fullmatch(r"(\d+)px(\d*\.?\d+)", suffix)
    if size:
        return f"{words} ({size[1]} px, {size[2]} µm/px)"
    return f"{words} ({suffix})" if suffix else words


def named(words: str) -> str:
    """With its article, where a sentence needs one."""
    return f"the {words}" if words.startswith(("colour histogram", "majority class")) else words


def probe_words(probe: str, *, inside: bool = False) -> str:
    """'knn' -> 'KNN', 'linear' -> 'Linear probe' ('the linear probe' inside a sentence)."""
    if inside:
        if probe == "linear":
            return "the linear probe"
        common = probe in ("logistic", "ridge", "finetune")
        return probe_words(probe).lower() if common else probe_words(probe)
    return _PROBES.get(probe, probe)


def metric_words(metric: str) -> str:
    """'f1/tumour' -> 'F1, tumour'; 'auroc/origin=A' -> 'AUROC, origin=A'."""
    base, _, part = metric.partition("/")
    if part and (base == "f1" or base in METRIC_NAMES):
        return f"{METRIC_NAMES.get(base, 'F1')}, {part}"
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def number(value: float, digits: int = 3) -> str:
    """0.6123 -> '0.612'; a dash where there is no number."""
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def signed(value: float, digits: int = 3) -> str:
    """Like `number` with its sign, and a true minus."""
    if not math.isfinite(value):
        return DASH
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def interval(low: float, high: float, *, sign: bool = False) -> str:
    """'[0.58, 0.64]', or nothing where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    show = signed if sign else number
    return f"[{show(low)}, {show(high)}]"


def listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
