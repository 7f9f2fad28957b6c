"""The bank mechanism as an adapter."""

import warnings
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..configuration import BankConfig
from ..configuration.bank import QUANTIZED_BITS, check_choice, lookahead_error
from ..configuration.memory_transformer import VARIANTS
from ..memory import MemoryLayer
from ..memory.bank import MemoryBank, OpenBank
from ..memory.bank_layer import BankLayer, prompt_lengths
from ..memory.bank_reader import BankAttention, MemoryLinear
from ..memory.bank_router import RouterRecord, has_router_loss, router_loss, router_losses
from ..memory.router_loss import RouterLossSlot
from .block import MemoryBlock
from .config import MemoryAdapterConfig
from .context import ForwardContext


MLP_RATIO = 4


@dataclass
class BankAdapterConfig(BankConfig, MemoryAdapterConfig):
    """`MemoryAdapterConfig(mechanism="bank")`: its settings are those of `BankConfig`, and one more.

    Args:
        memory_block_variant: What follows a decoder layer. `"A"`: a read of the bank. `"B"`: a read of the bank and an
            MLP of its own. (In a model that exists nothing can be put between a layer's attention and its MLP.)
    """

    mechanism: str = "bank"
    memory_block_variant: str = field(default="A", metadata={"help": f"What follows a layer, one of {VARIANTS}."})

    def validate(self) -> None:
        self.check_bank()
        check_choice("memory_block_variant", self.memory_block_variant, VARIANTS)
        if self.looks_ahead and not self.allow_lookahead_routing:
            warnings.warn(
                f"{' and '.join(self.looks_ahead)}='sequence' routes every token by the mean of its whole sequence, "
                "the future included. A causal language model refuses it",
                stacklevel=2,
            )

    def new_block(self, decoder_layer: nn.Module, hidden_size: int, num_heads: int, layer_idx: int) -> "BankBlock":
        layers = self.layers_to_transform
        assert isinstance(layers, list)
        groups = [self.bank_of_layer(order) for order in range(len(layers))]
        order = layers.index(layer_idx)
        holds_bank = groups.index(groups[order]) == order
        return BankBlock(self, hidden_size, num_heads, groups[order], holds_bank, 1 / len(layers))


class BankBlock(nn.Module, MemoryBlock):
    """A read of a bank after a decoder layer.

    A bank that several layers share is held by the first of them and handed on within a forward pass.

    Args:
        group: The number of the bank that this layer reads.
        holds_bank: Whether it is held here.
        weight: Of this layer's router loss.
    """

    keeps_context: ClassVar[bool] = True

    def __init__(
        self,
        config: BankAdapterConfig,
        hidden_size: int,
        num_heads: int,
        group: int,
        holds_bank: bool,
        weight: float,
    ) -> None:
        super().__init__()
        self.config = BankConfig.of(config)
        self.group, self.weight = group, weight
        self.norm = nn.RMSNorm(hidden_size)
        self.attention = BankAttention(self.config, hidden_size, num_heads)
        self.bank = MemoryBank(self.config, hidden_size) if holds_bank else None
        self.mlp = None
        if config.memory_block_variant == "B":
            self.mlp_norm = nn.RMSNorm(hidden_size)
            self.mlp = GatedMLP(hidden_size, zero=config.wo_init_zero)
        self.router_loss = RouterLossSlot()

    def new_cache_layer(self, layer_idx: int, adapter_name: str) -> MemoryLayer:
        return BankLayer(self.config, layer_idx, adapter_name)

    def read_and_write(
        self, hidden: Tensor, output: Tensor, memory: MemoryLayer | None, context: ForwardContext
    ) -> Tensor | None:
        self.check_routing(context)
        layer = cast("BankLayer | None", memory)
        # Of a model whose layers are on several devices these are where its input is.
        real, starts = (None if t is None else t.to(output.device) for t in context.tokens_and_documents)
        assert real is not None
        lengths = context.prompt_lengths
        if lengths is None and "hybrid" in self.config.routing_strategies:
            lengths = prompt_lengths(real, context.generated_from, layer)
        # In the adapter's own dtype, which PEFT keeps at float32.
        stream = output.to(self.norm.weight.dtype)
        read, record = self.attention(self.norm(stream), self.open_bank(context), real, layer, starts, lengths)
        self.note_routing(record)
        if self.mlp is None:
            return read
        return read + self.mlp(self.mlp_norm(stream + read))

    def open_bank(self, context: ForwardContext) -> OpenBank:
        """The bank of this pass: opened by the layer that holds it, which comes before all others that share it."""
        key = (context.adapter_name, self.group)
        if self.bank is not None:
            context.shared[key] = self.bank()
        opened: OpenBank = context.shared[key]
        return opened

    def check_routing(self, context: ForwardContext) -> None:
        """ValueError where next tokens are predicted and tokens are routed by their future."""
        name = "routing_strategy_train" if self.training else "routing_strategy_inference"
        if name not in self.config.looks_ahead or self.config.allow_lookahead_routing:
            return
        if context.model is not None and context.model.get_output_embeddings() is not None:
            raise lookahead_error((name,), "a causal language model")

    def note_routing(self, record: RouterRecord | None) -> None:
        """In training, let the router's loss wait to be taken."""
        if record is not None and self.training and torch.is_grad_enabled() and has_router_loss(self.config):
            losses = router_losses([record], self.router_loss.over_processes)
            self.router_loss.loss = self.weight * router_loss(losses, self.config)


class GatedMLP(nn.Module):
    """SwiGLU, as in Llama; with `zero` it starts by adding nothing."""

    def __init__(self, hidden_size: int, zero: bool) -> None:
        super().__init__()
        inner = MLP_RATIO * hidden_size
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner, bias=False)
        self.down_proj = MemoryLinear(inner, hidden_size, 0.0 if zero else inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def quantize_bank(model: nn.Module, bits: int) -> None:
    """Hold the banks of a model's memory adapters in 8 or 4 bits a value from now on, frozen.

    Reads are those of `quantize_memory=True` with as many bits.

    Raises:
        ValueError: when the model has no bank, or for another number of bits.
    """
    check_choice("memory_quant_bits", bits, QUANTIZED_BITS)
    held = [block for block in model.modules() if isinstance(block, BankBlock)]
    if not held:
        raise ValueError(f"{type(model).__name__} has no bank: no adapter of it has mechanism='bank'")
    for block in held:
        if block.bank is not None:
            block.bank.store_quantized(bits)
        block.config = replace(block.config, quantize_memory=True, memory_quant_bits=bits, quantized_storage=True)
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, BankAdapterConfig):
            config.quantize_memory, config.memory_quant_bits, config.quantized_storage = True, bits, True
