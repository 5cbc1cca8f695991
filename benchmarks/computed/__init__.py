"""What is computed without a GPU: Inductor's plan, the kernels of a step, bytes and seconds."""
