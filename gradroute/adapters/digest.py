"""Which weights does a card speak of? A hash of the deployed block, and where a card keeps it."""

import hashlib
import re

import torch
from torch import nn

from gradroute.protocol import routed_layers

CARD_KEY = "deployed_sha256"


def deployed_hash(model: nn.Module) -> str:
    """SHA-256 over shapes, types, bytes and scalings of the deployed blocks, in module order.

    Names are not in it: the same blocks have one hash attached, in PEFT's wrapper, and compiled.
    """
    digest = hashlib.sha256()
    for layer in routed_layers(model).values():
        A, B, scaling = layer.deployed
        for matrix in (A, B):
            values = matrix.detach().cpu().contiguous()
            digest.update(f"{tuple(values.shape)} {values.dtype} {float(scaling)!r} ".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_in_card(text: str) -> str | None:
    """The hash in a card's front matter; None in a text that `write_card` did not write."""
    found = re.search(rf"^{CARD_KEY}: ([0-9a-f]{{64}})$", text, flags=re.MULTILINE)
    return None if found is None else found[1]
