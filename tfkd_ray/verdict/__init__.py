"""Metrics and statistics: what a metric is, what is better, and whether one configuration beats another.

It may import `settings`, and computes with NumPy and SciPy alone. Begin with `scores.SCORES` and
`verdict.decide`.
"""
