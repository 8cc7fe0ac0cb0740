"""Search spaces and arms: what is searched, within which ranges, and what a file means.

It may import `learn` and the folders below; nothing here starts a trial. Begin with `space.build_space`,
then `ranges.Range`.
"""
