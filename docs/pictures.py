"""Draw the pictures of `numbers.md`: each statistic on the bundled reference (good) and the failing backbone (bad).

    python docs/pictures.py docs/pictures

Everything is measured here and now, on 64 built-in pairs at the demo's lengths, before any training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headscale import Encoding, inspect
from headscale.backbone import load_backbone
from headscale.demo import DOCUMENT_LENGTH, FAILING, QUERY_LENGTH, REFERENCE
from headscale.encoder import SpladeEncoder
from headscale.figures import save
from headscale.head import load_head
from headscale.records import ROW_NORM_QUANTILES, Inspection
from headscale.texts import Pair, builtin_pairs
from headscale.trials import PACKAGES

COUNT = 64
GOOD, BAD = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
Reps = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """One backbone: its representations, (texts, vocab), and its inspection."""

    name: str
    queries: Reps
    documents: Reps
    found: Inspection

    @property
    def scores(self) -> Reps:
        """Every query with every document, (queries, documents)."""
        return self.queries @ self.documents.T

    @property
    def cosines(self) -> Reps:
        """Between documents."""
        unit = self.documents / np.maximum(np.linalg.norm(self.documents, axis=1, keepdims=True), 1e-9)
        return unit @ unit.T


def see(name: str, pairs: list[Pair]) -> Seen:
    """Encode and inspect a bundled backbone."""
    backbone = load_backbone(name)
    encoder = SpladeEncoder(load_head(backbone.model), backbone.tokenizer)
    found = inspect(backbone.model, backbone.tokenizer, pairs=pairs, encoding=Encoding(QUERY_LENGTH, DOCUMENT_LENGTH))
    queries = encoder.encode([p.query for p in pairs], max_length=QUERY_LENGTH).numpy()
    documents = encoder.encode([p.document for p in pairs], max_length=DOCUMENT_LENGTH).numpy()
    return Seen(name.removeprefix("bundled:"), queries, documents, found)


# --- one function a statistic: it draws one backbone into one panel ----------------------------------------------


def scores(axes: Axes, seen: Seen, colour: str) -> str:
    """What the loss sees of a batch of 32: every query's softmax over the documents."""
    batch = seen.scores[:32, :32].astype(np.float64)
    shares = np.exp(batch - batch.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap="cividis", aspect="equal", vmin=0.0, vmax=1.0)
    axes.set_xlabel("document (light: all of the softmax)")
    axes.set_ylabel("query")
    winners = len(set(np.argmax(batch, axis=1).tolist()))
    return f"{winners} of 32 documents win any query; the softmax gives its first {shares.max(axis=1).mean():.0%}"


def cosine(axes: Axes, seen: Seen, colour: str) -> str:
    """Cosines between different documents."""
    off = seen.cosines[~np.eye(COUNT, dtype=bool)]
    axes.hist(off, bins=np.linspace(0, 1, 41).tolist(), color=colour)
    axes.set_xlabel("cosine of two different documents")
    axes.set_ylabel("pairs")
    return f"mean {off.mean():.2f}"


def active_dims(axes: Axes, seen: Seen, colour: str) -> str:
    """Terms above zero per document."""
    active = (seen.documents > 0).sum(axis=1)
    axes.hist(active, bins=np.linspace(0, seen.documents.shape[1], 41).tolist(), color=colour)
    axes.set_xlabel(f"active dims of a document, of {seen.documents.shape[1]:,}")
    axes.set_ylabel("documents")
    return f"mean {active.mean():,.0f}"


def weights(axes: Axes, seen: Seen, colour: str) -> str:
    """Weights above zero."""
    active = seen.documents[seen.documents > 0]
    axes.hist(active, bins=np.linspace(0, 3.5, 41).tolist(), color=colour, density=True)
    axes.set_xlabel("weight of an active term, log1p(logit)")
    axes.set_ylabel("density")
    return f"mean {active.mean():.2f}, largest {active.max():.2f}"


def spread(axes: Axes, seen: Seen, colour: str) -> str:
    """Scores of queries with documents that are not theirs, around their mean."""
    off = seen.scores[~np.eye(COUNT, dtype=bool)]
    axes.hist(off, bins=40, color=colour)
    axes.set_xlabel("score, unnormalized dot product")
    axes.set_ylabel("pairs")
    return f"sd {off.std():,.1f}; fp16 ends at 65,504"


def constant(axes: Axes, seen: Seen, colour: str) -> str:
    """Loss at step 0 over ln N against the constant."""
    curve, output = seen.found.curve, seen.found.output
    assert curve is not None
    assert output is not None
    axes.plot(curve.scale, curve.loss_over_ln_n, color=colour, linewidth=1.8)
    axes.plot([1], [output.loss_over_ln_n], "o", color=colour)
    axes.axhline(1.0, color="#777777", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.3, 1e4)
    axes.set_xlabel("constant on the logits")
    axes.set_ylabel("loss at step 0 / ln N (dashed: chance)")
    return f"untouched (dot): {output.loss_over_ln_n:.3g} x ln {output.candidates}"


def row_norms(axes: Axes, seen: Seen, colour: str) -> str:
    """Norms of the head's rows, by their share."""
    found = seen.found.weights
    axes.plot(found.row_norm_quantiles, ROW_NORM_QUANTILES, color=colour, linewidth=1.8)
    axes.set_xlim(0, 2.0)
    axes.set_xlabel("norm of a row of W")
    axes.set_ylabel("rows below [%]")
    return f"mean {found.row_norm_mean:.2f}, Frobenius norm of W {found.frobenius:.1f}"


def positions(axes: Axes, seen: Seen, colour: str) -> str:
    """Where in the text the winning positions are, as shares of the pooled mass."""
    output = seen.found.output
    assert output is not None
    axes.bar(np.arange(10) + 0.5, output.document.position_histogram, width=0.9, color=colour)
    axes.set_xlabel("tenth of the document")
    axes.set_ylabel("share of the pooled mass")
    axes.set_ylim(0, 0.6)
    return f"special tokens win {output.document.special_share:.1%}"


Panel = Callable[[Axes, Seen, str], str]
PICTURES: tuple[Panel, ...] = (scores, spread, cosine, active_dims, weights, constant, row_norms, positions)


def picture(draw: Panel, good: Seen, bad: Seen) -> Figure:
    """Both backbones side by side, each under its name and its number."""
    figure = Figure(figsize=(8.0, 3.1), layout="constrained")
    for axes, seen, colour in zip(figure.subplots(1, 2), (good, bad), (GOOD, BAD), strict=True):
        number = draw(axes, seen, colour)
        kind = "good" if seen is good else "bad"
        axes.set_title(f"{kind}: {seen.name}\n{number}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_all(folder: Path) -> None:
    """Every picture as SVG."""
    pairs = builtin_pairs("dev", packages=PACKAGES)[:COUNT]
    good, bad = (see(name, pairs) for name in (REFERENCE, FAILING))
    for draw in PICTURES:
        save(picture(draw, good, bad), folder / f"{draw.__name__}.svg")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
