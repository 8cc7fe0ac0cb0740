"""What is said about experiments: status, tables, reports, plans, exports, TensorBoard and the live view.

It reads what runs wrote and changes nothing of it; only `live` and `tensorboard` know Ray, as Tune
callbacks. Begin with `status.status`.
"""
