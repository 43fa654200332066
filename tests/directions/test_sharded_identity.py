"""The identity of a base model that FSDP2 has sharded is that of the whole one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.captured_batches import IDS, POOL
from support.language_models import routed_mixer
from torch.distributed.fsdp import fully_shard

import gradroute as gr
from gradroute._hashing import known_identity, model_identity

pytestmark = pytest.mark.distributed


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_features_of_a_sharded_model_know_the_base_that_it_was_before() -> None:
    model = routed_mixer()
    whole = model_identity(model)
    fully_shard(model)
    assert model_identity(model) == whole
    with torch.no_grad(), gr.capture_activations(model, pool=POOL) as activations:
        model(IDS)
    assert activations.model == known_identity(model) == whole


@pytest.mark.usefixtures("group")
def test_a_sharded_model_can_be_moved_once_its_identity_is_known() -> None:
    model = routed_mixer()
    fully_shard(model)
    known = known_identity(model)
    model.to("cpu")  # torch swaps each parameter, even for the device that it is on
    assert known_identity(model) == known
