"""Load a checkpoint with both blocks, checked before anything is changed.

`model.save_pretrained(path)` of PEFT writes both blocks. PEFT's own `PeftModel.from_pretrained(base, path)` then loads
the deployed block alone; `load_quarantined(base, path)` loads both.

Trainers that shard load the base model on the first rank and let it send the values. On the others it is on the meta
device, where a checkpoint cannot be loaded and its config alone says what the model consists of: `inject_blocks`.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gradroute._protocol import RoutedLayer, check_module
from gradroute._transfers import check_not_offloaded
from gradroute.adapters.attach import replace_module
from gradroute.adapters.peft.config import QuarantineLoraConfig, read_config
from gradroute.adapters.peft.export import checked_folder
from gradroute.adapters.peft.plain_lora import PREFIX
from gradroute.errors import FileFormatError, TargetError


def load_quarantined(
    model: nn.Module, path: str | Path, *, adapter_name: str = "default", is_trainable: bool = True
) -> PeftModel:
    """Load both blocks from the folder that `save_pretrained` wrote, onto the base model they were trained on.

    Args:
        model: the base model, without adapters; it is wrapped in place as by `get_peft_model`.
        path: a local folder with adapter_config.json and adapter_model.safetensors.
        adapter_name: name of the adapter in the returned model.
        is_trainable: whether both blocks require gradients.

    Raises:
        FileFormatError: a file is missing, truncated, of a later version, or made for another model. The model is
            then as it was.
        TargetError: `model` has adapters already, is offloaded, or has no weights yet.
    """
    check_module(model)
    if any(isinstance(module, BaseTunerLayer | RoutedLayer) for module in model.modules()):
        raise TargetError(
            f"`model` should be a base model. Found adapters in a {type(model).__name__}. "
            "Fix: load the base model again, or model.load_adapter(path, adapter_name) into the adapter that is there."
        )
    folder = checked_folder(path)
    config = read_config(folder)
    tensors = _read_tensors(folder / "adapter_model.safetensors")
    _check_tensors(model, config, tensors, folder)
    config.inference_mode = not is_trainable
    # PEFT warns of another path; that it is the same base model has just been checked by its weights.
    config.base_model_name_or_path = None
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(model.__dict__)
    loaded = None
    try:
        # Injection draws initial values that are then overwritten: the caller's random state should not notice.
        with torch.random.fork_rng():
            # The blocks get the type they were saved in; PEFT would widen them to float32.
            widen = any(tensor.dtype == torch.float32 for tensor in tensors.values())
            loaded = get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=widen)
        expected = get_peft_model_state_dict(loaded, adapter_name=adapter_name, save_embedding_layers=False)
        missing = sorted(set(expected) - set(tensors))
        unexpected = sorted(set(tensors) - set(expected) - set(loaded.state_dict()))
        if missing or unexpected:
            raise FileFormatError(
                f"`{folder}` should hold the tensors that its config describes on this model. "
                f"Found {len(missing)} missing {missing[:2]} and {len(unexpected)} unknown {unexpected[:2]}."
            )
        set_peft_model_state_dict(loaded, dict(tensors), adapter_name=adapter_name)
    except BaseException as error:
        _undo(model, loaded, attributes)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        if isinstance(error, FileFormatError | TargetError) or not isinstance(error, Exception):
            raise
        raise FileFormatError(f"`{folder}` cannot be loaded onto a {type(model).__name__}: {error}") from error
    return loaded if is_trainable else loaded.eval()


def inject_blocks(model: nn.Module, config: QuarantineLoraConfig, path: str | Path | None = None) -> PeftModel:
    """`model` with both blocks in the type of its weights: new ones of `config`, or those saved in `path`.

    Args:
        model: the base model, on this rank maybe without values.
        config: of new blocks; r, r_quarantine and lora_alpha of saved ones have to be these.
        path: a folder that `save_pretrained` wrote.

    Raises:
        FileFormatError: saved blocks of another r, r_quarantine or lora_alpha, or see `load_quarantined`.
    """
    dtype = next(model.parameters()).dtype
    if path is None:
        injected: Any = get_peft_model(model, config)
    else:
        saved = read_config(Path(path))
        expected, found = ((c.r, c.r_quarantine or c.r, c.lora_alpha) for c in (config, saved))
        if found != expected:
            raise FileFormatError(
                f"`{path}` should hold blocks of (r, r_quarantine, lora_alpha) = {expected}, as configured. Found "
                f"{found}. Fix: the settings that they were trained with."
            )
        saved.inference_mode = False  # a saved config says True, and its blocks would be frozen on this rank alone
        without_values = any(parameter.is_meta for parameter in model.parameters())
        injected = get_peft_model(model, saved) if without_values else load_quarantined(model, path)
    for parameter in injected.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    wrapped: PeftModel = injected
    return wrapped


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise FileFormatError(f"`{file}` should be a safetensors file. Found: {error}.") from error
    # PEFT adds the base weight of a targeted head or embedding, merged if it was saved so: the base model has it.
    tensors = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileFormatError(f"`{file}`: `{name}` should be finite. Found inf or nan.")
    return tensors


def _check_tensors(model: nn.Module, config: QuarantineLoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every matrix fits its module, every module has four, and the base weights are those of the training."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module_name, found, matrix = name.removeprefix(PREFIX).partition(".lora_")
        if found:
            modules.setdefault(module_name, {})["lora_" + matrix.removesuffix(".weight")] = tensor
    if not any("lora_A_quarantine" in matrices for matrices in modules.values()):
        raise FileFormatError(f"`{folder}` should hold a quarantine block. Found none among {len(tensors)} tensors.")
    for name, matrices in modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise FileFormatError(
                f"`{folder}` was made for a model with a module `{name}`. Found none in this {type(model).__name__}."
            ) from error
        needed = {"lora_A", "lora_B", "lora_A_quarantine", "lora_B_quarantine"}
        if set(matrices) != needed:
            raise FileFormatError(f"`{folder}`: `{name}` should have {sorted(needed)}. Found {sorted(matrices)}.")
        d_in, d_out = _widths(module)
        for block in ("", "_quarantine"):
            A, B = matrices[f"lora_A{block}"], matrices[f"lora_B{block}"]
            if not (A.is_floating_point() and B.is_floating_point()):
                raise FileFormatError(
                    f"`{folder}`: `{name}.lora_A{block}` and B should be floating point. Found {A.dtype} and {B.dtype}."
                )
            fit = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
            if not fit or (d_in is not None and (A.shape[1], B.shape[0]) != (d_in, d_out)):
                raise FileFormatError(
                    f"`{folder}`: the blocks of `{name}` should be A (r, {d_in}) and B ({d_out}, r). "
                    f"Found lora_A{block} {tuple(A.shape)} and lora_B{block} {tuple(B.shape)}."
                )
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            check_not_offloaded(name, module)
            if weight.is_meta:
                raise TargetError(f"`{name}` has no values: it is on the meta device. Fix: load the base model first.")
            config.check_base(name, weight)


def _widths(module: nn.Module) -> tuple[int | None, int | None]:
    """(d_in, d_out) of a linear or of transformers' Conv1D."""
    linear: Any = module
    if hasattr(module, "in_features"):
        return int(linear.in_features), int(linear.out_features)
    weight = getattr(module, "weight", None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim == 2 else (None, None)


def _undo(model: nn.Module, loaded: Any, attributes: Mapping[str, Any]) -> None:
    """Put the base modules back where the injection replaced them, and the model's own attributes."""
    if loaded is not None:
        loaded.unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            replace_module(model, name, module.get_base_layer())
    for name in set(model.__dict__) - set(attributes):
        with suppress(AttributeError):
            delattr(model, name)
