"""The gate: schedules, what follows it, and the drop-in for a pipeline's denoiser."""
