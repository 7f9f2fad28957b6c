"""What models with memory built in do with a batch before their layers: which tokens are real, and whose they are."""

from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..memory import MemoryCache, MemoryLayer
from ..memory.layout import Layout
from ..memory.real_tokens import AfterEnd, document_starts, real_tokens


Memory = TypeVar("Memory", bound=MemoryLayer)


def find_layout(
    tokens: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    config: PreTrainedConfig,
    given: dict[str, Any],
) -> Layout:
    """How the columns of a pass become streams, one for every memory.

    Args:
        tokens: Ids [B, T] or embeddings [B, T, D].
        attention_mask, position_ids, given: What the decoder was given.
        cache: Where memory comes from; None for a pass that begins and ends with an empty one.

    Raises:
        ValueError: for packed documents with a cache, and for a memory of another number of rows.
    """
    batch = tokens.shape[0]
    if cache is None:
        document = documents(tokens, attention_mask, position_ids, given)
        if document is not None:
            return Layout.packed(document)
    else:
        for layer in cache.layers:
            if isinstance(layer, MemoryLayer):
                layer.check_rows(batch)
    past, positions = (0, None) if cache is None else (cache.get_seq_length(), position_ids)
    real, is_whole = real_tokens(tokens, attention_mask, positions, given, past)
    after_end = AfterEnd.of(config)
    if isinstance(cache, MemoryCache) and tokens.dim() == 2 and after_end.fillers:
        return Layout.of(real & ~after_end.among(tokens, cache.recent_decoded))
    return Layout(None, real, real) if is_whole else Layout.of(real)


def memory_of(cache: Cache | None, layer_idx: int, kind: type[Memory]) -> Memory | None:
    """The memory of a layer, None without a cache; ValueError for a cache that has none of this kind there."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, kind):
        raise ValueError(
            f"This cache has no memory for layer {layer_idx}. Make it with senri_hf.MemoryCache.for_model(model) or "
            "DynamicCache(config=model.config)"
        )
    return layer


def documents(tokens: Tensor, attention_mask: Any, position_ids: Tensor | None, given: dict[str, Any]) -> Tensor | None:
    """[B, T] which document of its row a token belongs to, from 0; None where there is one in every row.

    Said by `seq_idx`, by `cu_seq_lens_q`, or by positions that begin again where no mask is given.
    """
    batch, length = tokens.shape[:2]
    if given.get("seq_idx") is not None:
        number = given["seq_idx"].to(tokens.device).long().expand(batch, length)
        return number if bool((number != number[:, :1]).any()) else None
    starts = document_starts(tokens, attention_mask, position_ids, given)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    return starts.cumsum(1) - 1
