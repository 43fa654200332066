"""Which rows an engine samples ablated, and the adapters that a server is told to load: no engine needed."""

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config, peft_model, token_ids

import gradroute as gr
from gradroute.integrations.vllm import ServerViews, _synced, lora_options
from gradroute.integrations.vllm.rows import ablated_rows


def test_rows_are_ablated_as_the_view_of_the_model_says() -> None:
    model = peft_model("llama")
    assert ablated_rows(model, 3) == [False] * 3
    rows = torch.tensor([True, False, True])
    with gr.ablate_quarantine(model, rows=rows):
        assert ablated_rows(model, 3) == [True, False, True]
        with gr.ablate_quarantine(model):
            assert ablated_rows(model, 3) == [True] * 3
    with gr.ablate_quarantine(model):
        assert ablated_rows(model, 2) == [True] * 2


VIEWS = {
    "a scale in between": (lambda m: gr.ablate_quarantine(m, scale=0.5), "the view 'scaled 0.5'"),
    "adapters off": (gr.adapters.disable_adapters, "the view 'disabled'"),
    "PEFT's adapters off": (lambda m: m.disable_adapter(), "the view 'disabled'"),
    "other rows": (lambda m: gr.ablate_quarantine(m, rows=torch.tensor([True, False])), r"of the 3 rows.*shape \(2,\)"),
    "tokens": (lambda m: gr.ablate_quarantine(m, rows=torch.ones(3, 4).bool()), r"shape \(3, 4\)"),
    "some layers": (lambda m: gr.ablate_quarantine(m.base_model.model.model.layers[0]), "Found 2"),
    "a route": (lambda m: gr.route(m, gr.RouteMask.classic([True, False, False])), "an open route"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_that_no_engine_shows_raises(case: str) -> None:
    model = peft_model("llama")
    view, message = VIEWS[case]
    opened = view(model)
    opened.__enter__()
    with pytest.raises(gr.GradRouteError, match=message):
        ablated_rows(model, 3)
    with pytest.raises(gr.GradRouteError) if case == "a route" else pytest.MonkeyPatch.context():
        opened.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("r", "r_quarantine", "limit"), [(1, 1, 8), (4, 4, 8), (8, 1, 16), (100, 156, 256), (300, 20, 320)]
)
def test_the_rank_asked_for_is_the_next_that_vllm_takes(r: int, r_quarantine: int, limit: int) -> None:
    model = gr.attach(base_model("llama"), r=r, r_quarantine=r_quarantine, target_modules=["q_proj"])
    assert lora_options(model) == {"enable_lora": True, "max_loras": 2, "max_lora_rank": limit}


def test_models_that_vllm_would_refuse_are_refused_before_there_is_an_engine() -> None:
    with pytest.raises(gr.GradRouteError, match="at most 512.*Found 513"):
        lora_options(gr.attach(base_model("llama"), r=500, r_quarantine=13, target_modules=["q_proj"]))
    whole = get_peft_model(base_model("llama"), config(modules_to_save=["lm_head"]))
    with pytest.raises(gr.GradRouteError, match=r"lm_head\.weight.*modules_to_save.*Fix"):
        lora_options(whole)
    with pytest.raises(gr.GradRouteError, match="routed layers"):
        lora_options(base_model("llama"))


def test_what_is_trained_beside_the_blocks_and_would_not_reach_the_engine_is_refused() -> None:
    model = peft_model("llama")
    model.add_adapter("other", config())
    lora_options(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(gr.GradRouteError, match=r"1 other trainable.*norm\.weight`.*Fix: requires_grad_"):
        lora_options(model)


class Server:
    """Answers as vLLM's server does, and keeps what it was asked, with the files as they were when it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.loaded: dict[str, dict[str, Any]] = {}
        self.refuse: tuple[int, str] | None = None
        self.refuse_second = False
        self.authorization: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, body))
                server.authorization.append(self.headers["Authorization"])
                status, text = server.refuse or server.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, str]) -> tuple[int, str]:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            return (200, "ok") if self.loaded.pop(name, None) else (404, f"The lora adapter {name!r} cannot be found.")
        if self.refuse_second and "ablated" in name:
            return 500, "no room"
        base = base_model("llama")
        loaded = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        self.loaded[name] = {"path": body["lora_path"], "logits": loaded(token_ids()).logits.detach()}
        return 200, "ok"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def routed() -> Any:
    return randomize_blocks(peft_model("llama"), 0, std=0.3).eval()


def test_a_server_holds_both_views_of_now_and_no_older_ones(server: Server) -> None:
    model = routed()
    views = ServerViews(model, server.url + "/")
    seen: list[str] = []
    for seed in range(1, 4):
        on, ablated = views.name_of("on"), views.name_of("ablated")
        assert set(server.loaded) == {on, ablated}
        torch.testing.assert_close(server.loaded[on]["logits"], model(token_ids()).logits, atol=1e-5, rtol=0)
        with gr.ablate_quarantine(model):
            torch.testing.assert_close(server.loaded[ablated]["logits"], model(token_ids()).logits, atol=1e-5, rtol=0)
        assert (server.loaded[on]["logits"] - server.loaded[ablated]["logits"]).abs().max() > 1e-3
        seen += [on, ablated, *(loaded["path"] for loaded in server.loaded.values())]
        randomize_blocks(model, seed, std=0.3)
        views.sync()
    assert len(set(seen)) == len(seen)
    assert len(list(Path(server.loaded[views.name_of("on")]["path"]).parent.iterdir())) == 2
    views.close()
    assert server.loaded == {}


def test_names_follow_rows_and_views(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    views = ServerViews(model, server.url, api_key="secret")
    on, ablated = views.name_of("on"), views.name_of("ablated")
    assert views.names(2) == [on, on]
    with gr.ablate_quarantine(model, rows=torch.tensor([False, True])):
        assert views.names(2) == [on, ablated]
    assert set(server.authorization) == {"Bearer secret"}
    # Another run beside it, or after it, never meets the names of this one: its process counts from one as well.
    monkeypatch.setattr(_synced, "_SYNCS", itertools.count(int(on.rpartition("-")[2])))
    other = ServerViews(routed(), server.url)
    assert {other.name_of("on"), other.name_of("ablated")}.isdisjoint({on, ablated})
    with pytest.raises(gr.GradRouteError, match="`view` should be"):
        views.name_of("off")


def test_blocks_that_changed_since_the_last_sync_raise(server: Server) -> None:
    model = routed()
    views = ServerViews(model, server.url)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(token_ids()).logits.sum().backward()
    assert views.is_current
    optimizer.step()
    assert not views.is_current
    with pytest.raises(gr.GradRouteError, match=r"changed since the last sync.*Fix: call sync\(\)"):
        views.names(1)
    views.sync()
    assert views.names(1) == [views.name_of("on")]
    # Also where torch does not count the write, where a scaling changes,
    fused = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    parameter, before = next(layer.block_parameters("quarantine")), layer.scaling["default"]

    def scale() -> None:
        layer.scaling["default"] = 2 * before

    for write in (fused.step, lambda: parameter.data.add_(1e-3), scale):
        write()
        assert not views.is_current
        views.sync()
        assert views.is_current
    # and where a parameter is not written but replaced.
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight = torch.nn.Parameter(
        torch.zeros_like(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    )
    assert not views.is_current
    views.close()
    with pytest.raises(gr.GradRouteError, match="both views. Found none"):
        views.names(1)
    with pytest.raises(gr.GradRouteError, match=r"close\(\) was called"):
        views.sync()


def test_a_failed_sync_leaves_no_view_to_sample_from(server: Server) -> None:
    model = routed()
    views = ServerViews(model, server.url)
    held = {*server.loaded}
    server.refuse = (400, '{"message": "rank 5 is greater than max_lora_rank 4"}')
    with pytest.raises(gr.GradRouteError, match="refuses: .*greater than max_lora_rank"):
        views.sync()
    with pytest.raises(gr.GradRouteError, match="Found none"):
        views.names(1)
    server.refuse = None
    server.refuse_second = True
    with pytest.raises(gr.GradRouteError, match="no room"):
        views.sync()
    with pytest.raises(gr.GradRouteError, match="Found none"):
        views.names(1)
    # What it could load of that sync is removed by the next one.
    server.refuse_second = False
    views.sync()
    assert {*server.loaded} - held == {views.name_of("on"), views.name_of("ablated")}
    assert views.names(1) == [views.name_of("on")]
    parameter = next(parameter for _, parameter in gr.quarantine_parameters(model))
    with torch.no_grad():
        parameter.fill_(float("inf"))
    with pytest.raises(gr.GradRouteError, match="should be finite"):
        views.sync()
    with pytest.raises(gr.GradRouteError, match="Found none"):
        views.names(1)


def test_a_server_that_loads_nothing_at_run_time_or_is_not_there(server: Server) -> None:
    server.refuse = (404, "Not Found")
    with pytest.raises(gr.GradRouteError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        ServerViews(routed(), server.url)
    server.answer = lambda path, body: (404, f"Loading lora {body['lora_name']} failed: no files")  # type: ignore[method-assign]
    server.refuse = None
    with pytest.raises(gr.GradRouteError, match="refuses: Loading lora .*no files"):
        ServerViews(routed(), server.url)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(gr.GradRouteError, match="should answer at"):
        ServerViews(routed(), server.url)


def test_a_model_whose_layers_or_adapters_changed_raises(server: Server) -> None:
    model = routed()
    views = ServerViews(model, server.url)
    model.add_adapter("other", config())
    model.set_adapter("other")
    with pytest.raises(gr.GradRouteError, match="active adapter 'other', not 'default'"):
        views.sync()
    model.set_adapter("default")
    views.sync()
    layer = model.base_model.model.model.layers[0].self_attn
    layer.q_proj = layer.q_proj.base_layer
    with pytest.raises(gr.GradRouteError, match="Found other layers"):
        views.sync()


def test_a_folder_is_made_where_there_is_none_and_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    views = ServerViews(routed(), server.url, folder=tmp_path / "shared" / "adapters")
    assert Path(server.loaded[views.name_of("on")]["path"]).is_relative_to(tmp_path / "shared" / "adapters")
    views.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(gr.GradRouteError, match="`folder` should be a folder"):
        ServerViews(routed(), server.url, folder=tmp_path / "file")


def test_a_server_that_was_started_again_is_synced_again(server: Server) -> None:
    model = routed()
    views = ServerViews(model, server.url)
    server.loaded.clear()
    views.sync()
    assert set(server.loaded) == {views.name_of("on"), views.name_of("ablated")}
