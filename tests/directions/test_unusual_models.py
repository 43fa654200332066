"""Models that share layers, count positions, read no tokens, or are not finite where nothing is read."""

import pytest
import torch
from support.captured_batches import IDS, POOL, batch_loss, exact
from support.language_models import MODULES, PAIRS, VOCAB, ids_only, routed_mixer
from support.models import randomize_blocks
from torch import Tensor, nn

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EXTRACTORS = [gr.extract_activation_directions, gr.extract_gradient_directions]
each_extractor = pytest.mark.parametrize("extract", EXTRACTORS, ids=["activation", "gradient"])


def routed(model: nn.Module, **settings: object) -> nn.Module:
    return randomize_blocks(gr.attach(model.double().eval(), r=2, lora_alpha=4.0, **settings))


# A layer that runs twice in a forward


class Shared(nn.Module):
    """Two blocks that are one module, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.block(self.embed(ids)))))


def shared() -> nn.Module:
    torch.manual_seed(0)
    return routed(Shared(), target_modules=["block", "head"])


def test_a_layer_that_runs_twice_in_a_forward_is_refused() -> None:
    """Its rows would be twice as many as there are rollouts."""
    model = shared()
    with pytest.raises(gr.GradRouteError, match="`block` should run once in a forward.*second run.*Fix: `modules="):
        with torch.no_grad(), gr.capture_activations(model, pool=POOL):
            model(IDS)
    with pytest.raises(gr.GradRouteError, match="`block` should run once in a forward"), gr.capture_gradients(model):
        batch_loss(model, IDS).backward()


@each_extractor
def test_an_extraction_refuses_it_too_and_takes_the_other_layers(extract) -> None:
    model = shared()
    with pytest.raises(gr.GradRouteError, match="`block` should run once"):
        extract(model, PAIRS, forward_fn=ids_only)
    assert list(extract(model, PAIRS, forward_fn=ids_only, modules=["head"]).rows) == ["head"]


@pytest.mark.parametrize("reentrant", [None, False])
def test_forwards_one_after_the_other_and_checkpoints_run_each_layer_once(reentrant: bool | None) -> None:
    model = routed_mixer()
    model.reentrant = reentrant
    with gr.capture_gradients(model) as capture:
        for i in range(3):
            batch_loss(model, IDS[i : i + 1]).backward()
    assert capture["q"].shape == (3, 2)


def test_a_forward_that_raised_does_not_count() -> None:
    model = routed_mixer()
    with torch.no_grad(), gr.capture_activations(model, pool=POOL, modules=["out"]) as capture:
        handle = model.v.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        handle.remove()
        model(IDS)
    assert len(capture["out"]) == 3


@each_extractor
def test_a_forward_fn_that_runs_the_batch_twice_is_refused(extract) -> None:
    with pytest.raises(gr.GradRouteError, match=r"run the 8 rollouts of its batch once. Found 16 rows in `q`"):
        extract(routed_mixer(), PAIRS, forward_fn=lambda model, ids, _: 0 * model(ids) + model(ids))


@pytest.mark.corner("a layer runs twice in a forward (ALBERT)", "`GradRouteError`, naming the layer")
def test_albert_is_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=16, embedding_size=8, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_hidden_layers=2, max_position_embeddings=16,
    )  # fmt: skip
    model = routed(transformers.AlbertModel(config), target_modules=["query", "value"])
    with pytest.raises(gr.GradRouteError, match=r"`encoder.*albert_layers\.0\.attention\.query` should run once"):
        gr.extract_activation_directions(model, PAIRS)


# Positions


@pytest.mark.corner("extraction in padded batches, with absolute positions (GPT-2)", "as one by one")
@each_extractor
def test_absolute_positions_are_right_in_a_padded_batch(extract) -> None:
    """GPT-2 counts positions from the left and is given none: padding stands on the right."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = routed(transformers.GPT2LMHeadModel(config), target_modules=["lm_head"])
    batched, single = extract(model, PAIRS, batch_size=8), extract(model, PAIRS, batch_size=1)
    for name, rows in batched.hack.items():
        assert rows.abs().max() > 1e-3
        torch.testing.assert_close(rows, single.hack[name], rtol=1e-9, atol=1e-12)


def test_a_sequence_classifier_finds_the_last_token_of_each_row() -> None:
    """It looks for the last token that is not its padding token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2, pad_token_id=15
    )
    model = routed(transformers.GPT2ForSequenceClassification(config))

    def extract(batch_size: int) -> gr.Directions:
        return gr.extract_gradient_directions(
            model, PAIRS, batch_size=batch_size, loss_fn=lambda output, batch: output.logits[:, 0]
        )

    batched, single = extract(8), extract(1)
    for name, rows in batched.hack.items():
        torch.testing.assert_close(rows, single.hack[name], rtol=1e-9, atol=1e-12)


# Models of something else than tokens


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    return routed(ViTModel(config))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return routed(WhisperModel(config), target_modules=["q_proj"])


def bart() -> nn.Module:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    return routed(BartModel(config), target_modules=["q_proj"])


@pytest.mark.corner(
    "extraction on a model that reads no token ids (ViT, Whisper)", "`GradRouteError`: give a `forward_fn`"
)
@each_extractor
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (vit, "does not take `input_ids` and `attention_mask`. Found a ViTModel, which takes pixel_values"),
        (whisper, "does not take `input_ids` and `attention_mask`. Found a WhisperModel, which takes input_features"),
        (bart, "an encoder with a decoder. Found a BartModel"),
        (routed_mixer, "Found a Mixer, which takes ids"),
    ],
)
def test_a_model_that_does_not_read_pairs_needs_a_forward_fn(extract, make, found: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(gr.GradRouteError, match=f"`forward_fn` should be given for .*{found}.*Fix: forward_fn="):
        extract(make(), PAIRS)


# Values that are not finite


@pytest.mark.corner("a NaN at a token of pooling weight zero", "it does not count")
@pytest.mark.parametrize("reduction", ["mean", "sum", "last"])
@pytest.mark.parametrize("features", ["bottleneck", "input", "output"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_of_weight_zero_does_not_count_where_it_is_not_finite(
    features: str, reduction: str, bad: float
) -> None:
    model = routed_mixer()
    settings = {"pool": POOL, "features": features, "reduction": reduction, "modules": ["q"]}
    with torch.no_grad(), gr.capture_activations(model, **settings) as plain:
        model(IDS)

    def spoil(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.where((POOL == 0)[..., None], bad, args[0]),)

    handle = model.q.register_forward_pre_hook(spoil)
    with torch.no_grad(), gr.capture_activations(model, **settings) as spoilt:
        model(IDS)
    handle.remove()
    exact(spoilt["q"], plain["q"])


def test_what_is_not_finite_where_it_counts_raises_with_module_and_row() -> None:
    model = routed_mixer()
    with torch.no_grad():
        model.embed.weight[8] = float("nan")
    pool = torch.ones(3, 5)
    pool[1, 0] = 0  # token 6, not 8
    with pytest.raises(gr.GradRouteError, match="activation features of `q` are not finite in row 1"):
        with gr.capture_activations(model, pool=pool, modules=MODULES):
            model(IDS)
