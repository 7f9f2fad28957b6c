"""Looking into models: sparse autoencoders, hooks, interventions, metrics and plots."""
