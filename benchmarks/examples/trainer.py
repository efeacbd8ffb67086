"""The Hugging Face Trainer as it is: no subclass, ranks pruned from 8 to 2, and a plain LoRA adapter at the end."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from ivon_lora import export_lora
from ivon_lora.integrations.trainer import IVONFactory, watch

torch.manual_seed(0)
data = [{"input_ids": ids, "labels": (ids[0] >= 50).long()} for ids in torch.randint(100, (256, 8))]
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"])
model = get_peft_model(BertForSequenceClassification(config), lora)
args = TrainingArguments("runs/trainer", learning_rate=1e-2, num_train_epochs=8, logging_steps=32, report_to="none")
options = {"args": args, "num_examples": len(data), "target_rank": 2}
trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(IVONFactory, options))
watch(trainer)  # optional: ranks and signal-to-noise in every log
trainer.train()
report = export_lora(model, trainer.optimizer, "runs/trainer/adapter")
print(f"largest rank {report.max_rank}, error of the export {report.max_abs_error:.1e}")
