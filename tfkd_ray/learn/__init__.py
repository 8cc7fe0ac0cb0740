"""Training in one process group: data, networks, objectives, the loop, checkpoints and teachers.

It may import the folders below it and torch, but not Ray: the loop also runs without a sweep. Begin
with `loop.train`, which reads top to bottom.
"""
