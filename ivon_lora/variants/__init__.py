"""Related methods of adapting LoRA, one file a paper, behind one protocol: see `variant`."""

from ivon_lora.variants.beam_lora import BeamLora
from ivon_lora.variants.cola import Cola
from ivon_lora.variants.diffora import Diffora
from ivon_lora.variants.flat_lora import FlatLora
from ivon_lora.variants.lora_pro import LoraPro
from ivon_lora.variants.rm_lora import RmLora
from ivon_lora.variants.sora import Sora
from ivon_lora.variants.variant import Variant
from ivon_lora.variants.xgblora import XgbLora

__all__ = ["METHODS", "Variant"]
__all__ += ["BeamLora", "Cola", "Diffora", "FlatLora", "LoraPro", "RmLora", "Sora", "XgbLora"]

#: the methods by the names that the command line knows
METHODS: dict[str, type[Variant]] = {
    "beamlora": BeamLora,
    "cola": Cola,
    "diffora": Diffora,
    "flat-lora": FlatLora,
    "lora-pro": LoraPro,
    "rm-lora": RmLora,
    "sora": Sora,
    "xgblora": XgbLora,
}
