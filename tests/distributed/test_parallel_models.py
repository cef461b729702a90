"""Whole models of transformers with split layers, on ranks as threads, beside one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import subquad
import subquad.distributed as sd
from subquad.integrations.transformers import CatsConfig, LawcatConfig, convert, register, revert

from .programs.common import LIMIT, error, same, whole
from .threads import caught, on_ranks

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 96, "pad_token_id": 0, "attn_implementation": "subquad", "initializer_range": 0.1,
}  # fmt: skip


def llama(**options: Any) -> Any:
    register()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def converted(layers: list[int] | None = None, **options: Any) -> Any:
    """LAWCAT and CATS, away from where a conversion starts."""
    model = llama()
    convert(model, mlp=CatsConfig(threshold=0.02, down_layout="keep"))
    convert(model, attention=LawcatConfig(**options), layers=layers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(1, 96, (batch, count), generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert error(found, expected) <= limit


def gradients(model: Any, ids: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(ids, labels=ids, use_cache=False, **options).loss.backward()
    model.eval()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


class Gradients:
    """Of one process, and of the same in float64, which is asked for where three layers' roundings are more than LIMIT."""

    def __init__(self, one: Any, ids: torch.Tensor, **options: Any) -> None:
        self.call = copy.deepcopy(one), ids, options
        self.found = gradients(one, ids, **options)

    @functools.cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        one, ids, options = self.call
        with subquad.use_backend("reference"):
            return gradients(one.double(), ids, **options)

    def of(self, model: Any) -> dict[str, torch.Tensor]:
        _, ids, options = self.call
        return gradients(model, ids, **options)

    def check(self, every: list[dict[str, torch.Tensor]]) -> None:
        """Those of all ranks. Not in their threads, for which a backend is the same."""
        for found in every:
            assert found.keys() == self.found.keys()
            for name, grad in self.found.items():
                assert same(found[name], grad, lambda n=name: self.exact[n]), f"{name}: {error(found[name], grad):.1e}"


def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


@pytest.mark.parametrize("options", [{}, {"learned_sink": True, "kv_dtype": "int8"}], ids=["plain", "learned, int8"])
def test_sinks(options: dict[str, Any]) -> None:
    one, ids = llama(), tokens(20)
    convert(one, attention="sink", sink_tokens=2, window=7, **options)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    expected = Gradients(one, ids)
    generated = one.generate(ids, max_new_tokens=8, do_sample=False)

    def body(rank: int) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(one)
        names = sd.parallelize(model, mesh_of(2))
        assert names == [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn", "mlp")]
        found = expected.of(model)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
        layer, alone = model.model.layers[0].self_attn, one.model.layers[0].self_attn
        cache, whole_cache = layer.new_cache(1), alone.new_cache(1)
        x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            for low, high in ((0, 9), (9, 10), (10, 12)):
                close(layer(x[:, low:high], cache=cache)[0], alone(x[:, low:high], cache=whole_cache)[0])
        return found

    expected.check(on_ranks(2, body))


@pytest.mark.filterwarnings("ignore:subquad. SuperlinearConfig")  # keys that are never reached, on purpose
@pytest.mark.parametrize("options", [{}, {"route_per": "group", "search_scale": 0.3}], ids=["heads", "groups"])
def test_superlinear(options: dict[str, Any]) -> None:
    """Every head searches by itself, or those of one key head together; caches hold this process's heads."""
    one, ids = llama(), tokens(40)
    convert(one, attention="superlinear", sw_index=1, num_spans=2, backward_factor=1.0, forward_factor=0.5, **options)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = Gradients(one, ids, attention_mask=mask)
    told: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    generated = one.generate(ids, **told)

    def body(rank: int) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(one)
        names = sd.parallelize(model, mesh_of(2))
        assert names == [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn", "mlp")]
        assert model.model.layers[0].self_attn.q_search_proj.weight.to_local().shape == (32, 64)
        found = expected.of(model)
        streamed = model.generate(ids, return_dict_in_generate=True, **told)
        assert torch.equal(streamed.sequences, generated)
        assert streamed.past_key_values.layers[0].keys.shape[1] == 1
        assert torch.equal(model.generate(ids, cache_implementation="static", **told), generated)
        cache, whole_cache = transformers.DynamicCache(), transformers.DynamicCache()
        with torch.no_grad():
            for low, high in ((0, 30), (30, 31), (31, 40)):
                part = ids[:, low:high]
                close(model(part, past_key_values=cache).logits, one(part, past_key_values=whole_cache).logits)
        return found

    expected.check(on_ranks(2, body))


def test_sharded_caches() -> None:
    """Of a whole model, by tokens and by heads: padding, a stream beyond the window, a copy of the model."""
    one, ids = llama(), tokens(20)
    convert(one, attention="sink", sink_tokens=2, window=7)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    generated = one.generate(ids, attention_mask=mask, **options).sequences

    def body(rank: int) -> None:
        mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp")), copy.deepcopy(one)
        assert sd.shard_caches(model, mesh["cp"]) == [f"model.layers.{i}.self_attn" for i in range(3)]
        model = copy.deepcopy(model)
        sd.parallelize(model, mesh["tp"])
        found = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(found.sequences, generated)
        cache = found.past_key_values.layers[0].state.cache
        assert isinstance(cache, sd.ShardedSinkKVCache) and cache.sink_k.shape[1:3] == (1, 1)
        with pytest.raises(ValueError, match="model: expected layers of SinkAttention, got none in Linear"):
            sd.shard_caches(torch.nn.Linear(2, 2))

    on_ranks(4, body)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_parallelize(reentrant: bool | None) -> None:
    """A hybrid model, with padding; a rank that has other weights gets those of the first."""
    one, ids = converted(layers=[0, 2]), tokens(20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = Gradients(one, ids, attention_mask=mask)
    with torch.no_grad():
        logits = one(ids, attention_mask=mask).logits
    generated = one.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)

    def body(rank: int) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(one)
        if rank:
            for p in [*model.parameters(), *model.buffers()]:
                p.data.mul_(0.5 if p.dim() else 1)
        names = sd.parallelize(model, mesh_of(2))
        assert names == [
            "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp",
            "model.layers.2.self_attn", "model.layers.2.mlp",
        ]  # fmt: skip
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = expected.of(model)
        if reentrant is not None:
            return found
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(state[name], value) for name, value in one.state_dict().items())
        with torch.no_grad():
            close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), generated)
        return found

    expected.check(on_ranks(2, body))


def test_gradients_are_clipped_by_their_common_norm() -> None:
    """As the documentation says: DTensors and plain tensors apart."""
    from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

    one, ids = converted(), tokens(12)
    gradients(one, ids)
    expected = clip_grad_norm_(one.parameters(), 0.5)

    def body(rank: int) -> None:
        model = copy.deepcopy(one)
        sd.parallelize(model, mesh_of(2))
        gradients(model, ids)
        parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        others = [p for p in model.parameters() if not isinstance(p, DTensor)]
        norms = [whole(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in (parts, others)]
        total = torch.stack(norms).norm()
        for kind in (parts, others):
            clip_grads_with_norm_(kind, 0.5, total)
        close(total, expected)
        wanted = dict(one.named_parameters())
        for name, p in model.named_parameters():
            close(p.grad, wanted[name].grad)

    on_ranks(2, body)


def split_by_transformers(model: Any, mesh: DeviceMesh) -> Any:
    """As from_pretrained(..., distributed_config=DistributedConfig(tp_size=2)) does."""
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    from transformers.distributed import DistributedConfig

    plan = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))[0]
    return tensor_parallel.apply_tensor_parallelism(model, mesh, plan)


KINDS: dict[str, Any] = {
    "cats": {"mlp": "cats", "threshold": 0.02},
    "cats, a threshold for every neuron": {"mlp": "cats", "threshold": torch.linspace(0, 0.1, 100)},
    "lawcat": {"attention": "lawcat"},
    "lawcat with a window": {"attention": "lawcat", "window_size": 6, "use_output_gate": True},
}


@pytest.mark.parametrize(("family", "kind"), list(zip(("Llama", "Qwen3") * 2, KINDS, strict=True)))
def test_layers_that_transformers_has_split_are_converted(family: str, kind: str) -> None:
    if not hasattr(transformers, "distributed"):
        pytest.skip("this version of transformers splits models otherwise")
    register()
    torch.manual_seed(0)
    dense = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES)).eval()
    one, ids = copy.deepcopy(dense), tokens(20)
    convert(one, **KINDS[kind])
    expected = Gradients(one, ids)
    with torch.no_grad():
        logits, before = one(ids).logits, dense(ids).logits
    generated = one.generate(ids[:1], max_new_tokens=5, do_sample=False)

    def body(rank: int) -> dict[str, torch.Tensor]:
        model = split_by_transformers(copy.deepcopy(dense), mesh_of(2))
        convert(model, **KINDS[kind])
        with torch.no_grad():  # new parameters are drawn, on threads from one generator
            for (_, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
                if isinstance(p, DTensor):
                    p.to_local().copy_(
                        torch.distributed.tensor.distribute_tensor(q, p.device_mesh, p.placements).to_local()
                    )
        found = expected.of(model)
        with torch.no_grad():
            close(model(ids).logits, logits)
            assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), generated)
            revert(model)
            close(model(ids).logits, before)
        return found

    expected.check(on_ranks(2, body))


def test_refused() -> None:
    """What a part of a layer cannot do, and what is split in another way."""
    one, ids = converted(), tokens(12)
    sinks = llama()
    convert(sinks, attention="sink", sink_tokens=2, window=8)

    def body(rank: int) -> dict[str, str]:
        mesh = mesh_of(2)
        model, stock = copy.deepcopy(one), split_by_transformers(llama(), mesh)
        sd.parallelize(model, mesh)
        late = split_by_transformers(copy.deepcopy(one), mesh)

        def transfer() -> None:
            with subquad.attention_transfer(model):
                pass

        def calibrate() -> None:
            with subquad.CatsCalibrator(model):
                model(ids)

        return {
            "twice": caught(lambda: sd.parallelize(model, mesh)),
            "revert": caught(lambda: revert(model)),
            "transfer": caught(transfer),
            "calibrate": caught(calibrate),
            "few bits": caught(lambda: convert(model, weights="int8")),
            "few bits, split by transformers": caught(lambda: convert(stock, weights="int8")),
            "sinks": caught(lambda: convert(stock, attention="sink")),
            "superlinear": caught(lambda: convert(stock, attention="superlinear")),
            "split after converting": caught(lambda: late(ids)),
            "nothing to split": caught(lambda: sd.parallelize(llama(), mesh)),
        }

    for found in on_ranks(2, body):
        assert "model.layers.0.self_attn: q_proj.weight: expected a whole parameter, got a DTensor" in found["twice"]
        assert "got those that parallelize has split" in found["revert"]
        assert "model.layers.0.self_attn: expected all heads, got those of this process" in found["transfer"]
        assert "model.layers.0.mlp: expected whole weights, got a part" in found["calibrate"]
        for kind in ("few bits", "few bits, split by transformers"):
            assert "self_attn.q_proj: weight: expected a whole parameter, got a DTensor; convert before" in found[kind]
        for kind in ("sinks", "superlinear"):
            assert "q_proj.weight: expected a whole parameter, got a DTensor" in found[kind]
        assert "expected a parameter that is split over 2 processes, got a whole one" in found["split after converting"]
        assert "model: expected layers made by convert" in found["nothing to split"]
