"""Statistics of a backbone as it would be deployed, where that is not the max-pooled model on both sides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from headscale.deployment import deployment_of
from headscale.impacts import Rounded, impacts_of
from headscale.records import Deployed

if TYPE_CHECKING:
    from headscale.backbone import Backbone
    from headscale.evaluation import Setup
    from headscale.inspection import Texts


def measure_deployed(backbone: Backbone, texts: Texts, setup: Setup) -> Deployed:
    """Weights, scores and loss of one forward pass, with the pooling, query side and rounding that are asked for.

    Args:
        backbone: loaded; left as it was.
        texts: the pairs; `idf` makes its table of their documents.
        setup: pooling, activation, queries, roundings; its lengths are replaced by those of the texts.

    Returns:
        Means over all texts; the loss is InfoNCE over batches of as many candidates as `inspect` has.

    Raises:
        HeadscaleError: the checkpoint encodes in a way that is not known, or a table cannot be read.
    """
    from dataclasses import replace

    from headscale.collection import collection_of

    encoding = texts.encoding
    setup = replace(setup, query_length=encoding.query_length, document_length=encoding.document_length)
    collection = collection_of(texts.settings.source, texts.pairs)
    plan = deployment_of(backbone, collection, setup)
    documents = plan.encoder.encode(collection.documents, max_length=encoding.document_length)
    if plan.queries is None:
        queries = plan.encoder.encode(collection.queries, max_length=encoding.query_length)
    else:
        queries = _dense(plan.queries.encode(collection.queries, encoding.query_length))
    sides = [_sparse(queries), _sparse(documents)]
    impacts = []
    for rounding in plan.roundings:
        rounded = [Rounded(rounding.step(float(side.data.max(initial=0.0)))) for side in sides]
        for one, side in zip(rounded, sides, strict=True):
            one(side)
        impacts.append(impacts_of(rounding, *rounded))
    return Deployed(
        pooling=plan.encoder.pooling,
        activation=plan.encoder.activation,
        queries="model" if plan.queries is None else plan.queries.origin,
        active_dims_query=sides[0].nnz / len(queries),
        active_dims_document=sides[1].nnz / len(documents),
        active_weight_query=float(sides[0].data.mean()) if sides[0].nnz else 0.0,
        active_weight_document=float(sides[1].data.mean()) if sides[1].nnz else 0.0,
        impacts=tuple(impacts),
        **_scores(queries, documents, encoding.batch_size),
    )


def _scores(queries: Any, documents: Any, size: int) -> dict[str, float]:
    """Mean and sd of the scores inside batches, and their contrastive loss in units of ln N."""
    import torch

    from headscale.objective import info_nce

    size = min(size, len(queries))
    starts = range(0, len(queries) - size + 1, size)
    scores = [queries[i : i + size].double() @ documents[i : i + size].double().T for i in starts]
    joined = torch.cat([one.flatten() for one in scores])
    loss = torch.stack([info_nce(one) for one in scores]).mean()
    return {
        "score_mean": float(joined.mean()),
        "score_sd": float(joined.std()),
        "loss_over_ln_n": float(loss) / math.log(size) if size > 1 else math.nan,
    }


def _dense(vectors: Any) -> Any:
    import torch

    return torch.from_numpy(vectors.toarray())


def _sparse(reps: Any) -> Any:
    from scipy.sparse import csr_array

    return csr_array(reps.double().numpy())
