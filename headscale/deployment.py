"""What is deployed: pooling, activation, the query side and whole numbers, from options or from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale.encoder import ACTIVATIONS, POOLINGS, SpladeEncoder, check_pooling
from headscale.errors import UnsupportedHeadError, UsageError
from headscale.files import LocalFiles, load_json, model_folder
from headscale.idf import IdfQueries, idf_of, read_idf
from headscale.impacts import Rounding, roundings

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.collection import Collection
    from headscale.evaluation import Setup
    from headscale.records import Impacts

IDF = "idf"
_ELSEWHERE = "evaluate it with sentence-transformers' SparseInformationRetrievalEvaluator"


@dataclass(frozen=True)
class Declared:
    """How a checkpoint encodes; None where it does not say.

    Args:
        pooling: over positions.
        activation: inside log1p.
        table: of inference-free queries: a file that `headscale.idf.read_idf` reads.
    """

    pooling: str | None = None
    activation: str | None = None
    table: Path | None = None


def declared(backbone: Backbone) -> Declared:
    """Read a checkpoint's SpladePooling, and the table of a Router's query side.

    Raises:
        UnsupportedHeadError: it encodes in a way that evaluation does not know.
    """
    found = _modules(backbone.directory)
    if found is None:
        return Declared()
    root, modules = found
    kinds = {_kind(module.get("type")): str(module.get("path", "")) for module in modules}
    if "Router" in kinds:
        return _routed(backbone.name, root / kinds["Router"])
    return _pooled(backbone.name, root / kinds["SpladePooling"]) if "SpladePooling" in kinds else Declared()


# --- with the options ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """How a model and a collection are going to be searched.

    Args:
        encoder: of documents, and of queries unless a table stands for it.
        queries: that table.
        roundings: of the weights, beside the weights as they are.
        setup: lengths as used.
        scale: the constant that `headscale.json` says is in the weights.
    """

    encoder: SpladeEncoder
    queries: IdfQueries | None
    roundings: tuple[Rounding, ...]
    setup: Setup
    scale: float | None


def deployment_of(backbone: Backbone, collection: Collection, setup: Setup) -> Deployment:
    """What the options say, else the checkpoint, else max, relu and the model for queries.

    Args:
        backbone: the model.
        collection: whose documents make the table of `idf`.
        setup: the options; its lengths are those that the model takes.

    Raises:
        HeadscaleError: the checkpoint encodes in a way that evaluation does not know, or a table cannot be read.
    """
    said = declared(backbone)
    encoder = SpladeEncoder(
        backbone.loaded, backbone.tokenizer, mask_special_tokens=setup.mask_special_tokens,
        pooling=setup.pooling or said.pooling or "max", activation=setup.activation or said.activation or "relu",
    )  # fmt: skip
    queries = _query_table(backbone, collection, setup, said.table)
    return Deployment(encoder, queries, roundings(",".join(setup.quantize)), setup, _constant(backbone))


def _query_table(backbone: Backbone, collection: Collection, setup: Setup, own: Path | None) -> IdfQueries | None:
    """What stands for the model on the query side; None: the model itself."""
    wanted = setup.queries or ("model" if own is None else f"{IDF}:{own}")
    tokenizer, terms = backbone.tokenizer, backbone.loaded.vocab_size
    if wanted == IDF:
        return idf_of(tokenizer, collection.documents, terms, max_length=setup.document_length)
    return read_idf(Path(wanted.removeprefix(f"{IDF}:")), tokenizer, terms) if wanted != "model" else None


def check_options(pooling: str | None, activation: str | None, wanted: str | None) -> None:
    """Refuse what options cannot mean, before anything is loaded.

    Raises:
        UsageError: an unknown pooling or activation, or queries that are neither `model`, `idf` nor `idf:FILE`.
    """
    check_pooling(pooling or "max", activation or "relu")
    file = (wanted or "").startswith(f"{IDF}:") and wanted != f"{IDF}:"
    if not file and wanted not in (None, "model", IDF):
        raise UsageError(f"`--queries {wanted}` is none of model, idf, idf:FILE", "see `headscale evaluate --help`")


def _constant(backbone: Backbone) -> float | None:
    file = None if backbone.directory is None else backbone.directory / "headscale.json"
    content = load_json(file, str(file)) if file is not None and file.is_file() else {}
    scale = content.get("scale") if isinstance(content, dict) else None
    return scale if isinstance(scale, int | float) and scale != 1 else None


def interactions(plan: Deployment, impacts: Sequence[Impacts | None]) -> list[str]:
    """Where what is deployed changes what a constant in the weights does, in sentences.

    Args:
        plan: what is deployed.
        impacts: of the roundings.
    """
    return remarks(plan.encoder.pooling, plan.queries is not None, impacts, scale=plan.scale)


def remarks(
    pooling: str, inference_free: bool, impacts: Sequence[Impacts | None], *, scale: float | None = None
) -> list[str]:
    """`interactions` from its parts; `scale` is the constant in the weights, where it is known."""
    said = []
    if pooling == "sum":
        said.append(
            "sum pooling: a constant keeps which terms are active, but what it does to their weights depends on every"
            " position, and `calibrate` measures the max: choose by `trial` and `evaluate`"
        )
    if inference_free:
        said.append(
            "inference-free queries: scores are linear in the documents' weights, so a constant changes the score scale"
            " once, not twice, and no query weight"
        )
    scaled = "a constant below 1" if scale is None else f"the constant {scale:.4g} in this checkpoint"
    for lost in impacts:
        if lost is None or lost.word == "kept":
            continue
        how = f"{lost.lost_document:.1%} of the documents' weights and {lost.lost_query:.1%} of the queries' became 0"
        texts = f", and {lost.emptied} texts have none left" if lost.emptied else ""
        absolute = lost.rounding == "x100"
        why = "; the step is a share of the largest weight: a constant tells only through the bend of log1p"
        if absolute:
            why = f": what is below 0.005 is gone, and {scaled} makes every weight smaller"
        said.append(f"{lost.rounding}{'' if absolute else ' bit'}: {lost.word}: {how}{texts}{why}")
    return said


# --- a checkpoint's own files -------------------------------------------------------------------------------------


def _kind(name: Any) -> str:
    return str(name or "").rpartition(".")[2]


def _routed(name: str, folder: Path) -> Declared:
    """A router whose queries are a table, and whose documents are pooled."""
    config = load_json(folder / "router_config.json", str(folder / "router_config.json"))
    kinds = {key: _kind(value) for key, value in config.get("types", {}).items()}
    structure = config.get("structure", {})
    query, document = structure.get("query", []), structure.get("document", [])
    if [kinds.get(key) for key in query] != ["SparseStaticEmbedding"]:
        shown = " and ".join(kinds.get(key, key) for key in query) or "nothing"
        raise UnsupportedHeadError(f"`{name}` encodes queries by {shown}, which evaluation does not know", _ELSEWHERE)
    pooling = next((key for key in document if kinds.get(key) == "SpladePooling"), None)
    found = Declared() if pooling is None else _pooled(name, folder / pooling)
    return Declared(found.pooling, found.activation, _table(name, folder / query[0]))


def _table(name: str, folder: Path) -> Path:
    config = (
        load_json(folder / "config.json", str(folder / "config.json")) if (folder / "config.json").is_file() else {}
    )
    candidates = [folder / str(config.get("path") or "idf.json"), folder / "model.safetensors"]
    table = next((file for file in candidates if file.is_file()), None)
    if table is None:
        raise UnsupportedHeadError(
            f"`{name}` has no table of query weights that can be read", f"pass `--queries idf:FILE`, or {_ELSEWHERE}"
        )
    return table


def _pooled(name: str, folder: Path) -> Declared:
    file = folder / "config.json"
    config = load_json(file, str(file)) if file.is_file() else {}
    pooling, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if pooling not in POOLINGS or activation not in ACTIVATIONS:
        raise UnsupportedHeadError(
            f"`{name}` pools by `{pooling}` after `{activation}`, which evaluation does not know", _ELSEWHERE
        )
    return Declared(pooling, activation)


def _modules(directory: Path | None) -> tuple[Path, list[dict[str, Any]]] | None:
    """The root and the modules of the sentence-transformers checkpoint that a model's folder belongs to."""
    if directory is None:
        return None
    for root in (directory, *directory.parents[:2]):
        if (root / "modules.json").is_file() and root / model_folder(LocalFiles(root)) == directory:
            return root, load_json(root / "modules.json", str(root / "modules.json"))
    return None
