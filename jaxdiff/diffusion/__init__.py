"""Diffusion as pure mathematics on arrays: schedules, predictions, losses, guidance, samplers."""
