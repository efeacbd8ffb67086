"""What `ivon-lora finetune` and `ivon-lora sft` have in common."""
