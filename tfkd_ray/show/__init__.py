"""Views of experiments: status, tables, reports, plans, exports, TensorBoard and the live view.

It may import the folders below it. It reads the files of runs and never changes them. Only
`listener` and `tensorboard` know Ray: they are Tune callbacks. Begin with `status.status`.
"""
