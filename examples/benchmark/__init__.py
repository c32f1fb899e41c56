"""colocc against megatron-core's own paths, on the same GPUs, weights and data.

    python -m examples.benchmark tiny                  # 2 CPU ranks, a minute
    python -m examples.benchmark pp1 pp2 --out out     # 2 GPUs

Each case is a model on a pair of layouts with a global batch. Its arms take turns, a step each, so
that drift hits all alike. See RESULTS.md for what came of it.
"""
