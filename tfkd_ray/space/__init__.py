"""Search spaces and arms: the searched settings, their ranges, and the meaning of a space file.

It may import `learn` and the folders below it, and starts no trial. Begin with `space.build_space`,
then `ranges.Range`.
"""
