"""The PEFT tuner that puts a memory into a model."""

import functools
import inspect
from typing import Any, ClassVar

from peft import PeftConfig
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..memory.decoder import find_decoder
from ..memory.layer import BUILT_IN
from .config import MemoryAdapterConfig
from .context import ForwardContext
from .decoder import find_decoder_layers
from .hooks import decoder_hook, decoder_pre_hook, generate, layer_hook, model_hook, model_pre_hook
from .layer import MemoryAdapterLayer, merging
from .registration import PREFIX


CHILD = "memory_adapter"
BLOCK = MemoryAdapterLayer.adapter_layer_names[0]


class MemoryTuner(BaseTuner):
    """Adds a `memory_adapter` child and a forward hook to decoder layers; replaces no module and changes no weight."""

    prefix = PREFIX
    tuner_layer_cls = MemoryAdapterLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, MemoryAdapterConfig)
        layers = find_decoder_layers(self.model, peft_config.layers_pattern)
        peft_config.layers_to_transform = peft_config.resolve_layers(len(layers))
        names = {id(module): name for name, module in self.model.named_modules()}
        # Not a field: which modules these are follows from the indices, and only those are saved.
        target_modules = {names[id(layers[index])] for index in peft_config.layers_to_transform}
        peft_config.target_modules = target_modules  # type: ignore[attr-defined]
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in peft_config.target_modules  # type: ignore[attr-defined]

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        assert isinstance(peft_config, MemoryAdapterConfig)
        if adapter_name == BUILT_IN:
            raise ValueError(
                f"An adapter cannot be called {adapter_name!r}, as the memory of a model itself is; use another name"
            )
        adapter = getattr(target, CHILD, None)
        if adapter is None:
            layers = find_decoder_layers(self.model, peft_config.layers_pattern)
            index = next(index for index, layer in enumerate(layers) if layer is target)
            hidden_size = self.model.config.get_text_config(decoder=True).hidden_size
            adapter = MemoryAdapterLayer(index, hidden_size, self._context())
            target.add_module(CHILD, adapter)
            # Before other hooks: those that capture hidden states or shard parameters must see what memory added.
            adapter.handle = target.register_forward_hook(layer_hook, with_kwargs=True, prepend=True)
        try:
            adapter.update_layer(adapter_name, peft_config, target)
        except Exception:
            self._take_out(adapter_name)
            raise
        adapter.requires_grad_(adapter_name in self.active_adapters)

    def _context(self) -> ForwardContext:
        """What this model's hooks share; made, with the decoder's own hooks, when it is first asked for."""
        decoder: Any = find_decoder(self.model)
        context = getattr(decoder, "memory_context", None)
        if context is None:
            config = self.model.config.get_text_config(decoder=True)
            takes_prompt_lengths = "prompt_lengths" in inspect.signature(type(self.model).forward).parameters
            context = ForwardContext(config.num_attention_heads, self.model, takes_prompt_lengths)
            decoder.memory_context = context
            decoder.memory_handles = [
                self.model.register_forward_pre_hook(model_pre_hook, with_kwargs=True),
                decoder.register_forward_pre_hook(decoder_pre_hook, with_kwargs=True),
                decoder.register_forward_hook(decoder_hook, with_kwargs=True, always_call=True),
            ]
            if decoder is not self.model:
                decoder.memory_handles.append(self.model.register_forward_hook(model_hook, with_kwargs=True))
            # On the instance, as PEFT calls the model's own; one that somebody else put there stays. A partial function
            # is copied and pickled with its model.
            if self.model.can_generate() and "generate" not in vars(self.model):
                self.model.generate = functools.partial(generate, self.model)  # type: ignore[method-assign]
                self.model.generate.__doc__ = type(self.model).generate.__doc__
        return context

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a memory adapter, or one of another method that was added beside it."""
        config: Any = self.peft_config.get(adapter_name)
        if config is None or isinstance(config, MemoryAdapterConfig):
            super().delete_adapter(adapter_name)
            if not self.active_adapter and self.peft_config:
                # PEFT asks one layer which adapter is left, but another may be in other layers.
                self.set_adapter(next(iter(self.peft_config)))
            return
        del self.peft_config[adapter_name]
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
        delete_adapter(self.model, adapter_name, prefix=prefix)

    # Names in checkpoints.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marked = f"{BLOCK}.{adapter_name}."
        if marked in key:
            return key.replace(marked, f"{BLOCK}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        # By name: under FSDP the modules' paths have parts that the keys have not.
        marked = f".{CHILD}.{BLOCK}.{adapter_name}."
        return {key: value for key, value in state_dict.items() if marked in f".{key}"}

    # What a memory adapter can not do, and how it goes away.

    def _check_merge_allowed(self) -> None:
        raise merging()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise merging()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: memories of different adapters are not weights that could be summed."""
        raise NotImplementedError(
            "Memory adapters cannot be combined into one by weights. Activate several at once with "
            "base_model.set_adapter([...])"
        )

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise merging()
        self._take_out()
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        return self.model

    def _take_out(self, adapter_name: str | None = None) -> None:
        """Remove one adapter, or all, and what is of no use then: modules, hooks and what they share."""
        left = False
        for module in list(self.model.modules()):
            adapter = module._modules.get(CHILD)
            if isinstance(adapter, MemoryAdapterLayer):
                if adapter_name is not None and adapter_name in adapter.senri_block:
                    del adapter.senri_block[adapter_name]
                if adapter_name is not None and len(adapter.senri_block):
                    left = True
                else:
                    adapter.handle.remove()
                    del module._modules[CHILD]
        decoder: Any = find_decoder(self.model)
        if not left and hasattr(decoder, "memory_context"):
            for handle in decoder.memory_handles:
                handle.remove()
            del decoder.memory_context, decoder.memory_handles
            if getattr(vars(self.model).get("generate"), "func", None) is generate:
                del self.model.generate
