"""X-LoRA on attention's queries against peft's, with the same weights: hidden states."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from test_interop_peers import read, rows_of_tokens
from tiny_models import saved, torch

from gatedjax.config import LoRAConfig
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel

peft = pytest.importorskip("peft")

EXPERTS, RANK, ALPHA, TEMPERATURE = 3, 2, 6.0, 0.7


@pytest.mark.slow
@pytest.mark.parametrize("top", [0, 2])
def test_xlora_equals_pefts(tmp_path, top):
    base = saved("qwen3", tmp_path / "base")
    base.config.use_cache = False
    _, run, parameters = read(tmp_path / "base")
    layers = run.config.model.num_layers
    places = {}
    for i in range(EXPERTS):
        # A, then B: peft starts from them at random without `init_lora_weights`.
        torch.manual_seed(i)
        of_expert = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(copy.deepcopy(base), of_expert)
        adapted.save_pretrained(tmp_path / f"expert_{i}")
        # peft looks for experts by their numbers.
        places[str(i)] = str(tmp_path / f"expert_{i}")
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=run.config.model.width,
        xlora_depth=1,
        layerwise_scalings=True,
        softmax_temperature=TEMPERATURE,
        top_k_lora=top or None,
        adapters=places,
    )
    tokens = rows_of_tokens()
    with torch.no_grad():
        without = base(torch.tensor(tokens)).logits.numpy()
    mixed = peft.get_peft_model(base, config)
    state = mixed.state_dict()
    bias = next(name for name in state if "xlora_classifier" in name and name.endswith("bias"))
    state[bias].zero_()
    classifier = state[bias.replace("bias", "weight")].numpy()
    with torch.no_grad():
        expected = mixed(torch.tensor(tokens)).logits.numpy()

    lora = LoRAConfig(
        rank=RANK,
        alpha=ALPHA,
        targets=("*.mixer.query",),
        num_experts=EXPERTS,
        experts_per_token=top,
        temperature=TEMPERATURE,
    )
    model = dataclasses.replace(run.config.model, lora=lora)
    flat = dict(flatten_dict(unflatten_dict(parameters)))

    def of_adapters(part: str) -> np.ndarray:
        names = [f"layers.{j}.self_attn.q_proj.lora_{part}.{i}.weight" for j, i in pairs]
        found = [next(v for k, v in state.items() if k.endswith(name)) for name in names]
        # torch's matrices are [out, in].
        stacked = np.stack([x.numpy().T for x in found])
        return stacked.reshape(layers, EXPERTS, *stacked.shape[1:])

    pairs = [(j, i) for j in range(layers) for i in range(EXPERTS)]
    query = next(path for path in flat if path[-2:] == ("query", "kernel"))
    heads = flat[query].shape[-2:]
    b = of_adapters("B")
    flat[(*query[:-1], "lora", "a")] = jnp.asarray(of_adapters("A"))
    flat[(*query[:-1], "lora", "b")] = jnp.asarray(b.reshape(*b.shape[:3], *heads))
    by_layer = classifier.reshape(layers, EXPERTS, -1).swapaxes(1, 2)
    flat[("lora_classifier",)] = jnp.asarray(by_layer)
    params = unflatten_dict(flat)
    hidden, *_ = jax.jit(LanguageModel(model).apply)({"params": params}, jnp.asarray(tokens))
    found = hidden @ params["embedding"].T
    assert rel_rms(without, expected) > 0.01
    assert rel_rms(found, expected) < 1e-5
