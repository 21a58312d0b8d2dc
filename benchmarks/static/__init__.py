"""Figures that need no GPU: what compilers make of kernels, and what operators and models launch, move and keep.

They raise alarms and prove no speed. `units` says what is measured, `figures` what gates how, `pins` what is expected.
"""
