"""The Hugging Face Trainer as it is: no subclass, ranks pruned from 8 to 2, and a plain LoRA adapter at the end."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from ivon_lora import export_lora
from ivon_lora.integrations.trainer import attach_trainer

torch.manual_seed(0)
data = [{"input_ids": ids, "labels": (ids[0] >= 10).long()} for ids in torch.randint(20, (512, 8))]
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = BertConfig(vocab_size=20, initializer_range=0.2, **sizes)
lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"])
model = get_peft_model(BertForSequenceClassification(config), lora)
schedule = {"learning_rate": 1e-2, "num_train_epochs": 8, "per_device_train_batch_size": 32}
args = TrainingArguments("runs/trainer", logging_steps=8, report_to="none", **schedule)
trainer = Trainer(model, args, train_dataset=data)
optimizer = attach_trainer(trainer, target_rank=2)  # rates and lengths are those of args; ranks appear in every log
trainer.train()
report = export_lora(model, optimizer, "runs/trainer/adapter")
print(f"largest rank {report.max_rank}, error of the export {report.max_abs_error:.1e}")
