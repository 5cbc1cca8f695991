"""Quantizes trained weights. Computes row scales and GPTQ's Hessians, and rounds weights to nearest or by GPTQ."""
