"""The laboratory around minifisher; it uses only the library's public names.

problems: the networks to train. data: their datasets. training: one run. comparison: many runs.
presentation: progress bars, tables and plots. cli: the commands.
"""
