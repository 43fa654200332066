"""Rollouts from vLLM in both views: one engine holds the model's blocks as two LoRA adapters.

`EngineViews` syncs an engine in this process, `ServerViews` a server; both say which adapter each row takes.
"""

from gradroute.integrations.vllm.in_process import EngineViews
from gradroute.integrations.vllm.options import lora_options
from gradroute.integrations.vllm.server import ServerViews

__all__ = ["EngineViews", "ServerViews", "lora_options"]
