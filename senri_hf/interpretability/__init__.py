"""Looking into models: sparse autoencoders, hooks, interventions, metrics and plots.

Names are imported when they are asked for: transformers' Auto classes import the autoencoder's class while transformers
itself is half imported, and must not reach the trainer then.
"""

import importlib
from typing import TYPE_CHECKING, Any


_MODULES = {
    "ActivationStream": ".activations",
    "Edit": ".intervention",
    "SparseAutoencoder": ".sparse_autoencoder",
    "SparseAutoencoderOutput": ".sparse_autoencoder",
    "SparseAutoencoderTrainer": ".trainer",
    "SparseAutoencoderTrainingArguments": ".trainer",
    "captured": ".hooks",
    "control_latents": ".doses",
    "dose_response": ".doses",
    "edit_slots": ".memory",
    "export_saelens": ".saelens",
    "find_module": ".hooks",
    "import_saelens": ".saelens",
    "intervene": ".intervention",
    "memory_slots": ".memory",
    "module_activations": ".activations",
    "peak_activations": ".contexts",
    "prediction_metrics": ".metrics",
    "promotion_doses": ".promotion",
    "reconstruction_metrics": ".metrics",
    "top_contexts": ".contexts",
}

if TYPE_CHECKING:
    from .activations import ActivationStream, module_activations
    from .contexts import peak_activations, top_contexts
    from .doses import control_latents, dose_response
    from .hooks import captured, find_module
    from .intervention import Edit, intervene
    from .memory import edit_slots, memory_slots
    from .metrics import prediction_metrics, reconstruction_metrics
    from .promotion import promotion_doses
    from .saelens import export_saelens, import_saelens
    from .sparse_autoencoder import SparseAutoencoder, SparseAutoencoderOutput
    from .trainer import SparseAutoencoderTrainer, SparseAutoencoderTrainingArguments

__all__ = [
    "ActivationStream",
    "Edit",
    "SparseAutoencoder",
    "SparseAutoencoderOutput",
    "SparseAutoencoderTrainer",
    "SparseAutoencoderTrainingArguments",
    "captured",
    "control_latents",
    "dose_response",
    "edit_slots",
    "export_saelens",
    "find_module",
    "import_saelens",
    "intervene",
    "memory_slots",
    "module_activations",
    "peak_activations",
    "prediction_metrics",
    "promotion_doses",
    "reconstruction_metrics",
    "top_contexts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value
