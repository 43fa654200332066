"""`QuarantineLoraConfig`: PEFT's LoRA with a quarantine block in the same adapter.

    get_peft_model(model, QuarantineLoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

The peft type stays LORA, so everything in PEFT that knows LoRA knows this. PEFT builds its own layer for each target
and routing is mixed into it; the quarantine lives in the same adapter as `lora_A_quarantine`, `lora_B_quarantine`. Two
named adapters would not do: PEFT re-activates one of them after a reference pass, and the other stays frozen.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from peft import LoraConfig
from torch import Tensor, nn

from gradroute._checks import one_of, positive_integer
from gradroute._sharded_samples import evenly_spaced
from gradroute.adapters.layer import StopGradient
from gradroute.adapters.peft._private import inject_by
from gradroute.errors import FileFormatError, TargetError

FORMAT = 1
_SAMPLES = 4


@dataclass
class QuarantineLoraConfig(LoraConfig):
    """LoRA with y = W x + s_d B_d A_d x + m s_q B_q A_q x; every argument of `LoraConfig` that fits, and:

    Args:
        r_quarantine: rank of the quarantine; None means the rank of the deployed block of the same layer.
        stop_gradient: see `quarantine_lora`.
        quarantine_format, base_fingerprint: written by `save_pretrained`; not to be set.

    s_q follows `lora_alpha`, `alpha_pattern` and `use_rslora` as s_d does: lora_alpha / r_quarantine, or over its root.

    Raises:
        TargetError: an option that would change what the two blocks are, or train something else: DoRA and
            other LoRA variants, `lora_bias`, `bias`, `target_parameters`, `init_lora_weights` other than True or
            "gaussian".
    """

    layer_factory: ClassVar[Callable[..., nn.Module]]
    """PEFT calls it for each target. The package sets it, so that this file need not import the layers."""

    r_quarantine: int | None = field(default=None, metadata={"help": "Rank of the quarantine block; None means r."})
    stop_gradient: str = field(default="parameters", metadata={"help": '"parameters" (exact) or "branch".'})
    quarantine_format: int = field(default=FORMAT, metadata={"help": "Version of the checkpoint format."})
    base_fingerprint: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Some values of the base weights this was trained on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.check_options()
        self._base: dict[str, Any] = {}
        inject_by(self, type(self).layer_factory)

    def check_options(self) -> None:
        """Raise `TargetError` for an option that does not go with a quarantine, whenever it was set."""
        if self.r_quarantine is not None:
            positive_integer("r_quarantine", self.r_quarantine, TargetError)
        one_of("stop_gradient", self.stop_gradient, get_args(StopGradient), TargetError)
        if self.init_lora_weights not in (True, "gaussian"):
            raise TargetError(
                f'`init_lora_weights` should be True or "gaussian". Found {self.init_lora_weights!r}: it would change '
                "the base weights or start from a non-zero delta. Fix: oriented starts are in gradroute.adapters.init."
            )
        variants = [f.name for f in dataclasses.fields(self) if f.metadata.get("is_lora_variant")]
        refused = {**dict.fromkeys(variants, "only plain LoRA splits into two blocks"), **_REFUSED}
        for name, why in refused.items():
            value = getattr(self, name, None)
            if value and value != "none":
                raise TargetError(f"`{name}={value!r}` cannot be used with a quarantine: {why}. Fix: leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it, with the fingerprint of the base model that it was injected into."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        seen = {name: values for name, values in self._base.items() if values is not None}
        return {**fields, "base_fingerprint": seen if self._base else self.base_fingerprint}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "QuarantineLoraConfig":
        """PEFT's constructor from a file's fields; unlike PEFT it refuses fields that it does not know.

        Raises:
            FileFormatError: no quarantine in it, of a later format, or with a setting of a later version.
        """
        version = kwargs.get("quarantine_format")
        if version is None:
            raise FileFormatError(
                f"The adapter config should hold a quarantine. Found plain {kwargs.get('peft_type', 'PEFT')}. "
                "Fix: load it with peft.PeftModel.from_pretrained."
            )
        if version != FORMAT:
            raise FileFormatError(
                f"`quarantine_format` of the adapter config should be {FORMAT}. Found {version!r}: written by a later "
                "gradroute. Fix: upgrade gradroute."
            )
        kind = kwargs.get("peft_type")
        if str(getattr(kind, "value", kind)) != "LORA":
            raise FileFormatError(f"`peft_type` of the adapter config should be LORA. Found {kind!r}.")
        _check_fingerprint(kwargs.get("base_fingerprint", {}))
        known = {f.name for f in dataclasses.fields(cls)}
        # A later PEFT writes its new options into every config; they matter only where they are switched on.
        later = sorted(name for name, value in kwargs.items() if name not in known and value)
        if later:
            raise FileFormatError(f"The config sets {later}, which this peft does not know. Fix: upgrade peft.")
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    def check_base(self, name: str, weight: Tensor) -> None:
        """Remember some values of a base weight; compare them with those of the checkpoint if this was loaded from one.

        The same type must give the same values; another type (bf16 for float32) roughly the same.

        Raises:
            FileFormatError: the adapter was trained on another base model.
        """
        if not weight.is_floating_point() or weight.device.type == "meta":
            return
        samples, dtype = evenly_spaced({"weight": weight}, _SAMPLES)["weight"], str(weight.dtype).removeprefix("torch.")
        expected = self.base_fingerprint.get(name)
        if expected is not None:
            rtol, atol = (0.0, 0.0) if expected["dtype"] == dtype else (0.05, 1e-4)
            then, now = (torch.tensor(values, dtype=torch.float64) for values in (expected["values"], samples))
            if then.shape != now.shape or not torch.allclose(then, now, rtol=rtol, atol=atol):
                raise FileFormatError(
                    f"The adapter should be loaded onto the base model that it was trained on. Found another `{name}`: "
                    f"its first sampled value is {samples[0]:.4g} ({dtype}), not {expected['values'][0]:.4g} "
                    f"({expected['dtype']}). Fix: load the base model named in the adapter's card."
                )
        seen = {"dtype": dtype, "values": samples}
        # One config object in models of two bases: which of them a checkpoint belongs to cannot be told, so neither.
        self._base[name] = seen if self._base.get(name, seen) == seen else None


def _check_fingerprint(fingerprint: Any) -> None:
    for entry in fingerprint.values() if isinstance(fingerprint, dict) else [fingerprint]:
        values = entry.get("values") if isinstance(entry, dict) else None
        numbers = isinstance(values, list) and values and all(isinstance(v, int | float) for v in values)
        if not numbers or not isinstance(entry.get("dtype"), str):
            raise FileFormatError(
                f"`base_fingerprint` of the config should hold a dtype and values for each module. Found {entry!r}."
            )


def read_config(path: Path) -> QuarantineLoraConfig:
    """The config in the folder `path`.

    Raises:
        FileFormatError: there is none, it is no JSON, or not one of ours.
    """
    file = path / "adapter_config.json"
    try:
        json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"`{file}` should be the config of an adapter in JSON. Found: {error}.") from error
    try:
        config: QuarantineLoraConfig = QuarantineLoraConfig.from_pretrained(str(path))
    except FileFormatError as error:
        raise FileFormatError(f"`{file}`: {error}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise FileFormatError(f"`{file}` holds a setting that cannot be used: {error}") from error
    return config


_REFUSED = {
    "use_dora": "its magnitude rescales both blocks together, so neither can be ablated alone",
    "lora_bias": "the bias is a third part that no mask gates",
    "bias": "biases would be trained by every row, flagged ones too",
    "target_parameters": "experts packed into one parameter have no layer whose tokens could be masked",
    "trainable_token_indices": "these embeddings would be trained by every row, flagged ones too",
    "layer_replication": "replicated layers share one base weight",
    "megatron_config": "its layers are not nn.Linear",
    "use_qalora": "it pools the input before A",
}
