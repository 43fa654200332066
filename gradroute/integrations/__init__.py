"""gradroute inside other people's training: transformers' Trainer and TRL's GRPO."""
