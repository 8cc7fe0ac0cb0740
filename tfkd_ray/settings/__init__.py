"""Validated settings and the errors in them, YAML, safe files, passwords, and the user's own code.

It knows neither torch nor Ray nor any other folder of the package. Begin with `schema.Settings` and
`errors.ConfigError`.
"""
