"""Exports are plain LoRA: stock PEFT loads them in a process without gradroute and shows the ablated or full view."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from support.models import Tower, randomize_blocks
from support.peft_cases import (
    ATTENTION,
    Case,
    X,
    assert_near,
    distance,
    logits,
    tensors_of,
    unnamed_base,
    views,
)
from support.tiny_models import ARCHITECTURES, base_model, config, llama
from torch import Tensor, nn

import gradroute as gr

whole_modules = pytest.mark.filterwarnings("ignore:The export holds whole modules:gradroute.GradRouteWarning")
pytestmark = [pytest.mark.touches_peft, unnamed_base, whole_modules]
LLAMA = Case("llama")
PATTERNED = Case(
    "llama", options={"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 15}, "use_rslora": True}
)  # fmt: skip
HEAD = Case("llama", options={"target_modules": ["lm_head", "v_proj"]})
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPORTS = {"deployed": gr.export_deployed, "full": gr.export_full}


def attached(std: float = 0.2, **arguments: Any) -> nn.Module:
    arguments = {"r": 3, "r_quarantine": 4, "lora_alpha": 6, **arguments}
    return randomize_blocks(gr.attach(LLAMA.base(), **arguments), std=std).eval()


def injected(case: Case = LLAMA) -> nn.Module:
    model = randomize_blocks(inject_adapter_in_model(case.config(), case.base()), std=0.2).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


def merged(case: Case = LLAMA) -> nn.Module:
    model = case.model()
    model.merge_adapter()
    return model


def second_of_two() -> nn.Module:
    model = LLAMA.model()
    model.add_adapter("second", config(r=2, r_quarantine=5))
    model.set_adapter("second")
    return randomize_blocks(model, seed=1, std=0.2)


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "PEFT": ("llama", LLAMA.model),
    "attached": ("llama", attached),
    "singular-value gains": ("llama", partial(attached, std=2.0, parametrization="svd_gain")),
    "injected": ("llama", injected),
    "qwen3": ("qwen3", Case("qwen3").model),
    "GPT-2": ("gpt2", Case("gpt2").model),
    "experts": ("moe", Case("moe").model),
    "patterns and rsLoRA": ("llama", PATTERNED.model),
    "GPT-2 with patterns": ("gpt2", Case("gpt2", options={"rank_pattern": {"c_attn": 5}, "lora_dropout": 0.1}).model),
    "one layer": ("llama", Case("llama", options={"target_modules": r"model\.layers\.1\.mlp\.(up|down)_proj"}).model),
    "head": ("llama", HEAD.model),
    "modules_to_save": ("llama", Case("llama", options={"modules_to_save": ["lm_head", "embed_tokens"]}).model),
    "injected modules_to_save": ("llama", partial(injected, Case("llama", options={"modules_to_save": ["lm_head"]}))),
    "merged": ("llama", merged),
    "merged head": ("llama", partial(merged, HEAD)),
    "second of two adapters": ("llama", second_of_two),
}

# Loads every export in an environment without gradroute, and writes how far its logits are from those expected.
ALONE = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class WithoutGradroute(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gradroute":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutGradroute())
try:
    import gradroute
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("gradroute can be imported")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, report = Path(sys.argv[1]), {}
for name, case in json.loads((folder / "cases.json").read_text()).items():
    base = AutoModelForCausalLM.from_pretrained(folder / case["base"])
    expected = torch.load(folder / case["expected"])
    model = PeftModel.from_pretrained(base, folder / case["export"]).eval()
    with torch.no_grad():
        loaded = model(expected["ids"]).logits
        with model.disable_adapter():
            without = model(expected["ids"]).logits
    report[name] = {
        "error": (loaded - expected["logits"]).abs().max().item(),
        "effect": (without - expected["logits"]).abs().max().item(),
        "adapters": sorted({type(module).__name__ for module in model.modules() if hasattr(module, "lora_A")}),
    }
assert "gradroute" not in sys.modules
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without gradroute finds; one for all cases, since importing PEFT takes it seconds."""
    folder, cases = tmp_path_factory.mktemp("exports"), {}
    for architecture in ARCHITECTURES:
        base_model(architecture).save_pretrained(folder / architecture)
    for name, (architecture, make) in MODELS.items():
        model = make()
        if name.startswith("merged"):
            shown = (HEAD if "head" in name else LLAMA).views()
            seen = {"deployed": shown.ablated, "full": shown.on}
        else:
            seen = {"full": logits(model)}
            with gr.ablate_quarantine(model):
                seen["deployed"] = logits(model)
        assert distance(seen["deployed"], seen["full"]) > 0.1
        for kind, export in EXPORTS.items():
            key = f"{kind} {name}"
            export(model, folder / key / "export")
            torch.save({"ids": X, "logits": seen[kind]}, folder / key / "expected.pt")
            cases[key] = {"base": architecture, "export": f"{key}/export", "expected": f"{key}/expected.pt"}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXPORTS)
def test_stock_peft_without_gradroute_reproduces_the_view(kind: str, name: str, alone: dict[str, Any]) -> None:
    found = alone[f"{kind} {name}"]
    assert found["adapters"] == ["Linear"]
    assert found["effect"] > 0.1
    assert found["error"] < 1e-5


# The files


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("name", ["PEFT", "attached", "patterns and rsLoRA", "GPT-2 with patterns"])
def test_the_config_is_plain_with_scaling_one_and_no_patterns(kind: str, name: str, tmp_path: Path) -> None:
    EXPORTS[kind](MODELS[name][1](), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields.keys() <= LoraConfig().to_dict().keys() | {"auto_mapping"}
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.lora_alpha == config.r
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert not config.use_rslora
    assert config.lora_dropout == 0
    assert config.fan_in_fan_out == ("GPT-2" in name)


@pytest.mark.parametrize(("kind", "rank"), [("deployed", 5), ("full", 9)])
def test_every_matrix_has_one_rank_padded_with_zeros(kind: str, rank: int, tmp_path: Path) -> None:
    model = PATTERNED.model()
    EXPORTS[kind](model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {A.shape[0] for name, A in tensors.items() if "lora_A" in name} == {rank}
    assert {B.shape[1] for name, B in tensors.items() if "lora_B" in name} == {rank}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # k_proj has rank 3 and, with the quarantine, 7.
    A, B = (tensors[f"base_model.model.model.layers.0.self_attn.k_proj.lora_{m}.weight"] for m in "AB")
    own = {"deployed": 3, "full": 7}[kind]
    assert A[:own].any(1).all()
    assert not A[own:].any()
    assert not B[:, own:].any()


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("name", ["PEFT", "head", "merged head", "modules_to_save", "GPT-2"])
def test_an_export_holds_matrices_and_saved_modules_and_no_base_weight(kind: str, name: str, tmp_path: Path) -> None:
    EXPORTS[kind](MODELS[name][1](), tmp_path)
    others = {
        tensor for tensor in load_file(tmp_path / WEIGHTS) if not tensor.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    saved = {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}
    assert others == (saved if name == "modules_to_save" else set())


def test_scalings_are_folded_into_B_in_float32(tmp_path: Path) -> None:
    model = Case("llama", torch.bfloat16, options={"use_rslora": True}).model()
    gr.export_deployed(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    saved = tensors_of(model)
    assert torch.equal(tensors[f"{name}.lora_A.weight"], saved[f"{name}.lora_A.default.weight"].float())
    B = saved[f"{name}.lora_B.default.weight"].float()
    assert torch.equal(tensors[f"{name}.lora_B.weight"], 6 / 3**0.5 * B)


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_road_by_which_blocks_came_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    weights = []
    for name, make in {"peft": LLAMA.model, "injected": injected, "merged": merged, "again": LLAMA.model}.items():
        EXPORTS[kind](make(), tmp_path / name)
        weights.append(files_in(tmp_path / name))
    model = attached()
    theirs = {
        n.replace("base_model.model.", "").replace(".default.weight", ""): p
        for n, p in tensors_of(LLAMA.model()).items()
    }
    with torch.no_grad():
        for name, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
            parameter.copy_(theirs[name])
    EXPORTS[kind](model, tmp_path / "attached")
    weights.append(files_in(tmp_path / "attached"))
    assert all(other == weights[0] for other in weights)


def files_in(folder: Path) -> dict[str, Any]:
    """Weights as bytes; of the config what does not name its origin."""
    fields = json.loads((folder / CONFIG).read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    fields = {name: value for name, value in fields.items() if name not in ("auto_mapping", "base_model_name_or_path")}
    return {"weights": (folder / WEIGHTS).read_bytes(), "config": fields}


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("make", [LLAMA.model, attached], ids=["PEFT", "attached"])
def test_views_and_routes_do_not_change_an_export(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    EXPORTS[kind](model, tmp_path / "outside")
    views_ = [
        gr.ablate_quarantine(model),
        gr.ablate_quarantine(model, rows=torch.tensor([True, False, True])),
        gr.disable_adapters(model),
        gr.route(model, gr.RouteMask.zones(["keep"] * len(X))),
    ]
    for i, view in enumerate(views_):
        with torch.no_grad(), view:
            EXPORTS[kind](model, tmp_path / str(i))
            logits(model)
        assert files_in(tmp_path / str(i)) == files_in(tmp_path / "outside")


def test_an_export_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = PATTERNED.model().train()
    before, seen = tensors_of(model), views(model.eval())
    for kind, export in EXPORTS.items():
        export(model, tmp_path / kind)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())
    assert torch.equal(logits(model), seen.on)


def test_an_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    gr.export_full(LLAMA.model(), tmp_path)
    gr.export_deployed(LLAMA.model(), tmp_path)
    gr.export_deployed(LLAMA.model(), tmp_path / "fresh" / "nested")
    assert files_in(tmp_path)["weights"] == files_in(tmp_path / "fresh" / "nested")["weights"]


@pytest.mark.parametrize("make", [LLAMA.model, attached, injected], ids=["PEFT", "attached", "injected"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_exported(make: Callable[[], nn.Module], value: float, tmp_path: Path) -> None:
    model = make()
    name, parameter = list(gr.deployed_parameters(model))[3]
    with torch.no_grad():
        parameter[0, 0] = value
    for export in EXPORTS.values():
        with pytest.raises(gr.GradRouteError, match=rf"`.*{name.split('.lora')[0][-12:]}` should be finite.*Fix"):
            export(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_broken_quarantine_does_not_keep_the_deployed_block_from_being_exported(tmp_path: Path) -> None:
    model = LLAMA.model()
    with torch.no_grad():
        next(iter(gr.quarantine_parameters(model)))[1][0, 0] = float("nan")
    gr.export_deployed(model, tmp_path / "deployed")
    with pytest.raises(gr.GradRouteError, match="should be finite"):
        gr.export_full(model, tmp_path / "full")


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    for model in (LLAMA.base(), get_peft_model(LLAMA.base(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(gr.GradRouteError, match="should contain routed layers"):
            gr.export_deployed(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# Names


def test_targets_are_leaf_names_where_these_select_exactly_the_layers(tmp_path: Path) -> None:
    def targets(model: nn.Module, name: str) -> list[str]:
        gr.export_deployed(model, tmp_path / name)
        return sorted(json.loads((tmp_path / name / CONFIG).read_text())["target_modules"])

    assert targets(Case("llama", options={"target_modules": ATTENTION}).model(), "attention") == sorted(ATTENTION)
    upper = targets(Case("llama", options={"target_modules": r".*layers\.1\.mlp\.up_proj"}).model(), "upper")
    assert upper == ["model.layers.1.mlp.up_proj"]


def test_a_target_that_ends_another_modules_name_is_refused(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.tower = nn.Linear(5, 5), Tower()

    model = randomize_blocks(gr.attach(Nested(), r=2, target_modules="lower"))
    with pytest.raises(gr.GradRouteError, match=r"No `target_modules` selects exactly the 1 routed layers.*Fix"):
        gr.export_deployed(model, tmp_path)


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")], ids=["module", "compile"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["blocks", "modules_to_save"])
def test_wrappers_of_training_leave_no_trace(
    wrap: Callable[[nn.Module], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    model = Case("llama", options=options).model()
    gr.export_full(model, tmp_path / "bare")
    gr.export_full(wrap(model), tmp_path / "wrapped")
    assert files_in(tmp_path / "wrapped") == files_in(tmp_path / "bare")


@pytest.mark.parametrize("road", ["get_peft_model", "attach"])
def test_a_module_called_module_keeps_its_name(road: str, tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Tower()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    torch.manual_seed(0)
    base, x = Outer(), torch.randn(2, 5)
    weights = tensors_of(base)
    model = gr.attach(base, r=3) if road == "attach" else get_peft_model(base, config())
    randomize_blocks(model)
    with gr.ablate_quarantine(model), torch.no_grad():
        expected = model(x)
    gr.export_deployed(model, tmp_path)
    fresh = Outer()
    fresh.load_state_dict(weights)
    assert not torch.allclose(fresh(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path)(x), expected, rtol=1e-5, atol=1e-5)


def test_tied_modules_that_peft_saves_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True).eval()
    state = tensors_of(base)
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = randomize_blocks(get_peft_model(base, config(**options)), std=1.0).eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    expected = views(model).ablated
    gr.export_deployed(model, tmp_path)
    fresh = llama(tie_word_embeddings=True).eval()
    fresh.load_state_dict(state)
    assert_near(logits(PeftModel.from_pretrained(fresh, tmp_path)), expected)
