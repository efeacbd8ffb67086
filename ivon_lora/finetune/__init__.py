"""The main job: fine-tune a sequence classifier with LoRA, prune its ranks while it trains, and say how good it is."""
