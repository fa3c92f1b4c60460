"""Pure functions on arrays: the computation of an array layer, step by step. Imports jax and numpy only.

Shapes are written in these letters everywhere:

  N        images of a batch
  H, W     a layer's input positions; OH, OW: its output positions
  C, O     input channels and output channels; kh, kw: the kernel's positions (any number of spatial axes works)
  M        all output positions of a batch, `N OH OW`
  T        slices of an activation code
  K        planes of a weight code
  A        arrays one below the other (row tiles); Ct: arrays side by side (column tiles)
  R        read groups, the rows that one conversion reads; c: the channels of a read group

The definition runs: `conv` composes `encoding`, `cells`, and the three functions `array_mac.array_mac`, `adc.convert`
and `readout.dequantize_and_add`, which `programs.reference` calls one after the other. Faster programs for these
three stand in `programs` behind `programs.contract`; nobody has to read one to know what is computed.
"""
