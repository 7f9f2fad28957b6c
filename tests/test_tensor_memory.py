"""Tensor memory: what is its own. Laws are in `test_laws`, what all models with memory keep in `test_built_in`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILT_IN, HIDDEN, VOCABULARY, BuiltIn, assert_close, feed, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from senri_hf import (
    LinearMemoryAttention,
    MemoryCache,
    MemoryTrainer,
    MemoryTrainingArguments,
    MultiHeadMemory,
    TensorMemory,
    TensorMemoryConfig,
    TensorMemoryForCausalLM,
    TensorMemoryHeadConfig,
    TensorMemoryLayer,
)
from senri_hf.memory import compressive_reference
from senri_hf.memory.layout import Layout


SUBJECTS = {variant: BuiltIn("tensor_memory", "built_in", variant) for variant in BUILT_IN["tensor_memory"]}
every_variant = pytest.mark.parametrize("variant", SUBJECTS)
DELTA = TensorMemoryHeadConfig(dim=8, eps=1e-6, use_delta_rule=True)
FADING = TensorMemoryHeadConfig(dim=4, eps=1e-6, use_delta_rule=False, decay=0.5)
CLAMPED = TensorMemoryHeadConfig(dim=6, eps=0.0, use_delta_rule=True, max_delta=0.5, max_memory=1.0, max_norm=2.0)


def layer(*heads: TensorMemoryHeadConfig, **settings: Any) -> TensorMemoryLayer:
    """A layer of such heads."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 64, "bias": True, "normalize_qkv": False}
    return TensorMemoryLayer([TensorMemory(head) for head in heads], **{**sizes, **settings})


def config(**settings: Any) -> TensorMemoryConfig:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "bias": True,
        "normalize_qkv": False,
        "layers": [[DELTA, DELTA, DELTA, DELTA], [DELTA, FADING, FADING, CLAMPED]],
    }
    return TensorMemoryConfig(**{**given, **settings})


def from_layers() -> TensorMemoryForCausalLM:
    """What `config()` says, of layers that are handed in."""
    return TensorMemoryForCausalLM.from_layers(
        vocab_size=VOCABULARY,
        layers=[layer(DELTA, DELTA, DELTA, DELTA), layer(DELTA, FADING, FADING, CLAMPED)],
    )


# What is declared is what is there.


def test_both_ways_to_declare_a_model_make_one_config_that_spells_out_every_head(tmp_path: Path) -> None:
    declared, handed = TensorMemoryForCausalLM(config()), from_layers()
    saved = []
    for name, model in (("declared", declared), ("handed", handed)):
        model.save_pretrained(tmp_path / name)
        saved.append(json.loads((tmp_path / name / "config.json").read_text()))
    assert saved[0] == saved[1]
    fields = {"dim", "eps", "use_delta_rule", "max_delta", "max_memory", "max_norm", "decay"}
    assert [[head.keys() for head in heads] for heads in saved[0]["layers"]] == [[fields] * 4, [fields] * 4]
    assert saved[0]["layers"][1] == [vars(head) for head in (DELTA, FADING, FADING, CLAMPED)]


def test_the_card_says_every_head_and_what_memory_takes(tmp_path: Path) -> None:
    from_layers().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## Memory of layer 1, head 2" in text and "| `decay` | `0.5` |" in text
    numbers = 5 * (8 * 8 + 8) + 2 * (4 * 4 + 4) + 6 * 6 + 6
    assert f"| bytes of memory a row | {4 * numbers:,}, however long the text is |" in text


def test_a_model_built_either_way_loads_from_the_others_checkpoint(tmp_path: Path) -> None:
    ids = tokens(2, 9)
    for name, ours, theirs in (
        ("one", TensorMemoryForCausalLM(config()), from_layers()),
        ("other", from_layers(), TensorMemoryForCausalLM(config())),
    ):
        ours.eval().save_pretrained(tmp_path / name)
        theirs.eval().load_state_dict(ours.state_dict())
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_layers_that_are_handed_in_are_the_models_own_weights_included() -> None:
    torch.manual_seed(0)
    memory = TensorMemory(DELTA)
    made = TensorMemoryLayer([memory], hidden_size=HIDDEN, intermediate_size=64, bias=True, normalize_qkv=False)
    before = {name: t.clone() for name, t in made.state_dict().items()}
    model = TensorMemoryForCausalLM.from_layers(vocab_size=9, layers=[made])
    assert model.model.layers[0] is made and made.self_attn.memory.memories[0] is memory
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())


def test_initial_weights_are_scaled_alike_however_a_model_is_made() -> None:
    """By the inputs of a matrix, or all of them as `initializer_range` says."""
    for model in (TensorMemoryForCausalLM(config()), from_layers()):
        assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.05)
    small = TensorMemoryForCausalLM(config(initializer_range=0.01))
    assert small.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert small.model.embed_tokens.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_layers_may_differ_in_all_that_a_layer_has() -> None:
    layers = [layer(DELTA, intermediate_size=16, bias=False), layer(FADING, DELTA, normalize_qkv=True)]
    model = TensorMemoryForCausalLM.from_layers(vocab_size=9, layers=layers)
    assert (model.config.intermediate_size, model.config.bias) == ([16, 64], [False, True])
    again = TensorMemoryForCausalLM(TensorMemoryConfig.from_dict(model.config.to_dict()))
    assert [(n, t.shape) for n, t in again.state_dict().items()] == [
        (n, t.shape) for n, t in model.state_dict().items()
    ]
    assert [made.normalize_qkv for made in again.model.layers] == [False, True]
    assert config().intermediate_size == config(intermediate_size=[64, 64]).intermediate_size == 64


class Squared(TensorMemory):
    """A head with features, and a weight, of its own."""

    def __init__(self, config: TensorMemoryHeadConfig, weight: float) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, projected: Tensor) -> Tensor:
        return projected.float().square() * self.weight


def test_a_head_of_ones_own_is_used_where_it_is_handed_in() -> None:
    """Beside others of equal settings; a model that is to be saved refuses it, as no config could say it."""
    torch.manual_seed(0)
    heads = [Squared(DELTA, 1.0), TensorMemory(DELTA), Squared(DELTA, 3.0)]
    attention = LinearMemoryAttention(MultiHeadMemory(heads), hidden_size=HIDDEN, bias=True, normalize_qkv=False)
    assert [group.heads for group in attention.memory.groups] == [(0,), (1,), (2,)]
    hidden = torch.randn(1, 5, HIDDEN)
    layout = Layout.of(torch.ones(1, 5, dtype=torch.bool))
    _, steps = attention(hidden, None, layout, True)
    keys = attention.k_proj(hidden)[0].square().sum(0)
    assert_close(steps[0].now.state.normaliser[0, 0, 0], keys[:8])
    assert_close(steps[2].now.state.normaliser[0, 0, 0], 3 * keys[16:24])
    made = TensorMemoryLayer(heads, hidden_size=HIDDEN, intermediate_size=64, bias=True, normalize_qkv=False)
    with pytest.raises(ValueError, match=r"class Squared.*config\.json"):
        TensorMemoryForCausalLM.from_layers(vocab_size=9, layers=[made])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorMemoryHeadConfig(dim=0, eps=0.0, use_delta_rule=True), "dim=0"),
        (lambda: TensorMemoryHeadConfig(dim=8, eps=-1.0, use_delta_rule=True), r"eps=-1\.0"),
        (lambda: TensorMemoryHeadConfig(dim=8, eps=0.0, use_delta_rule=1), "use_delta_rule=1"),
        (lambda: TensorMemoryHeadConfig(dim=8, eps=0.0, use_delta_rule=True, decay=1.0), r"decay=1\.0"),
        (lambda: TensorMemoryHeadConfig(dim=8, eps=0.0, use_delta_rule=True, max_norm=0), "max_norm=0"),
        (lambda: TensorMemoryHeadConfig(dim=8, eps=0.0, use_delta_rule=True, max_delta="1"), "max_delta='1'"),
        (lambda: TensorMemoryHeadConfig(dim=8), "eps"),
        (lambda: TensorMemoryConfig(vocab_size=9), "hidden_size"),
        (lambda: config(layers=[]), r"layers=\[\]"),
        (lambda: config(layers=[[]]), "at least one head"),
        (lambda: config(layers=[[{"dim": 8}]]), r"\{'dim': 8\} was given as a head"),
        (lambda: config(layers=[[{**vars(DELTA), "heads": 2}]]), "was given as a head"),
        (lambda: config(num_hidden_layers=3), "num_hidden_layers=3"),
        (lambda: config(bias=[True]), r"bias=\[True\].*2 layers"),
        (lambda: config(intermediate_size=0), "intermediate_size=0"),
        (lambda: config(hidden_dropout=0.1), "hidden_dropout=0.1.*no dropout"),
        (lambda: MultiHeadMemory([]), "at least one TensorMemory"),
        (lambda: MultiHeadMemory([DELTA]), "at least one TensorMemory"),
        (lambda: TensorMemoryForCausalLM.from_layers(vocab_size=9, layers=[]), "0 layers"),
        (lambda: TensorMemoryForCausalLM.from_layers(vocab_size=9, layers=[layer(DELTA)] * 2), "another one"),
        (
            lambda: TensorMemoryForCausalLM.from_layers(
                vocab_size=9, layers=[layer(DELTA), layer(DELTA, hidden_size=16)]
            ),
            r"hidden sizes \[16, 32\]",
        ),
    ],
)
def test_a_wrong_setting_is_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# Every way to compute it is one.


def by_formulas(attention: LinearMemoryAttention, hidden: Tensor) -> Tensor:
    """A layer of memory [T, D] head by head and token by token, with the features written out: sigma once."""
    queries, keys, values = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    if attention.normalize_qkv:
        queries, keys, values = (part / part.norm(dim=-1, keepdim=True) for part in (queries, keys, values))
    reads, start = [], 0
    for memory in attention.memory.memories:
        dim = memory.config.dim
        q, k, v = (part[:, start : start + dim] for part in (queries, keys, values))
        q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
        empty = torch.zeros(dim, dim), torch.zeros(dim)
        reads.append(compressive_reference.read_and_write(*empty, q, k, v, memory.rule)[0])
        start += dim
    return attention.o_proj(torch.cat(reads, dim=-1))


@pytest.mark.parametrize("normalize_qkv", [False, True])
def test_heads_that_differ_give_the_values_and_gradients_of_the_formulas(normalize_qkv: bool) -> None:
    torch.manual_seed(0)
    attention = layer(DELTA, FADING, CLAMPED, DELTA, FADING, normalize_qkv=normalize_qkv).self_attn
    assert len(attention.memory.groups) == 3
    hidden = torch.randn(2, 70, HIDDEN)
    weight = torch.randn(2, 70, HIDDEN)
    ours, _ = attention(hidden, None, Layout.of(torch.ones(2, 70, dtype=torch.bool)), True)
    theirs = torch.stack([by_formulas(attention, row) for row in hidden])
    assert_close(ours, theirs, "reads", tolerance=1e-5)
    parameters = list(attention.parameters())
    gradients = [torch.autograd.grad((output * weight).sum(), parameters) for output in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a / b.norm(), b / b.norm(), "gradient", tolerance=1e-5)


def test_a_memory_goes_on_only_under_the_rules_that_wrote_it(tmp_path: Path) -> None:
    """Also where weights and shapes are the same."""
    fading = TensorMemoryHeadConfig(dim=8, eps=1e-6, use_delta_rule=True, decay=0.5)
    written, other = (
        TensorMemoryForCausalLM.from_layers(vocab_size=VOCABULARY, layers=[layer(head)]) for head in (DELTA, fading)
    )
    other.load_state_dict(written.state_dict())
    memory = MemoryCache.for_model(written)
    feed(written, memory, tokens(1, 5))
    memory.save_pretrained(tmp_path / "memory")
    MemoryCache.from_pretrained(tmp_path / "memory", model=written)
    with pytest.raises(ValueError, match=r"layer 0 of it was written by .*'decay': None.* writes by .*'decay': 0\.5"):
        MemoryCache.from_pretrained(tmp_path / "memory", model=other)


def test_a_model_of_layers_has_their_dtype() -> None:
    model = TensorMemoryForCausalLM.from_layers(vocab_size=VOCABULARY, layers=[layer(DELTA).to(torch.bfloat16)])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tokens(1, 4)).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_a_compiled_model_of_heads_that_differ_is_one_graph_and_gives_the_same() -> None:
    model, ids = SUBJECTS["mixed"].model(), tokens(2, 6, seed=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole = model(ids, use_cache=False).logits
    assert_close(compiled(ids, use_cache=False).logits, whole)
    torch._dynamo.reset()
    compiled, memory = torch.compile(model, backend="aot_eager"), MemoryCache.for_model(model)
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        assert_close(compiled(ids[:, start:stop], past_key_values=memory).logits, whole[:, start:stop])
    torch._dynamo.reset()


def test_heads_of_equal_settings_are_one_tensor() -> None:
    memory = MultiHeadMemory([TensorMemory(head) for head in (DELTA, FADING, DELTA, DELTA)])
    assert [(group.heads, group.shape.heads) for group in memory.groups] == [((0, 2, 3), 3), ((1,), 1)]
    parts = memory.split(torch.arange(28.0)[None, None])
    assert parts[0][0, 0, 1].tolist() == list(range(12, 20)) and parts[1][0, 0, 0].tolist() == [8, 9, 10, 11]
    assert memory.join(parts)[0, 0].tolist() == list(range(28))


@torch.no_grad()
def test_one_token_is_written_as_it_is() -> None:
    """M = sigma(k)^T v with sigma taken once, z = sigma(k), whatever the number of rows and of tokens."""
    model = SUBJECTS["default"].model()
    attention = model.model.layers[0].self_attn
    for rows in (1, 3):
        memory = MemoryCache.for_model(model)
        ids = tokens(rows, 1, seed=6)
        model(ids, past_key_values=memory)
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids) * HIDDEN**0.5)
        key, value = (part(hidden).view(rows, 4, 8) for part in (attention.k_proj, attention.v_proj))
        key = torch.nn.functional.elu(key) + 1
        held = memory.state_dict()
        assert_close(held["model.0.memory_0"][:, 0], key[..., :, None] * value[..., None, :], "M", tolerance=1e-6)
        assert_close(held["model.0.normaliser_0"][:, 0], key, "z", tolerance=1e-6)


@every_variant
def test_a_second_backward_succeeds(variant: str) -> None:
    """A training loop that carries memory from step to step, and cuts the graph between them."""
    model = SUBJECTS[variant].build().train()
    memory = MemoryCache.for_model(model)
    for step in range(3):
        ids = tokens(2, 12, seed=step)
        model(ids, labels=ids, past_key_values=memory).loss.backward()
        memory.detach()
    assert memory.tokens_seen.tolist() == [36, 36]


@every_variant
@torch.no_grad()
def test_decoding_token_by_token_is_no_farther_from_chunks_than_rounding(variant: str) -> None:
    """In units of the logits' standard deviation, over several chunks."""
    model, ids = SUBJECTS[variant].model(), tokens(1, 140, seed=3)
    whole = model(ids, use_cache=False).logits
    steps = feed(model, MemoryCache.for_model(model), ids, [1])
    assert (whole - steps).abs().max() / whole.std() < 1e-3


@every_variant
@torch.no_grad()
def test_what_is_saved_is_all_that_is_remembered(variant: str, tmp_path: Path) -> None:
    """Every head's matrix and normaliser, at the size that the heads say."""
    model = SUBJECTS[variant].model()
    memory = MemoryCache.for_model(model)
    model(tokens(2, 9), past_key_values=memory)
    memory.save_pretrained(tmp_path)
    held = MemoryCache.from_pretrained(tmp_path, model=model).state_dict()
    heads = [head for heads in model.config.layers for head in heads]
    numbers = sum(t.numel() for n, t in held.items() if "memory_" in n or "normaliser_" in n)
    assert numbers == 2 * sum(head["dim"] ** 2 + head["dim"] for head in heads)
    assert memory.nbytes == 4 * numbers


def windows(conversations: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The windows of one text as a batch for `MemoryTrainer`."""
    return {"conversations": conversations[0]}


def test_training_carries_memory_from_window_to_window(tmp_path: Path) -> None:
    """The loss of a second window reaches the weights through what the first one wrote."""
    told, asked = tokens(2, 12, seed=1), tokens(2, 6, seed=2)
    nothing = torch.zeros_like(asked)

    def window(ids: Tensor, labels: Tensor, learns: bool) -> dict[str, Any]:
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "learns": learns, "keeps": False,
                "keep": nothing, "told_ago": torch.zeros(2, dtype=torch.long)}  # fmt: skip

    text = [window(told, torch.full_like(told, -100), False), window(asked, asked, True)]
    model = SUBJECTS["mixed"].build()
    args = MemoryTrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = MemoryTrainer(model=model, args=args, train_dataset=[text], data_collator=windows)
    loss, _ = trainer.run_episodes(model, text)
    embeddings = model.get_input_embeddings().weight
    only_told = [t for t in told.flatten().tolist() if t not in asked]
    (carried,) = torch.autograd.grad(loss, embeddings)
    (alone,) = torch.autograd.grad(model(asked, labels=asked).loss, embeddings)
    # The head gives every row of the embeddings some gradient: what differs came through memory.
    assert (carried - alone)[only_told].abs().max() > 1e-4
    assert not torch.allclose(loss, model(asked, labels=asked).loss)
    trainer.train()
    assert trainer.state.log_history
