"""Looking into models: sparse autoencoders, hooks, interventions, metrics and plots."""

from .activations import ActivationStream, memory_slots, module_activations
from .hooks import captured, find_module
from .intervention import Edit, control_latents, dose_response, intervene
from .metrics import prediction_metrics, reconstruction_metrics
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
    "export_saelens",
    "find_module",
    "import_saelens",
    "intervene",
    "memory_slots",
    "module_activations",
    "prediction_metrics",
    "reconstruction_metrics",
]
