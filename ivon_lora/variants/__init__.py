"""Related methods of adapting LoRA, one file a paper, behind one protocol: see `variant`."""

from ivon_lora.variants.sora import Sora
from ivon_lora.variants.variant import Variant

#: the methods by the names that the command line knows
METHODS: dict[str, type[Variant]] = {
    "sora": Sora,
}

__all__ = ["METHODS", "Sora", "Variant"]
