"""transformers' own common tests, on every model class that this package registers with the Auto classes.

`make conformance` runs them; `TRANSFORMERS_TESTS` is the folder that `prepare.py` unpacked. A family joins by being
registered, and may say in `SIZES` what its tiny model is made of. What reads activations instead of tokens, the sparse
autoencoders, is tested in every variant, as far as the tests do not ask for tokens.
"""

import importlib
import os
import sys
import unittest
from typing import Any

import pytest
import torch


sys.path.insert(0, os.environ["TRANSFORMERS_TESTS"])

from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from tests.test_training_mixin import TrainingTesterMixin

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.families import FAMILIES


SHARED = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 98,
}
SIZES: dict[str, dict[str, Any]] = {
    "tensor_memory": {
        "bias": True,
        "normalize_qkv": False,
        "layers": [[{"dim": 8, "eps": 1e-6, "use_delta_rule": True}] * 4] * 2,
    },
    "memory_transformer": {
        "num_memory_tokens": 24,
        "use_chapters": True,
        "num_chapters": 6,
        "top_k_chapters": 2,
    },
    "senri": {"num_attention_heads": 2},  # a quarter of a head is rotated, and scaled rotations need two pairs of it
}

# Families in which no layer has attention weights to be looked at.
WITHOUT_ATTENTION = {"tensor_memory"}

# Test (of one model type, or of all that read tokens under "*") and why it does not hold.
KNOWN: dict[str, dict[str, str]] = {
    "*": {"test_generation_tester_mixin_inheritance": "the archive does not hold the tests that it asks for"},
    "memory_transformer": {
        "test_batching_equivalence": "what routers did is a statistic of the whole batch",
    },
    "sparse_autoencoder": dict.fromkeys(
        ("test_model_get_set_embeddings", "test_resize_tokens_embeddings"),
        "it reads activations: there are no token embeddings",
    )
    | dict.fromkeys(
        ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
        "it has one layer: latents and reconstruction, no hidden states",
    ),
    "senri": {"test_attention_outputs": "a memory layer has no attention weights: there are fewer than layers"},
}


class Tester:
    """What the common tests ask for: a tiny config of a family and inputs for it."""

    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, parent: unittest.TestCase, model_type: str) -> None:
        self.parent, self.model_type = parent, model_type
        self.family = FAMILIES[model_type]
        classes = {kind: self.model_class(kind) for kind in self.family.models}
        self.base_model_class = classes["Model"]
        self.causal_lm_class = classes["ForCausalLM"]
        self.num_hidden_layers, self.hidden_size = SHARED["num_hidden_layers"], SHARED["hidden_size"]
        self.num_attention_heads, self.vocab_size = self.get_config().num_attention_heads, SHARED["vocab_size"]

    def model_class(self, kind: str) -> type:
        module = importlib.import_module(f"senri_hf.modeling.{self.family.module}")
        return getattr(module, self.family.prefix + kind)

    def get_config(self) -> Any:
        module = importlib.import_module(f"senri_hf.configuration.{self.family.module}")
        return getattr(module, f"{self.family.prefix}Config")(**{**SHARED, **SIZES.get(self.model_type, {})})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 1
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def common_tests(model_type: str) -> type:
    """The common tests of one family."""
    family = FAMILIES[model_type]
    module = importlib.import_module(f"senri_hf.modeling.{family.module}")

    class Common(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
        all_model_classes = tuple(getattr(module, family.prefix + kind) for kind in family.models)
        pipeline_model_mapping: dict[str, type] = {}  # noqa: RUF012
        model_tester = None
        has_attentions = model_type not in WITHOUT_ATTENTION

        def setUp(self) -> None:
            self.model_tester = Tester(self, model_type)

    expect_failures(Common, KNOWN["*"] | KNOWN.get(model_type, {}))
    Common.__name__ = Common.__qualname__ = f"Test{family.prefix}"
    return Common


class ActivationsTester:
    """What the common tests ask for, of a sparse autoencoder: a tiny config and activations."""

    is_training = True
    batch_size, seq_length, width = 3, 7, 32

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def get_config(self) -> SparseAutoencoderConfig:
        return SparseAutoencoderConfig(d_in=self.width, expansion_factor=2, variant=self.variant, k=4)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), {"activations": floats_tensor([self.batch_size, self.seq_length, self.width])}


def activation_tests(variant: str) -> type:
    """The common tests of a variant of sparse autoencoders."""

    class Common(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (SparseAutoencoder,)
        model_tester = None
        has_attentions = False

        def setUp(self) -> None:
            self.model_tester = ActivationsTester(variant)

    expect_failures(Common, KNOWN["sparse_autoencoder"])
    Common.__name__ = Common.__qualname__ = f"TestSparseAutoencoder_{variant}"
    return Common


def expect_failures(common: type, reasons: dict[str, str]) -> None:
    """Mark tests, by name, that are known not to hold, with the reason: they must fail."""
    for name, reason in reasons.items():
        if hasattr(common, name):
            setattr(common, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(common, name)))


for _model_type, _family in FAMILIES.items():
    if "ForCausalLM" in _family.models:
        globals()[f"Test{_family.prefix}"] = common_tests(_model_type)
for _variant in VARIANTS:
    globals()[f"TestSparseAutoencoder_{_variant}"] = activation_tests(_variant)
