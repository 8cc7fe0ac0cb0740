"""Sweeps and comparisons on Ray: the tuner, its searcher and callbacks, trials, worker groups and nodes.

This is the folder that knows Ray; it may import all folders below. Begin with `tune.build_tuner`, then
`trial.StudentTrial`.
"""
