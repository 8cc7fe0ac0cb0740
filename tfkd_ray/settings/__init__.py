"""Settings that a person writes, and the sentences that say what is wrong with them: errors, YAML, files, own
code.

It knows neither torch nor Ray nor any other folder of the package. Begin with `schema.Settings` and
`errors.ConfigError`.
"""
