"""TRL's SFTTrainer as it is, on a causal language model."""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ivon_lora.integrations.trainer import attach_trainer

torch.manual_seed(0)
words = ["<pad>", "<eos>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
words_to_ids = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="<eos>")
data = Dataset.from_dict({"text": [" ".join(words[2 + i % 7 : 6 + i % 7]) for i in range(512)]})  # counting
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
args = SFTConfig("runs/sft", learning_rate=1e-2, num_train_epochs=4, logging_steps=8, report_to="none", bf16=False)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
attach_trainer(trainer, target_rank=4)
trainer.train()
