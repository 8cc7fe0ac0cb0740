"""Experiments on disk and in buckets: records, metrics and mirrors.

It may import `settings` and `verdict`; it knows neither torch nor Ray. Begin with `experiment.Record` and
`storage.Storage`.
"""
