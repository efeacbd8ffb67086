"""An NVIDIA GPU in numpy, for tests: it runs the PTX that Triton compiles, and sees what a GPU would not say.

The interpreter of Triton runs the source of a kernel, one whole program after another. What a GPU runs is what the
compiler made of it: threads that hold pieces of each block, exchange them through shared memory, shuffles and barriers,
and race where one is missing. Here that program is run, instruction by instruction, on all threads of a launch.

- `ptx`: the text of a module, read.
- `arithmetic`: what instructions compute, bit for bit as NVIDIA documents it (PTX ISA, sections 9.7.1 to 9.7.9).
- `memory`: global memory is that of the live tensors of this process; shared memory belongs to a block of threads.
  Accesses outside them, or not aligned, raise `Fault`.
- `ordering`: accesses of different warps to the same place that nothing orders raise `Fault` too, whether or not they
  did harm in this run: happens-before by vector clocks (Flanagan and Freund, FastTrack, PLDI 2009) over barriers,
  acquire-release atomics and the ends of launches.
- `machine`: threads, control flow, barriers and shuffles; a seed chooses who goes first.
- `counting`: what a launch executes and moves.
- `driver`: makes Triton launch here. Caching, specialisation and arguments are those of the real runtime.
- `plugin`: ``pytest -p tests.emulated_gpu.plugin`` runs any test of the kernels here instead of in the interpreter.

Not modelled: time, the assembler's translation of PTX into machine code, and memory orders weaker than what
happens-before says about programs without races. Threads of a warp are taken to run together between two branches, as
Triton's own code takes them to.
"""
