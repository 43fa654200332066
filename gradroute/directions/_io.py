"""The file of `Directions`: safetensors with one tensor per kind and module, and a JSON header.

rows/<module>  hack/<module>  clean/<module>  [centre/<module>  scale/<module>]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradroute.errors import FileFormatError

_FORMAT = "gradroute-directions-2"

Groups = Mapping[str, Mapping[str, Tensor]]


def write_directions(path: str | Path, groups: Groups, header: Mapping[str, Any]) -> None:
    """Write groups of tensors by module, and what `header` says."""
    tensors = {
        f"{kind}/{name}": values.detach().cpu().contiguous().clone()
        for kind, group in groups.items()
        for name, values in group.items()
    }
    modules = {kind: list(group) for kind, group in groups.items()}
    content = json.dumps({"format": _FORMAT, "groups": modules, **header})
    save_file(tensors, str(path), metadata={"gradroute": content})


def read_directions(path: Path) -> dict[str, Any]:
    """The groups of tensors by their names, and the entries of the header by theirs.

    Raises:
        FileFormatError: the file is truncated, or of another format or version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`path` should be a directions file. Found nothing at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("gradroute", "{}"))
            if header.get("format") != _FORMAT:
                raise FileFormatError(
                    f"{path}: expected the format {_FORMAT}. Found {header.get('format')!r}. "
                    "Fix: read it with the version of gradroute that wrote it, or extract again."
                )
            fields: dict[str, Any] = {
                kind: {name: file.get_tensor(f"{kind}/{name}") for name in names}
                for kind, names in header["groups"].items()
            }
            fields |= {name: header[name] for name in ("provenance", "version", "step")}
            fields["heldout"] = tuple(header["heldout"])
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise incomplete(path, error) from error
    return fields


def incomplete(path: str | Path, error: Exception) -> FileFormatError:
    """The error for a file that lacks something."""
    return FileFormatError(f"{path}: expected a complete directions file ({error}). Is it truncated?")
