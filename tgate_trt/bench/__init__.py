"""Benchmarks, measured and never asserted: `python -m tgate_trt.bench`.

`steps` times single steps, `pictures` whole pictures, `scores` counts correct pictures of the demo model, and
`build_cost` measures a build. Each writes what it has after every round; `tables` shows what was written.
"""
