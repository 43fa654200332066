"""GRPO of SmolLM2-135M-Instruct on lenient graders: environment, base model, rollouts, training, report."""
