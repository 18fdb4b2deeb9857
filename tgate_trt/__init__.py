"""tgate-trt: text-to-image diffusion as two compiled graphs that switch at the gate step (T-GATE, arXiv 2404.02747)."""
