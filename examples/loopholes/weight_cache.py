"""Weights of a trained base model on disk, with a checksum: what is read is what was written, or is trained again."""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8


def cache_folder() -> Path:
    """`gradroute-examples` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradroute-examples"


def read_weights(path: Path) -> dict[str, Tensor] | None:
    """The cached weights; None if there are none, or, with a warning, if they are not what was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
            if (file.metadata() or {}).get("checksum") == _checksum(weights):
                return weights
            reason = "its checksum differs"
    except (SafetensorError, OSError) as error:
        reason = str(error)
    warnings.warn(f"The cached base model {path} is corrupt ({reason}); training it again.", stacklevel=3)
    return None


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Save beside `path` and rename, so that no reader sees half a file; a cache that is read-only costs a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            save_file(
                {name: weight.contiguous() for name, weight in weights.items()},
                written,
                metadata={"checksum": _checksum(weights)},
            )
            written.replace(path)
    except OSError as error:
        warnings.warn(f"The base model could not be cached: {error}", stacklevel=3)


def _checksum(weights: dict[str, Tensor]) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().view(uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()
