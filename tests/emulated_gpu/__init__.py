"""An NVIDIA GPU in numpy, for tests: it runs the PTX that Triton compiles, and sees what a GPU would not say.

The interpreter of Triton runs the source of a kernel, one whole program after another. What a GPU runs is what the
compiler made of it: threads that hold pieces of each block, exchange them through shared memory, shuffles and barriers,
and race where one is missing. Here that program is run, instruction by instruction, on all threads of a launch.

- `ptx`: the text of a module, read.
- `arithmetic`: what instructions compute, bit for bit as NVIDIA documents it (PTX ISA, sections 9.7.1 to 9.7.9).
- `memory`: that of the live tensors of this process; accesses outside them, or not aligned, raise `Fault`.
- `ordering`: so do accesses of different warps to the same place that nothing orders, whether or not they did harm in
  this run.
- `machine`: threads, control flow, barriers and shuffles.
- `driver`: makes Triton launch here. Caching, specialisation and arguments are those of the real runtime.
- `plugin`: ``pytest -p tests.emulated_gpu.plugin`` runs any test of the kernels here instead of in the interpreter.

Not here: instructions that the kernels do not have, which are refused; time; and the assembler's translation of PTX
into machine code. Threads of a warp are taken to run together between two branches, as Triton's own code takes them to.
"""
