"""Many adapters on one base model, different ones in one batch."""
