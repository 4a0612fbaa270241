"""Text in, a draft checkpoint out: documents, tokenizer, losses, pre-training, fine-tuning and distillation."""
