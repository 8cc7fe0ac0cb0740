"""What is said about experiments: status, tables, reports, plans, exports, TensorBoard and the live view.

It may import the folders below it, reads what runs wrote, and changes nothing of it. Only `listener` and `tensorboard`
know Ray: they are Tune callbacks. Begin with `status.status`.
"""
