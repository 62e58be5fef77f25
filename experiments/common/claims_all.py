"""Every claim that the report holds results against, in the order of its sections."""

from __future__ import annotations

from experiments.common import (
    claims_adapters,
    claims_dimension,
    claims_dylora,
    claims_formats,
    claims_in_context,
    claims_longlora,
    claims_lora,
    claims_lora_plus,
    claims_memory,
    claims_methods,
    claims_prompts,
    claims_qlora,
)
from experiments.common.claims import Claim


def every() -> tuple[Claim, ...]:
    """All claims."""
    modules = (
        claims_dimension,
        claims_prompts,
        claims_adapters,
        claims_lora,
        claims_lora_plus,
        claims_dylora,
        claims_qlora,
        claims_longlora,
        claims_in_context,
        claims_formats,
        claims_memory,
        claims_methods,
    )
    return tuple(claim for module in modules for claim in module.claims())
