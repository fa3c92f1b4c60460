"""`cimjax tune`: by which program, product and operands each layer of a network is fastest on this device.

`problem`: which layers are timed, on what numbers, and which results are equal; `measure`: how they are compiled and
timed, and what is chosen; `table`: what is shown and written. Who reads it: `cimjax.core.programs.tuning`.
"""
