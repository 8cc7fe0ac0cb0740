"""Sweeps and comparisons on Ray: tuner, searcher, callbacks, trials, worker groups and nodes.

This is the only folder that depends on Ray throughout; it may import all folders below. Begin with
`tune.build_tuner`, then `trial.StudentTrial`.
"""
