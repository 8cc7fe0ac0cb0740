"""Clusters: their files and rules, starting and stopping them, jobs on them, and `tfkd doctor`.

This folder may import every folder but `cli`; a sweep on this machine needs none of it. Begin with
`clusterfile.load_cluster`, then `verbs`.
"""
