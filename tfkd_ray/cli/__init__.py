"""The command `tfkd`: a parser, and one function for each verb.

It may import everything, but only when a verb runs, so that `tfkd --help` is quick. Begin with
`main.main`.
"""
