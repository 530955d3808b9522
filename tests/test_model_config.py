"""The configuration of a transformers model follows its new sizes, so that what is saved opens again."""

import copy
import json

import pytest
import torch

import morph
from morph.cut import apply_plan
from morph.errors import PlanMismatchError
from morph.model_config import follow_config
from morph.plan import Plan, SetConfig

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52, num_labels=3
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("make", "change", "sizes"),
    [
        (llama, {"ratio": 0.5, "heads": "whole"}, {"hidden_size": 24, "num_key_value_heads": 2}),
        (llama, {"ratio": 0.5, "heads": "whole", "ignore": ["*self_attn*", "*embed*"]}, {"intermediate_size": 26}),
        (bert, {"ratio": 0.5, "heads": "whole"}, {"hidden_size": 24, "num_attention_heads": 2}),
    ],
)
def test_what_is_cut_evenly_opens_again(make, change, sizes, tmp_path):
    model = make()
    before = copy.deepcopy(model.config.to_dict())
    result = morph.prune(model, {"input_ids": IDS}, ranking="local", **change)
    found = result.record.details["config"]
    assert sizes.items() <= {name: new for name, (_, new) in found.items()}.items()
    assert model.config.to_dict() == before
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, result.model(input_ids=IDS).logits)
    replayed = apply_plan(make(), result.record.plan)
    assert {name: getattr(replayed.config, name) for name in found} == {name: new for name, (_, new) in found.items()}
    assert Plan.from_json(json.loads(json.dumps(result.record.plan.to_json()))) == result.record.plan


def test_a_wider_model_opens_again(tmp_path):
    model = llama()
    result = morph.widen(model, {"input_ids": IDS}, ratio=2)
    assert result.record.details["config"]["intermediate_size"] == [52, 104]
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_layers_that_differ_and_heads_of_another_size_are_told():
    model = llama()
    analysis = morph.analyse(model, {"input_ids": IDS})
    wide = next(n for n in analysis.couplings if n.startswith("model.layers.0.mlp"))
    result = morph.prune(model, {"input_ids": IDS}, ratio=0.5, ignore=[n for n in analysis.couplings if n != wide])
    assert "one number for all layers" in result.record.details["config"]
    model = bert()
    inside = morph.prune(model, {"input_ids": IDS}, ratio=0.5, ranking="local", heads="inside")
    # shapes could be had, but attention divides by the root of the size that the weights were trained with
    assert "something else" in inside.record.details["config"]
    assert inside.model.config.to_dict() == model.config.to_dict()


def test_a_model_built_otherwise_is_not_believed():
    model = llama()
    wrong = copy.deepcopy(model)
    for layer in wrong.model.layers:  # a cut that the rebuilt model computes differently
        layer.mlp.gate_proj = torch.nn.Linear(48, 26, bias=False)
        layer.mlp.up_proj = torch.nn.Linear(48, 26, bias=False)
        layer.mlp.down_proj = torch.nn.Linear(26, 48, bias=False)
        layer.mlp.act_fn = torch.nn.ReLU()
    edits, reason = follow_config(model, wrong, {"input_ids": IDS})
    assert edits == []
    assert "something else" in reason


def test_a_plan_for_another_configuration_is_refused():
    with pytest.raises(PlanMismatchError, match=r"config.hidden_size is 48, the plan has 64"):
        apply_plan(llama(), Plan((SetConfig("hidden_size", 64, 32),)))
