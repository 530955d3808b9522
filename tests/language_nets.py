"""Small transformers with random weights, and sentences for them."""

from __future__ import annotations

import torch
from input_nets import CLASSES
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = 40


def bert(layers: int = 2, width: int = 24, seed: int = 0, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=70,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def distilbert(layers: int = 2, width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=WORDS,
        dim=width,
        n_layers=layers,
        n_heads=2,
        hidden_dim=2 * width,
        max_position_embeddings=70,
        num_labels=CLASSES,
    )
    return DistilBertForSequenceClassification(config)


def gpt2(layers: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    words = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=layers, n_head=4, n_positions=70, use_cache=False, **words))


def llama(layers: int = 2, seed: int = 0) -> nn.Module:
    """Two heads of queries for each head of keys and values."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=70,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def sentences(number: int = 11, length: int = 9, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Token numbers of sentences of different lengths, padded with zeros, and what their first word decides."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, WORDS, (number, length), generator=draw)
    lengths = torch.randint(length // 2, length + 1, (number,), generator=draw)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": words * mask, "attention_mask": mask}, words[:, 0] % CLASSES
