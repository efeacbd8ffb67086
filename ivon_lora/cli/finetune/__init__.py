"""`ivon-lora finetune`: a text classifier on the Hugging Face Trainer, from data to adapter and report.

`train.py` is the place to start reading: everything that a script of your own needs is called there.
"""
