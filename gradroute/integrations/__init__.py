"""gradroute inside the trainers of other packages: transformers' Trainer and TRL's GRPO."""
