"""The kernels for CUDA in Triton's interpreter, on CPU tensors.

`tests/test_triton.py` runs this folder in a process of its own, since Triton reads TRITON_INTERPRET
when it is imported. Chunks and tiles are tiny here, so that every loop goes round more than once.
What the interpreter cannot show are races and speed: tests/benchmarks/gpu.py is for a machine with
a GPU.
"""
