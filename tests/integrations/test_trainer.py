"""transformers' `Trainer` with routed steps: resumed from a checkpoint it is bit-identical to a run without a break."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import randomize_blocks
from support.peft_cases import Case, assert_same_tensors, tensors_of, unnamed_base
from support.tiny_models import VOCAB
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [
    pytest.mark.touches_peft,
    unnamed_base,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning"),
]
STEPS, SAVED_AT, BATCH = 6, 3, 4
CASES = {
    "llama": Case("llama"),
    "dropout": Case("llama", options={"lora_dropout": 0.1}),
    "modules_to_save": Case("llama", options={"modules_to_save": ["lm_head"]}),
    "bf16, float32 blocks": Case("llama", torch.bfloat16, autocast_adapter_dtype=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Rollouts(Dataset):
    """Random tokens; every item says which zone its row belongs to."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids, "zones": torch.randint(3, (), generator=generator)}


class RoutedTrainer(Trainer):
    """Routes every batch by its own zones."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        mask = gr.RouteMask.zones(inputs.pop("zones"))
        self.masks = [*getattr(self, "masks", []), mask]
        with gr.route(model, mask):
            return super().training_step(model, inputs, *args, **kwargs)


def fresh(case: Case) -> nn.Module:
    """As a run starts: A drawn, B = 0."""
    torch.manual_seed(0)
    return get_peft_model(case.base(), case.config(), autocast_adapter_dtype=case.autocast_adapter_dtype)


def trainer(model: nn.Module, folder: Path, **options: Any) -> RoutedTrainer:
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_steps": SAVED_AT,
        "learning_rate": 0.05, "lr_scheduler_type": "linear", "use_cpu": True, "report_to": "none", "seed": 0,
        "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": STEPS, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**{**settings, **options})
    return RoutedTrainer(model=model, args=arguments, train_dataset=Rollouts())


def outcome(made: RoutedTrainer) -> dict[str, Tensor]:
    """The trained model and the state of its optimizer, flat."""
    tensors = tensors_of(made.model)
    for index, state in made.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors


@each_case
def test_resuming_is_bit_identical_with_never_having_stopped(case: Case, tmp_path: Path) -> None:
    whole = trainer(fresh(case), tmp_path / "whole")
    started = tensors_of(whole.model)
    whole.train()
    expected = outcome(whole)
    blocks = {n for n, _ in [*gr.deployed_parameters(whole.model), *gr.quarantine_parameters(whole.model)]}
    assert not [name for name in blocks if torch.equal(expected[name], started[name])]
    assert len([name for name in expected if name.endswith(".exp_avg")]) >= len(blocks)

    rest = trainer(randomize_blocks(fresh(case), seed=7), tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}"))
    assert len(rest.masks) == STEPS - SAVED_AT
    assert_same_tensors(outcome(rest), expected)

    loaded = gr.load_quarantined(case.base(), tmp_path / "whole" / f"checkpoint-{STEPS}")
    assert_same_tensors(tensors_of(loaded), tensors_of(whole.model))


def test_a_run_without_the_quarantine_of_its_checkpoint_would_be_another(tmp_path: Path) -> None:
    """The test above would notice if the quarantine started anew at the break."""
    case = CASES["llama"]
    whole = trainer(fresh(case), tmp_path / "whole")
    whole.train()
    rest = trainer(fresh(case), tmp_path / "rest")
    load = rest._load_from_checkpoint

    def load_and_lose(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        for layer in routed_layers(rest.model).values():
            layer.lora_B_quarantine["default"].weight.data.zero_()

    rest._load_from_checkpoint = load_and_lose
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}"))
    assert not torch.equal(outcome(rest)[first_quarantine(rest.model)], outcome(whole)[first_quarantine(whole.model)])


def first_quarantine(model: nn.Module) -> str:
    return next(iter(gr.quarantine_parameters(model)))[0]


def test_checkpointing_and_accumulation_give_the_same_weights_as_none(tmp_path: Path) -> None:
    """Two micro-batches, each with its own mask, recomputed in the backward of their own route."""
    case, results = CASES["llama"], []
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    for recompute in (False, True):
        model = fresh(case)
        if recompute:  # transformers 5 renamed it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        made = trainer(model, tmp_path / str(recompute), **options)
        forwards: list[int] = []
        next(iter(routed_layers(model).values())).register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        made.train()
        assert len(made.masks) == 2 * STEPS
        assert len(forwards) == 2 * STEPS * (1 + recompute)
        results.append(outcome(made))
    assert_same_tensors(results[1], results[0])


def test_rows_of_one_zone_train_one_block(tmp_path: Path) -> None:
    """Adam still moves a block whose gradients are zero from now on, so this looks at a run of one zone throughout."""
    for zone, untouched in ((0, gr.quarantine_parameters), (2, gr.deployed_parameters)):
        model = randomize_blocks(fresh(CASES["llama"]), std=0.2)
        before = tensors_of(model)

        class OneZone(Rollouts):
            zone_of_all = zone

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                return {**super().__getitem__(index), "zones": torch.tensor(self.zone_of_all)}

        made = trainer(model, tmp_path / str(zone), weight_decay=0.0)
        made.train_dataset = OneZone()
        made.train()
        kept = {name for name, _ in untouched(model)}
        after = tensors_of(model)
        assert all(torch.equal(after[name], before[name]) for name in kept)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert len(moved) == len(kept)
