"""Time kernels, copies, collectives and whole layers on the GPU at hand: `python -m calibration measure`.

`points` says what can be measured, `timing` how one point is timed, `rows` how results are kept, `plan` which point
comes next, `run` does it. Operators (`linear`, `attention`, ...) are listed in `run.OPERATORS`.
"""
