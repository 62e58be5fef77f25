"""LongLoRA's transform: low-rank updates with the embeddings and norms trained as they are."""

from __future__ import annotations

from jpeft.lora import LoRA
from jpeft.transform import Chain, Train, chain


def longlora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = r"self_attn/[qkvo]_proj/kernel$",
    embeddings: str = r"embed_tokens/embedding$",
    norms: str = r"norm/scale$",
) -> Chain:
    """LoRA on all four projections of the attention, beside embeddings and norms.

    Without these two, low-rank updates do not reach full fine-tuning's perplexity on longer texts
    than the model was trained on. The defaults are the paths of `jpeft.models.llama`, which has
    the shifted sparse attention that goes with it (`shifted`).

    Source: Chen et al. 2024, section 3.3.
    """
    return chain(LoRA(rank, alpha, targets), Train((embeddings, norms)))
