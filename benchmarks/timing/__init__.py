"""What `benchmarks/bench.py` measures, and how: subjects (models and inputs), variants, paired timing, parts, tables."""
