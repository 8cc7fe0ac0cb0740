"""Clusters: their files and the rules for these, starting and ending them, jobs on them, and `tfkd doctor`.

It may import every folder but `cli`; a sweep that runs on this machine needs none of it. Begin with
`clusterfile.load_cluster`, then `verbs`.
"""
